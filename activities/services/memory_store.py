"""Long-lived memory: records in SQL, found again by meaning, by words, or by both.

A record can be kept in the transaction that logs the outcome it remembers; its vector comes from the outbox.
What counts (see `keeping`) is decided by SQL in every answer, whatever an index says.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol, cast

from sqlalchemy import Connection, Select, select

from activities.services import keeping
from activities.services.content import ContentStore, put_blob
from activities.services.database import Database, from_micros, insert_for, to_micros
from activities.services.discreet import opened_rows
from activities.services.indexing import Outbox, Pending, newest_position
from activities.services.keeping import keep
from activities.services.vectors import ALWAYS, MEMORY, Near, Vector, When, put_vectors, unit_vector
from activities.services.words import find_words
from activities.tiers.base import Embedder
from models.errors import InvalidInput, MemoryUnavailable, Unavailable
from models.inference import DataClass
from models.loop import Ref
from models.memory import (
    NEAR_DUPLICATE,
    Cause,
    Hit,
    Keeping,
    Kept,
    Memo,
    Origin,
    Recall,
    Recalled,
    Search,
    Standing,
)
from models.tables import NEVER, MergeProposal, table

__all__ = ["MemoryStore", "Vectors", "keep"]

Plain = dict[str, Any]
MERGE = table(MergeProposal)
QUERY_BYTES = 16 * 1024
EMBED_CHARACTERS = (2000, 500, 120)
"""How much of a text is embedded; the shorter ones serve when the model refuses it as too long."""
REFUSED_LIMIT = 100
WORD_SCAN = 5000
"""Word search looks at the titles of this many newest records."""
FUSION = 60
"""Reciprocal rank fusion: a record scores 1 / (this + its rank) in each list, as in the paper of 2009."""
FUSED_DEPTH, NEIGHBOURS = 50, 5
AWAY = "the embedding server is away; titles were searched by words"
NO_MODEL = "no embedding server is configured; titles were searched by words"
REFUSED = "the embedding model gave no usable vector for the query; titles were searched by words"
LAGGING = "some records have no vector yet and could not be searched"
INDEX_AWAY = "the vector index is away; titles were searched by words"
UNUSABLE = "a stored vector is none; titles were searched by words"


class Vectors(Protocol):
    """Search by meaning; a projection of SQL that may be rebuilt at any time."""

    @property
    def dimensions(self) -> int:
        """How many numbers a vector has."""
        ...

    async def nearest(
        self,
        tenant: str,
        model: str,
        query: Vector,
        kinds: Sequence[str],
        limit: int,
        when: When = ALWAYS,
    ) -> list[Near]:
        """The records that count with the highest cosine, best first.

        Raises:
            MemoryUnavailable: the index is away.
        """
        ...


class MemoryStore:
    """Records of all tenants."""

    def __init__(
        self,
        database: Database,
        content: ContentStore,
        embedder: Embedder | None,
        vectors: Vectors,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Without an embedder everything is kept and found by words only; the clock says what has expired."""
        self._database = database
        self._clock = clock
        self._content = content
        self._embedder = embedder
        self._vectors = vectors
        self._outbox = Outbox(embedder.model) if embedder else None
        self._refused: set[tuple[str, str]] = set()

    async def keep(self, memo: Memo, now: datetime, cause: Cause | None = None) -> bool:
        """Keep a record in a transaction of its own; False when it was known or is nothing new."""
        return (await self.take(memo, now, cause)).what is Kept.KEPT

    async def take(self, memo: Memo, now: datetime | None = None, cause: Cause | None = None) -> Keeping:
        """Keep a record, and say what became of it.

        Raises:
            InvalidInput: something about it breaks the contract; nothing was written.
        """
        moment, why = now or self._clock(), cause or Cause()
        return await self._database.write(lambda link: keeping.take(link, memo, moment, why))

    async def shown(self, tenant: str, run: str, texts: Iterable[str]) -> None:
        """Note texts that a run (empty: every run) is shown as prompts, so that it cannot learn them."""
        now, given = self._clock(), [text.encode() for text in texts]

        def note(link: Connection) -> None:
            refs = [put_blob(link, tenant, text, "text/plain; charset=utf-8") for text in given]
            keeping.shown(link, tenant, run, [ref.digest for ref in refs], now)

        await self._database.write(note)

    async def promote(self, tenant: str, record_id: str, event: str) -> Standing:
        """A person agrees, as the ledger event says.

        Raises:
            UnknownName: there is no such record.
        """
        now = self._clock()
        return await self._database.write(lambda link: keeping.promote(link, tenant, record_id, event, now))

    async def quarantine(self, tenant: str, record_id: str) -> Standing:
        """Take a record out of sight.

        Raises:
            UnknownName: there is no such record.
        """
        return await self._database.write(lambda link: keeping.quarantine(link, tenant, record_id))

    async def supersede(self, tenant: str, old: str, new: str) -> Standing:
        """Let one record take another's place from now on.

        Raises:
            UnknownName: one of them is not there.
        """
        now = self._clock()
        return await self._database.write(lambda link: keeping.supersede(link, tenant, old, new, now))

    async def sweep(self, limit: int = 500) -> int:
        """Take expired records out of the indexes; how many, at most `limit`."""
        now = self._clock()
        return await self._database.write(lambda link: keeping.sweep(link, now, limit))

    async def merges(self, tenant: str) -> tuple[tuple[str, str, int], ...]:
        """Near-duplicates that a person should look at: two ids and 1000 times their cosine."""
        m = MERGE.c
        wanted = select(m.first, m.second, m.cosine_permille).where(m.tenant == tenant).order_by(m.first)
        rows = await self._database.read(lambda link: link.execute(wanted).all())
        return tuple((row.first, row.second, row.cosine_permille) for row in rows)

    async def recall(self, request: Recall, text: str | None = None) -> Recalled:
        """Find records by meaning; by words, and saying so, when meaning cannot be asked.

        With `text` that is the query, stored or not.

        Raises:
            InvalidInput: the query is not stored, not UTF-8 or too long.
        """
        found = await self._found(request, await self._query(request, text))
        if request.run and found.hits:
            now, digests = self._clock(), [hit.text.digest for hit in found.hits]
            await self._database.write(
                lambda link: keeping.shown(link, request.tenant, request.run, digests, now)
            )
        return found.model_copy(update={"query_digest": request.query.digest})

    async def forget(self, tenant: str, record_id: str) -> bool:
        """Empty a record and its vectors for good; False when there is none. Its text blob is not touched."""
        now = self._clock()
        return await self._database.write(lambda link: keeping.forget(link, tenant, record_id, now))

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
            for tenant, record_id, vector in rows:
                await self._propose_merges(embedder.model, tenant, record_id, vector)
        return len(batch)

    async def _propose_merges(self, model: str, tenant: str, record_id: str, vector: Vector) -> None:
        """Ask people about records of the same scope that say nearly the same."""
        now = to_micros(self._clock())
        try:
            near = await self._vectors.nearest(tenant, model, vector, (), NEIGHBOURS, When(now=now))
        except (MemoryUnavailable, InvalidInput):
            return
        close = {
            one.record_id: round(1000 * one.cosine)
            for one in near
            if one.cosine >= NEAR_DUPLICATE and one.record_id != record_id
        }
        if close:
            await self._database.write(lambda link: _merge(link, tenant, record_id, close, now))

    async def _query(self, request: Recall, text: str | None) -> str:
        data = text.encode() if text else await self._content.get(request.tenant, request.query)
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

    async def _found(self, request: Recall, query: str) -> Recalled:
        when = self._when(request)
        if request.by is Search.WORDS:
            hits = await self._database.read(lambda link: _by_text(link, request, query, when))
            return Recalled(hits=tuple(hits))
        vector, degraded = await self._embedded(query)
        if vector is not None:
            try:
                return await self._by_meaning(request, vector, query, when)
            except (MemoryUnavailable, InvalidInput) as error:
                degraded = INDEX_AWAY if isinstance(error, MemoryUnavailable) else UNUSABLE
        if request.by is Search.HYBRID:
            hits = await self._database.read(lambda link: _by_text(link, request, query, when))
        else:
            hits = await self._database.read(lambda link: _by_words(link, request, query, when))
        return Recalled(hits=tuple(hits), degraded=degraded)

    def _when(self, request: Recall) -> When:
        now = to_micros(self._clock())
        return When(now, now if request.as_of is None else to_micros(request.as_of), request.agent)

    async def _by_meaning(self, request: Recall, vector: Vector, query: str, when: When) -> Recalled:
        # A record forgotten between search and look-up leaves a gap; the next search knows about it.
        hits, whole, waits = await self._look(request, vector, query, when)
        if not whole:
            hits, _, waits = await self._look(request, vector, query, when)
        return Recalled(hits=tuple(hits), degraded=LAGGING if waits else "")

    async def _look(
        self, request: Recall, vector: Vector, query: str, when: When
    ) -> tuple[list[Hit], bool, bool]:
        embedder, outbox = cast(Embedder, self._embedder), cast(Outbox, self._outbox)
        hybrid = request.by is Search.HYBRID
        depth = max(request.limit, FUSED_DEPTH) if hybrid else request.limit
        # The two need nothing of each other, and each mostly runs outside the interpreter.
        near, worded = await asyncio.gather(
            self._vectors.nearest(request.tenant, embedder.model, vector, request.kinds, depth, when),
            self._worded(request, query, when, depth) if hybrid else _nothing(),
        )
        cosines = {one.record_id: one.cosine for one in near}
        order = fused(list(cosines), worded)[: request.limit]

        def read(connection: Connection) -> tuple[Mapping[str, Plain], bool]:
            return _named(connection, request, when, order), outbox.waits(connection, request.tenant)

        found, waits = await self._database.read(read)
        asked = _word_set(query)
        hits = [
            _hit(found[one], cosines.get(one) or _word_cosine(asked, _word_set(found[one]["title"])))
            for one in order
            if one in found
        ]
        return hits, len(hits) == len(order), waits

    async def _worded(self, request: Recall, query: str, when: When, depth: int) -> list[str]:
        conditions = _conditions(request, when)
        return await self._database.read(
            lambda link: find_words(link, query, conditions, depth, request.tenant)
        )

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


async def _nothing() -> list[str]:
    return []


async def _embed(embedder: Embedder, texts: list[str]) -> list[list[float]]:
    vectors = await embedder.embed(texts)
    if len(vectors) != len(texts):
        raise MemoryUnavailable(
            f"{embedder.model} gave {len(vectors)} vectors for {len(texts)} texts; check the embedding server"
        )
    return vectors


def fused(*lists: Sequence[str]) -> list[str]:
    """One order from several, by reciprocal ranks; equal ones as the first list has them."""
    scores: dict[str, float] = {}
    for ranked in lists:
        for rank, record_id in enumerate(ranked, 1):
            scores[record_id] = scores.get(record_id, 0.0) + 1 / (FUSION + rank)
    return sorted(scores, key=lambda record_id: -scores[record_id])


def _conditions(request: Recall, when: When) -> list[Any]:
    """What SQL says about who counts; the same that the vectors' view says."""
    m = MEMORY.c
    conditions = [
        m.tenant == request.tenant,
        m.forgotten_at.is_(None),
        m.expires_at > when.now,
        m.active_at <= when.at,
        m.valid_from <= when.at,
        m.valid_to > when.at,
    ]
    if request.kinds:
        conditions.append(m.kind.in_(request.kinds))
    if request.agent is not None:
        conditions.append(m.agent.in_(("", request.agent)))
    return conditions


def _counting(request: Recall, when: When) -> Select[Any]:
    return select(MEMORY).where(*_conditions(request, when))


def _named(connection: Connection, request: Recall, when: When, ids: Sequence[str]) -> dict[str, Plain]:
    rows = opened_rows(
        connection, request.tenant, _counting(request, when).where(MEMORY.c.record_id.in_(ids))
    )
    return {row["record_id"]: row for row in rows}


def _by_text(connection: Connection, request: Recall, query: str, when: When) -> list[Hit]:
    """By the index of words over whole texts."""
    order = find_words(connection, query, _conditions(request, when), request.limit, request.tenant)
    found, asked = _named(connection, request, when, order), _word_set(query)
    return [_hit(found[one], _word_cosine(asked, _word_set(found[one]["title"]))) for one in order]


def _by_words(connection: Connection, request: Recall, query: str, when: When) -> list[Hit]:
    """Cosine of the sets of words in query and title, over the newest records; the same on every database."""
    asked = _word_set(query)
    order = (MEMORY.c.recorded_at.desc(), MEMORY.c.record_id)
    newest = _counting(request, when).order_by(*order).limit(WORD_SCAN)
    rows = opened_rows(connection, request.tenant, newest)
    scored = ((_word_cosine(asked, _word_set(row["title"])), row) for row in rows)
    # A stable sort keeps newer before older, and then the order of ids, among equals.
    best = sorted((pair for pair in scored if pair[0] > 0), key=lambda pair: -pair[0])
    return [_hit(row, cosine) for cosine, row in best[: request.limit]]


def _merge(connection: Connection, tenant: str, record_id: str, close: Mapping[str, int], now: int) -> None:
    mine = select(MEMORY.c.agent, MEMORY.c.subject).where(MEMORY.c.tenant == tenant)
    scope = connection.execute(mine.where(MEMORY.c.record_id == record_id)).one()
    same = select(MEMORY.c.record_id).where(
        MEMORY.c.tenant == tenant,
        MEMORY.c.agent == scope.agent,
        MEMORY.c.subject == scope.subject,
        MEMORY.c.record_id.in_(list(close)),
    )
    kind = insert_for(connection.dialect.name)
    for other in connection.execute(same).scalars().all():
        first, second = sorted((record_id, other))
        values = dict(
            tenant=tenant, first=first, second=second, proposed_at=now, cosine_permille=close[other]
        )
        connection.execute(kind(MERGE).values(**values).on_conflict_do_nothing())


def _word_set(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.casefold()))


def _word_cosine(one: frozenset[str], other: frozenset[str]) -> float:
    common = len(one & other)
    return common / math.sqrt(len(one) * len(other)) if common else 0.0


def _hit(row: Plain, cosine: float) -> Hit:
    return Hit(
        record_id=row["record_id"],
        version=row["text_digest"],
        kind=row["kind"],
        title=row["title"],
        text=Ref(digest=row["text_digest"], size=row["text_size"], media_type=row["media_type"]),
        score_permille=round(1000 * cosine),
        recorded_at=from_micros(row["recorded_at"]),
        links=tuple(json.loads(row["links"])),
        data_class=DataClass(row["data_class"]),
        origin=Origin(row["origin"]),
        expires_at=None if row["expires_at"] >= NEVER else from_micros(row["expires_at"]),
    )
