"""Long-lived memory: records in SQL, found again by meaning, by words, or by both.

A record can be kept in the transaction that logs the outcome it remembers; its vector comes from the outbox.
What counts (see `keeping`) is decided by SQL in every answer, whatever an index says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol, cast

from sqlalchemy import ColumnElement, Connection, select

from activities.services import keeping
from activities.services.content import ContentStore, put_blob
from activities.services.database import Database, insert_for, to_micros
from activities.services.finding import (
    Plain,
    by_text,
    by_words,
    conditions,
    fused,
    hit,
    named,
    word_cosine,
    word_set,
)
from activities.services.indexing import Outbox, Pending, newest_position, seen
from activities.services.keeping import keep
from activities.services.vectors import ALWAYS, MEMORY, Near, Vector, When, put_vectors, unit_vector
from activities.services.words import find_words
from activities.tiers.base import Embedder
from models.errors import InvalidInput, MemoryUnavailable, Unavailable
from models.inference import DataClass
from models.memory import (
    NEAR_DUPLICATE,
    Cause,
    Hit,
    Keeping,
    Kept,
    Memo,
    Recall,
    Recalled,
    Search,
    Standing,
)
from models.privacy import is_personal, raised
from models.tables import MergeProposal, table

__all__ = ["MemoryStore", "Vectors", "keep"]

MERGE = table(MergeProposal)
QUERY_BYTES = 16 * 1024
EMBED_CHARACTERS = (2000, 500, 120)
"""How much of a text is embedded; the shorter ones serve when the model refuses it as too long."""
REFUSED_LIMIT = 100
FUSED_DEPTH, NEIGHBOURS = 50, 5
UNSEEN = "the embedding server may not see the query; titles were searched by words"
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
        self._outbox = Outbox(embedder.model, embedder.sees) if embedder else None
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
        found = await self._database.read(lambda connection: outbox.pending(connection, limit, skip))
        batch = await self._shown_to(embedder, found)
        vectors = await self._embed_batch(embedder, batch)
        size = self._vectors.dimensions
        rows = [
            (p.tenant, p.record_id, unit_vector(v, size)) for p, v in zip(batch, vectors, strict=True) if v
        ]
        if rows:
            await self._database.write(lambda connection: put_vectors(connection, embedder.model, rows))
            for tenant, record_id, vector in rows:
                await self._propose_merges(embedder.model, tenant, record_id, vector)
        return len(found)

    async def _shown_to(self, embedder: Embedder, batch: list[Pending]) -> list[Pending]:
        """Those that it may see: personal data in a text are looked for before it is sent anywhere."""
        if DataClass.PERSONAL in embedder.sees:
            return batch
        held = [one for one in batch if is_personal([one.words])]
        if held:
            names = [(one.tenant, one.record_id) for one in held]
            await self._database.write(lambda link: keeping.personal(link, names))
        return [one for one in batch if one not in held]

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
        if raised(DataClass.INTERNAL, [query]) not in self._embedder.sees:
            return None, UNSEEN
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
            hits = await self._database.read(lambda link: by_text(link, request, query, when))
            return Recalled(hits=tuple(hits))
        vector, degraded = await self._embedded(query)
        if vector is not None:
            try:
                return await self._by_meaning(request, vector, query, when)
            except (MemoryUnavailable, InvalidInput) as error:
                degraded = INDEX_AWAY if isinstance(error, MemoryUnavailable) else UNUSABLE
        if request.by is Search.HYBRID:
            hits = await self._database.read(lambda link: by_text(link, request, query, when))
        else:
            hits = await self._database.read(lambda link: by_words(link, request, query, when))
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
        # What the embedding server may not see has no vector: words alone find it.
        only = () if hybrid else (~seen(embedder.sees),)
        words = hybrid or not embedder.sees.issuperset(DataClass)
        depth = max(request.limit, FUSED_DEPTH) if hybrid else request.limit
        # The two need nothing of each other, and each mostly runs outside the interpreter.
        near, worded = await asyncio.gather(
            self._vectors.nearest(request.tenant, embedder.model, vector, request.kinds, depth, when),
            self._worded(request, query, when, depth, only) if words else _nothing(),
        )
        cosines = {one.record_id: one.cosine for one in near}
        order = fused(list(cosines), worded)[: request.limit]

        def read(connection: Connection) -> tuple[Mapping[str, Plain], bool]:
            return named(connection, request, when, order), outbox.waits(connection, request.tenant)

        found, waits = await self._database.read(read)
        asked = word_set(query)
        hits = [
            hit(found[one], cosines.get(one) or word_cosine(asked, word_set(found[one]["title"])))
            for one in order
            if one in found
        ]
        return hits, len(hits) == len(order), waits

    async def _worded(
        self, request: Recall, query: str, when: When, depth: int, only: Sequence[ColumnElement[bool]]
    ) -> list[str]:
        wanted = [*conditions(request, when), *only]
        return await self._database.read(lambda link: find_words(link, query, wanted, depth, request.tenant))

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
