"""Erasing a subject: records, words, vectors, beliefs, caches, notices and texts; a second look; a receipt.

The order stands in the ledger before anything is gone, and names what goes. The receipt is a ledger event too
and is issued only when the second look found nothing; until then erasing again goes on where it stopped. What
the ledger itself holds are references and derived ids, which stay.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import ColumnElement, Connection, delete, func, or_, select, update

from activities.services import cache, keeping
from activities.services.beliefs import HEAD, SNAPSHOT
from activities.services.content import BLOB, vault_of
from activities.services.database import Database, to_micros
from activities.services.discreet import called_in, names_of
from activities.services.keeping import GIVEN, SUPPORT
from activities.services.ledger_export import CHUNK, payloads
from activities.services.ledger_store import EVENT, add_in, entries_in
from activities.services.regions import NAMES, home_behind
from activities.services.short_term import ShortTerm
from activities.services.vectors import EMBEDDING, MEMORY
from activities.services.words import compact_words
from models.canonical import derived_id, subject_id
from models.errors import MemoryUnavailable, UnknownName
from models.ledger import Draft, EventType
from models.memory import Erased
from models.tables import MergeProposal, table

MERGE = table(MergeProposal)
PART = 500


class Index(Protocol):
    """A vector index outside SQL."""

    async def delete(self, tenant: str, model: str, record_ids: Sequence[str]) -> None:
        """Remove records.

        Raises:
            MemoryUnavailable: it is away, or did not remove all of them.
        """
        ...

    async def held(self, tenant: str, model: str, record_ids: Sequence[str]) -> int:
        """How many of these it still holds."""
        ...


@dataclass(frozen=True, slots=True)
class _Found:
    """What there is about a subject."""

    ids: tuple[str, ...]
    digests: tuple[str, ...]
    """Texts of its records, and content that was stored as being about it."""
    models: tuple[str, ...]
    beliefs: int
    key: str | None
    """Its key, with encryption on."""


@dataclass(frozen=True, slots=True)
class _Named:
    """What of it the ledger speaks of."""

    payloads: tuple[str, ...]
    intents: tuple[str, ...]
    """Intents whose cards are about the subject; a notice goes by the intent's digest."""


class Erasure:
    """Erases subjects everywhere this process can reach."""

    def __init__(
        self,
        database: Database,
        clock: Callable[[], datetime],
        index: Index | None = None,
        cache: ShortTerm | None = None,
        notices: Path | None = None,
        patience: int = 30_000,
        destroy_key: Callable[[Connection, str, str, int], object] | None = None,
    ) -> None:
        """Take what else than SQL holds copies.

        Args:
            database: the truth.
            clock: stamps what is emptied, and the receipt.
            index: vectors outside SQL.
            cache: derived answers of this process.
            notices: the folder below which terminals' notices are written.
            patience: milliseconds to wait for whoever reads an old state of the file.
            destroy_key: destroys the key of tenant and subject in the erasing transaction, instead of the
                vault that seals this database's content.
        """
        self._destroy_key = destroy_key
        self._database = database
        self._clock = clock
        self._index = index
        self._cache = cache
        self._notices = notices
        self._patience = patience

    async def forget(self, tenant: str, subject: str, by: str) -> Erased:
        """Erase a subject; `by` is who asked for it.

        Raises:
            UnknownName: nothing is known about it.
            MemoryUnavailable: an index is away or something was left; nothing is lost by trying again.
        """
        if not subject:
            raise UnknownName("subject: give the subject that is to be forgotten")
        found = {one: await one.write(lambda link: _find(link, tenant, subject)) for one in self._places()}
        ordered = await self._database.read(lambda link: _ordered(link, tenant, subject))
        if ordered is None and not any(one.ids or one.beliefs or one.digests for one in found.values()):
            raise UnknownName(
                f"subject: nothing is known about {subject!r}; `countersign memory stats` counts"
            )
        texts = sorted({digest for one in found.values() for digest in one.digests}.union(ordered or ()))
        named = await self._database.read(lambda link: _in_ledger(link, tenant, texts))
        order = await self._order(tenant, subject, by, [one.key for one in found.values()], named)
        removed, left, shared = Counter[str](), Counter[str](), 0
        for place, one in found.items():
            stays = await self._empty(place, tenant, subject, one, removed)
            left.update(await self._left(place, tenant, subject, one, stays))
            shared += len(stays)
        removed["cached"] = self._cache.drop(tenant, subject) if self._cache else 0
        removed["notices"] = await asyncio.to_thread(self._tear_up, named.intents)
        left["notices"] = len(await asyncio.to_thread(self._papers, named.intents))
        left["cache"] = self._cache.holds(tenant, subject) if self._cache else 0
        if any(left.values()):
            raise MemoryUnavailable(f"erasure: something is left ({dict(left)}); erase again")
        body = {"order": order, "removed": dict(removed), "left": dict(left), "shared": shared}
        event = await self._log(tenant, subject, by, EventType.ERASURE, body)
        return Erased(
            subject_id=subject_id(tenant, subject),
            event_id=event,
            removed=dict(removed),
            left=dict(left),
            shared=shared,
        )

    def _places(self) -> list[Database]:
        """Where texts and records are: here, and in the region's database in a process of a region."""
        home = home_behind(self._database)
        return [self._database] if home is None else [self._database, home.database]

    async def _order(
        self, tenant: str, subject: str, by: str, keys: Sequence[str | None], named: _Named
    ) -> str:
        """Log what is going to be erased, before anything is; returns the event's id."""
        first, *others = [key for key in keys if key is not None] or [None]
        body: dict[str, Any] = {"payloads": [*named.payloads, *others]}
        body |= {} if first is None else {"key": first}
        return await self._log(tenant, subject, by, EventType.ERASURE_ORDER, body)

    async def _empty(
        self, place: Database, tenant: str, subject: str, found: _Found, removed: Counter[str]
    ) -> frozenset[str]:
        """Remove it all from one database, and vectors beside it; the texts that stay for others."""
        for model in found.models if self._index else ():
            await self._index_of().delete(tenant, model, found.ids)
        shared, answers = await place.write(lambda link: self._erase(link, tenant, subject, found))
        texts = len(found.digests) - len(shared)
        counts = {"records": len(found.ids), "beliefs": found.beliefs, "texts": texts, "answers": answers}
        removed.update(counts)
        return shared

    def _erase(
        self, link: Connection, tenant: str, subject: str, found: _Found
    ) -> tuple[frozenset[str], int]:
        now = self._clock()
        vault = vault_of(link)
        destroy = self._destroy_key or (vault.destroy if vault is not None else None)
        if destroy is not None:
            destroy(link, tenant, subject, to_micros(now))
        return _erase(link, tenant, subject, found, now)

    async def _left(
        self, place: Database, tenant: str, subject: str, found: _Found, shared: frozenset[str]
    ) -> dict[str, int]:
        scrubbed = await asyncio.to_thread(self._scrub, place)
        left = await place.read(lambda link: _look(link, tenant, subject, found, shared))
        left["write_ahead_log"] = 0 if scrubbed else 1
        for model in found.models if self._index else ():
            held = await self._index_of().held(tenant, model, found.ids)
            left["index"] = left.get("index", 0) + held
        return left

    async def _log(self, tenant: str, subject: str, by: str, kind: EventType, body: dict[str, Any]) -> str:
        now, about = self._clock(), subject_id(tenant, subject)
        stream = f"erasure/{about}"

        def add(link: Connection) -> str:
            # By its place in the stream, so that of two attempts at one time each has its own.
            place = len(entries_in(link, tenant, stream)) + 1
            draft = Draft(
                event_id=derived_id("event", tenant, stream, kind, place),
                stream=stream,
                type=kind,
                actor_kind="person",
                actor_ref=by,
                correlation_id=stream,
                causation_id=body.get("order"),
                body={"subject": about} | body,
            )
            add_in(link, tenant, draft, now)
            return draft.event_id

        return await self._database.write(add)

    def _index_of(self) -> Index:
        assert self._index is not None
        return self._index

    def _papers(self, intents: Sequence[str]) -> list[Path]:
        """Notices that terminals were given, and parts of such."""
        if self._notices is None or not intents:
            return []
        mine = set(intents)
        return [path for path in self._notices.glob("*/*") if path.name.partition(".")[0] in mine]

    def _tear_up(self, intents: Sequence[str]) -> int:
        papers = self._papers(intents)
        for path in papers:
            path.unlink(missing_ok=True)
        return len(papers)

    def _scrub(self, place: Database) -> bool:
        """Rewrite the file, so that deleted bytes stand neither in free pages nor in the write-ahead log.

        False: somebody reads an old state of it, for which SQLite keeps the log.

        Raises:
            MemoryUnavailable: there is no room for it.
        """
        if place.engine.dialect.name != "sqlite":
            return True
        raw = place.engine.raw_connection()
        cursor = raw.cursor()
        try:
            cursor.execute(f"PRAGMA busy_timeout = {self._patience}")
            cursor.execute("VACUUM")
            # Of the three numbers it answers with, the first says whether it was kept from doing all.
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return cursor.fetchall()[0][0] == 0
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                raise MemoryUnavailable(
                    "erasure: the database's disk has no room for a second copy of it; make room, erase again"
                ) from None
            return False
        finally:
            cursor.close()
            # The pool would give it out again with our patience.
            raw.invalidate()
            raw.close()


def _ordered(connection: Connection, tenant: str, subject: str) -> set[str] | None:
    """What orders without a receipt name; `None` if there is none.

    All that went may be gone already, but for the proof and for papers, which go by what they speak of.
    """
    entries = entries_in(connection, tenant, f"erasure/{subject_id(tenant, subject)}")
    open_ = list(takewhile(lambda one: one.type is EventType.ERASURE_ORDER, reversed(entries)))
    return {str(name) for one in open_ for name in one.body.get("payloads", ())} if open_ else None


def _find(connection: Connection, tenant: str, subject: str) -> _Found:
    # Rows that an earlier attempt emptied are known by the derived name, so that trying again ends it.
    about, key = subject_id(tenant, subject), _key(connection, tenant, subject)
    mine = (MEMORY.c.tenant == tenant, MEMORY.c.subject.in_(names_of(connection, tenant, subject)))
    rows = connection.execute(select(MEMORY.c.record_id, MEMORY.c.text_digest).where(*mine)).all()
    models = connection.execute(select(EMBEDDING.c.model).where(EMBEDDING.c.tenant == tenant).distinct())
    called = called_in(connection, tenant, subject)
    beliefs = select(func.count()).where(SNAPSHOT.c.tenant == tenant, SNAPSHOT.c.subject.in_(called))
    texts = connection.execute(select(BLOB.c.digest).where(BLOB.c.tenant == tenant, _its_own(about, key)))
    return _Found(
        ids=tuple(row.record_id for row in rows),
        digests=tuple(sorted({row.text_digest for row in rows if row.text_digest} | set(texts.scalars()))),
        models=tuple(models.scalars()),
        beliefs=int(connection.execute(beliefs).scalar_one()),
        key=key,
    )


def _its_own(about: str, key: str | None) -> ColumnElement[bool]:
    """Content that was stored as being about a subject, or is sealed by its key."""
    return BLOB.c.subject == about if key is None else or_(BLOB.c.subject == about, BLOB.c.sealed_by == key)


def _erase(
    connection: Connection, tenant: str, subject: str, found: _Found, now: datetime
) -> tuple[frozenset[str], int]:
    """Remove it all in one transaction; the texts that must stay for others, and how many answers went."""
    for record_id in found.ids:
        keeping.forget(connection, tenant, record_id, now)
    for ids in _parts(found.ids):
        emptied = update(MEMORY).where(MEMORY.c.tenant == tenant, MEMORY.c.record_id.in_(ids))
        connection.execute(emptied.values(subject=subject_id(tenant, subject)))
        connection.execute(delete(SUPPORT).where(SUPPORT.c.tenant == tenant, SUPPORT.c.record_id.in_(ids)))
        either = or_(MERGE.c.first.in_(ids), MERGE.c.second.in_(ids))
        connection.execute(delete(MERGE).where(MERGE.c.tenant == tenant, either))
    called = called_in(connection, tenant, subject)
    for of in (SNAPSHOT, HEAD):
        connection.execute(delete(of).where(of.c.tenant == tenant, of.c.subject.in_(called)))
    shared = frozenset(one for part in _parts(found.digests) for one in _still_used(connection, tenant, part))
    gone = [digest for digest in found.digests if digest not in shared]
    for part in _parts(gone):
        connection.execute(delete(BLOB).where(BLOB.c.tenant == tenant, BLOB.c.digest.in_(part)))
        connection.execute(delete(GIVEN).where(GIVEN.c.tenant == tenant, GIVEN.c.digest.in_(part)))
        connection.execute(delete(NAMES).where(NAMES.c.tenant == tenant, NAMES.c.digest.in_(part)))
    compact_words(connection)
    return shared, cache.drop_in(connection, tenant, [*gone, subject_id(tenant, subject)])


def _in_ledger(connection: Connection, tenant: str, digests: Sequence[str]) -> _Named:
    """Those that an event names. The name of another text would say in the ledger for ever what it was."""
    left, found, intents = set(digests), set[str](), set[str]()
    query = select(EVENT.c.type, EVENT.c.envelope).where(EVENT.c.log_id == tenant).order_by(EVENT.c.seq)
    for row in connection.execute(query.execution_options(yield_per=CHUNK)) if left else ():
        envelope = bytes(row.envelope)
        if mine := payloads(row.type, envelope) & left:
            found |= mine
            intents |= {json.loads(envelope)["body"]["digest"]} if row.type == EventType.INTENT else set()
    return _Named(tuple(sorted(found)), tuple(sorted(intents)))


def _key(connection: Connection, tenant: str, subject: str) -> str | None:
    vault = vault_of(connection)
    return None if vault is None else vault.key_id(connection, tenant, subject)


def _still_used(connection: Connection, tenant: str, digests: Sequence[str]) -> Sequence[str]:
    used = select(MEMORY.c.text_digest).where(MEMORY.c.tenant == tenant, MEMORY.c.text_digest.in_(digests))
    return connection.execute(used.distinct()).scalars().all()


def _look(
    connection: Connection, tenant: str, subject: str, found: _Found, shared: frozenset[str]
) -> dict[str, int]:
    """Count what is left, store by store."""
    gone = [digest for digest in found.digests if digest not in shared]
    full = (EMBEDDING.c.tenant == tenant, func.length(EMBEDDING.c.vector) > 0)
    questions: dict[str, Any] = {
        "memory": [(MEMORY.c.tenant == tenant, MEMORY.c.subject.in_({subject, found.key or subject}))],
        "vectors": [(*full, EMBEDDING.c.record_id.in_(ids)) for ids in _parts(found.ids)],
        "beliefs": [(SNAPSHOT.c.tenant == tenant, SNAPSHOT.c.subject.in_({subject, found.key or subject}))],
        "texts": [(BLOB.c.tenant == tenant, BLOB.c.digest.in_(part)) for part in _parts(gone)],
    }
    left = {
        name: sum(
            int(connection.execute(select(func.count()).where(*conditions)).scalar_one())
            for conditions in each
        )
        for name, each in questions.items()
    }
    return left | {"similar": cache.lying_in(connection, tenant, [*gone, subject_id(tenant, subject)])}


def _parts(values: Sequence[str]) -> list[Sequence[str]]:
    return [values[start : start + PART] for start in range(0, len(values), PART)]
