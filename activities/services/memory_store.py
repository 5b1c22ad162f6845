"""Long-lived memory: records in SQL, found again by meaning, or by words when meaning cannot be asked.

A record can be kept in the transaction that logs the outcome it remembers; its vector comes from the outbox.
Forgetting empties a record and its vectors but leaves the row, so that a late retry cannot bring it back.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol, cast

from sqlalchemy import Connection, Row, Select, func, insert, select, update

from activities.services.content import BLOB, ContentStore
from activities.services.database import Database, from_micros, to_micros
from activities.services.indexing import Outbox, Pending, newest_position
from activities.services.vectors import (
    MEMORY,
    Near,
    Vector,
    empty_vectors,
    next_position,
    put_vectors,
    unit_vector,
)
from activities.tiers.base import Embedder
from models.errors import InvalidInput, MemoryUnavailable, Unavailable
from models.inference import DataClass
from models.loop import Ref
from models.memory import Hit, Memo, Recall, Recalled

TEXT_BYTES = 256 * 1024
QUERY_BYTES = 16 * 1024
EMBED_CHARACTERS = (2000, 500, 120)
"""How much of a text is embedded; the shorter ones serve when the model refuses it as too long."""
REFUSED_LIMIT = 100
WORD_SCAN = 5000
"""Word search looks at the titles of this many newest records."""
AWAY = "the embedding server is away; titles were searched by words"
NO_MODEL = "no embedding server is configured; titles were searched by words"
REFUSED = "the embedding model gave no usable vector for the query; titles were searched by words"
LAGGING = "some records have no vector yet and could not be searched"


class Vectors(Protocol):
    """Search by meaning; a projection of SQL that may be rebuilt at any time."""

    @property
    def dimensions(self) -> int:
        """How many numbers a vector has."""
        ...

    async def nearest(
        self, tenant: str, model: str, query: Vector, kinds: Sequence[str], limit: int
    ) -> list[Near]:
        """The records with the highest cosine, best first."""
        ...


def keep(connection: Connection, memo: Memo, now: datetime) -> bool:
    """Keep a record inside a transaction that is under way; False when one of that id was kept before.

    Raises:
        InvalidInput: its text is not stored, too long, or not of the size that the reference says.
    """
    known = select(MEMORY.c.position).where(
        MEMORY.c.tenant == memo.tenant, MEMORY.c.record_id == memo.record_id
    )
    # The position comes first: it holds the lock that keeps another process from the same id.
    position = next_position(connection, MEMORY.c.position)
    if connection.execute(known).first() is not None:
        return False
    _check_text(connection, memo)
    connection.execute(insert(MEMORY).values(**_row(memo, now), position=position))
    return True


class MemoryStore:
    """Records of all tenants."""

    def __init__(
        self, database: Database, content: ContentStore, embedder: Embedder | None, vectors: Vectors
    ) -> None:
        """Without an embedder everything is kept and found by words only."""
        self._database = database
        self._content = content
        self._embedder = embedder
        self._vectors = vectors
        self._outbox = Outbox(embedder.model) if embedder else None
        self._refused: set[tuple[str, str]] = set()

    async def keep(self, memo: Memo, now: datetime) -> bool:
        """Keep a record in a transaction of its own; False when one of that id was kept before."""
        return await self._database.write(lambda connection: keep(connection, memo, now))

    async def recall(self, request: Recall) -> Recalled:
        """Find records by meaning; by words, and saying so, when meaning cannot be asked.

        Raises:
            InvalidInput: the query is not stored, not UTF-8 or too long.
        """
        query = await self._query(request)
        vector, degraded = await self._embedded(query)
        if vector is None:
            hits = await self._database.read(lambda connection: _by_words(connection, request, query))
        else:
            hits, degraded = await self._by_meaning(request, vector)
        return Recalled(hits=tuple(hits), degraded=degraded, query_digest=request.query.digest)

    async def forget(self, tenant: str, record_id: str) -> bool:
        """Empty a record and its vectors for good; False when there is none. Its text blob is not touched."""
        now = to_micros(datetime.now(UTC))
        return await self._database.write(lambda connection: _forget(connection, tenant, record_id, now))

    async def newest(self) -> int:
        """Position of the newest record of all tenants."""
        return await self._database.read(newest_position)

    async def index_pending(self, limit: int = 32) -> int:
        """Give vectors to the oldest records that have none; how many were looked at, 0 when none waits.

        Raises:
            MemoryUnavailable: the embedding server is away, or refuses whatever it is given.
            InvalidInput: it answers with vectors that are none.
        """
        embedder, outbox = self._embedder, self._outbox
        if embedder is None or outbox is None:
            return 0
        skip = frozenset(self._refused)
        batch = await self._database.read(lambda connection: outbox.pending(connection, limit, skip))
        vectors = await self._embed_batch(embedder, batch)
        size = self._vectors.dimensions
        rows = [
            (p.tenant, p.record_id, unit_vector(v, size)) for p, v in zip(batch, vectors, strict=True) if v
        ]
        if rows:
            await self._database.write(lambda connection: put_vectors(connection, embedder.model, rows))
        return len(batch)

    async def _query(self, request: Recall) -> str:
        data = await self._content.get(request.tenant, request.query)
        if len(data) > QUERY_BYTES:
            raise InvalidInput.field("query", f"{len(data)} bytes", f"ask in under {QUERY_BYTES} bytes")
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise InvalidInput.field("query", request.query.digest, "store it as UTF-8 text") from None

    async def _embedded(self, query: str) -> tuple[Vector | None, str]:
        if self._embedder is None:
            return None, NO_MODEL
        try:
            vectors = await _embed(self._embedder, [query[: EMBED_CHARACTERS[0]]])
            return unit_vector(vectors[0], self._vectors.dimensions), ""
        except Unavailable:
            return None, AWAY
        except InvalidInput:
            return None, REFUSED

    async def _by_meaning(self, request: Recall, vector: Vector) -> tuple[list[Hit], str]:
        # A record forgotten between search and look-up leaves a gap; the next search knows about it.
        hits, whole, waits = await self._look(request, vector)
        if not whole:
            hits, _, waits = await self._look(request, vector)
        return hits, LAGGING if waits else ""

    async def _look(self, request: Recall, vector: Vector) -> tuple[list[Hit], bool, bool]:
        embedder, outbox = cast(Embedder, self._embedder), cast(Outbox, self._outbox)
        near = await self._vectors.nearest(
            request.tenant, embedder.model, vector, request.kinds, request.limit
        )

        def read(connection: Connection) -> tuple[Mapping[str, Row[Any]], bool]:
            ids = [one.record_id for one in near]
            rows = connection.execute(_live(request).where(MEMORY.c.record_id.in_(ids)))
            return {row.record_id: row for row in rows}, outbox.waits(connection, request.tenant)

        found, waits = await self._database.read(read)
        hits = [_hit(found[one.record_id], one.cosine) for one in near if one.record_id in found]
        return hits, len(hits) == len(near), waits

    async def _embed_batch(self, embedder: Embedder, batch: list[Pending]) -> list[list[float]]:
        """One vector per record; empty for one that the model refuses even by itself and shortened."""
        if not batch:
            return []
        try:
            if all(pending.words for pending in batch):
                return await _embed(embedder, [pending.words[: EMBED_CHARACTERS[0]] for pending in batch])
        except InvalidInput:
            pass
        return [await self._embed_one(embedder, pending) for pending in batch]

    async def _embed_one(self, embedder: Embedder, pending: Pending) -> list[float]:
        for length in EMBED_CHARACTERS if pending.words else ():
            try:
                return (await _embed(embedder, [pending.words[:length]]))[0]
            except InvalidInput:
                continue
        self._refused.add((pending.tenant, pending.record_id))
        if len(self._refused) > REFUSED_LIMIT:
            self._refused.clear()
            raise MemoryUnavailable(f"{embedder.model} refuses every text; check the embedding server")
        return []


async def _embed(embedder: Embedder, texts: list[str]) -> list[list[float]]:
    vectors = await embedder.embed(texts)
    if len(vectors) != len(texts):
        raise MemoryUnavailable(
            f"{embedder.model} gave {len(vectors)} vectors for {len(texts)} texts; check the embedding server"
        )
    return vectors


def _check_text(connection: Connection, memo: Memo) -> None:
    size = connection.execute(
        select(func.length(BLOB.c.data)).where(
            BLOB.c.tenant == memo.tenant, BLOB.c.digest == memo.text.digest
        )
    ).scalar_one_or_none()
    if size is None:
        raise InvalidInput.field("text", memo.text.digest, "no such content is stored; store it first")
    if size > TEXT_BYTES:
        raise InvalidInput.field("text", f"{size} bytes", f"remember at most {TEXT_BYTES} bytes")
    if size != memo.text.size:
        raise InvalidInput.field("text.size", memo.text.size, f"the stored text has {size} bytes")


def _row(memo: Memo, now: datetime) -> dict[str, Any]:
    return dict(
        tenant=memo.tenant,
        record_id=memo.record_id,
        kind=memo.kind,
        title=memo.title,
        text_digest=memo.text.digest,
        text_size=memo.text.size,
        media_type=memo.text.media_type,
        source=memo.source,
        data_class=memo.data_class.value,
        links=json.dumps(memo.links),
        recorded_at=to_micros(now),
    )


def _forget(connection: Connection, tenant: str, record_id: str, now: int) -> bool:
    mine = (MEMORY.c.tenant == tenant, MEMORY.c.record_id == record_id, MEMORY.c.forgotten_at.is_(None))
    blank = dict(title="", text_digest="", text_size=0, links="[]", forgotten_at=now)
    if connection.execute(update(MEMORY).where(*mine).values(**blank)).rowcount == 0:
        return False
    empty_vectors(connection, tenant, record_id)
    return True


def _live(request: Recall) -> Select[Any]:
    rows = select(MEMORY).where(MEMORY.c.tenant == request.tenant, MEMORY.c.forgotten_at.is_(None))
    return rows.where(MEMORY.c.kind.in_(request.kinds)) if request.kinds else rows


def _by_words(connection: Connection, request: Recall, query: str) -> list[Hit]:
    """Cosine of the sets of words in query and title, over the newest records; the same on every database."""
    asked = _word_set(query)
    newest = _live(request).order_by(MEMORY.c.recorded_at.desc(), MEMORY.c.record_id).limit(WORD_SCAN)
    scored = ((_word_cosine(asked, _word_set(row.title)), row) for row in connection.execute(newest))
    # A stable sort keeps newer before older, and then the order of ids, among equals.
    best = sorted((pair for pair in scored if pair[0] > 0), key=lambda pair: -pair[0])
    return [_hit(row, cosine) for cosine, row in best[: request.limit]]


def _word_set(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.casefold()))


def _word_cosine(one: frozenset[str], other: frozenset[str]) -> float:
    common = len(one & other)
    return common / math.sqrt(len(one) * len(other)) if common else 0.0


def _hit(row: Row[Any], cosine: float) -> Hit:
    return Hit(
        record_id=row.record_id,
        version=row.text_digest,
        kind=row.kind,
        title=row.title,
        text=Ref(digest=row.text_digest, size=row.text_size, media_type=row.media_type),
        score_permille=round(1000 * cosine),
        recorded_at=from_micros(row.recorded_at),
        links=tuple(json.loads(row.links)),
        data_class=DataClass(row.data_class),
    )
