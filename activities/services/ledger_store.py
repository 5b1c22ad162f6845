"""The append-only log of each tenant: gapless, idempotent, and optimistic per stream.

A stream is written at a named version. Whoever comes first at a version wins; everybody else gets what stands
there. Functions ending in `_in` run inside a transaction that is under way, so that an event and what it
speaks of are one commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, func, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from activities.services.content import JSON, put_blob
from activities.services.database import Database, to_micros
from models.canonical import canonical, sha256
from models.errors import LedgerBroken
from models.ledger import Append, Appended, Draft, Entry, Event
from models.tables import EventRow, LogHead, table

EVENT = table(EventRow)
HEAD = table(LogHead)
LEAF_PREFIX = b"\x00"
"""RFC 9162 section 2.1.1: leaves and nodes hash under different prefixes."""


class LedgerStore:
    """Reads and writes of the ledger."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        """The clock gives `recorded_at`."""
        self._database = database
        self._clock = clock

    async def append(self, wish: Append) -> Appended:
        """Append at a version, or learn what stands there."""
        return await self._database.write(lambda connection: append_in(connection, wish, self._clock()))

    async def add(self, tenant: str, draft: Draft) -> None:
        """Append at the end of a stream, once per event id."""
        await self._database.write(lambda connection: add_in(connection, tenant, draft, self._clock()))

    async def of_run(self, tenant: str, workflow_id: str) -> tuple[Event, ...]:
        """Everything that happened in a run, in the order of the log."""
        wanted = (EVENT.c.log_id == tenant) & (EVENT.c.correlation_id == workflow_id)
        return await self._events(
            select(EVENT.c.envelope, EVENT.c.leaf_hash).where(wanted).order_by(EVENT.c.seq)
        )

    async def tail(self, tenant: str, limit: int, after: int = 0) -> tuple[Event, ...]:
        """The last `limit` events beyond position `after`, oldest first."""
        wanted = (EVENT.c.log_id == tenant) & (EVENT.c.seq > after)
        newest = (
            select(EVENT.c.envelope, EVENT.c.leaf_hash)
            .where(wanted)
            .order_by(EVENT.c.seq.desc())
            .limit(limit)
        )
        return (await self._events(newest))[::-1]

    async def _events(self, query: Any) -> tuple[Event, ...]:
        return await self._database.read(
            lambda connection: tuple(_read(row) for row in connection.execute(query))
        )


def append_in(connection: Connection, wish: Append, now: datetime) -> Appended:
    """Append all drafts after `expected`, or return what stands from there on.

    Raises:
        LedgerBroken: the stream is shorter than the writer knows it to be.
    """
    drafts = _with_texts(connection, wish)
    size = _lock(connection, wish.tenant)
    standing = entries_in(connection, wish.tenant, wish.stream, wish.expected)
    if standing:
        same = [_same(draft, entry) for draft, entry in zip(drafts, standing, strict=False)]
        won = len(standing) == len(drafts) and all(same)
        return _won(connection, wish) if won else Appended(won=False, entries=standing)
    last = _last_version(connection, wish.tenant, wish.stream)
    if last != wish.expected:
        raise LedgerBroken(
            f"stream {wish.stream} ends at version {last}, its writer saw {wish.expected}; events are "
            "missing, restore the database before going on"
        )
    for offset, draft in enumerate(drafts, start=1):
        _insert(connection, wish.tenant, draft, size + offset, wish.expected + offset, now)
    _grow(connection, wish.tenant, size + len(drafts))
    return _won(connection, wish)


def add_in(connection: Connection, tenant: str, draft: Draft, now: datetime) -> None:
    """Append at the end of the draft's stream; an event id that stands already is left as it is."""
    size = _lock(connection, tenant)
    known = select(EVENT.c.seq).where(EVENT.c.log_id == tenant, EVENT.c.event_id == draft.event_id)
    if connection.execute(known).first() is not None:
        return
    version = _last_version(connection, tenant, draft.stream) + 1
    _insert(connection, tenant, draft, size + 1, version, now)
    _grow(connection, tenant, size + 1)


def entries_in(connection: Connection, tenant: str, stream: str, after: int = 0) -> tuple[Entry, ...]:
    """The events of a stream beyond version `after`."""
    query = (
        select(EVENT.c.envelope, EVENT.c.leaf_hash)
        .where(EVENT.c.log_id == tenant, EVENT.c.stream == stream, EVENT.c.version > after)
        .order_by(EVENT.c.version)
    )
    return tuple(_entry(_read(row)) for row in connection.execute(query))


def _won(connection: Connection, wish: Append) -> Appended:
    # The caller knows what it wrote, except for where its comment went.
    entries = entries_in(connection, wish.tenant, wish.stream, wish.expected) if wish.comment else ()
    return Appended(won=True, entries=entries)


def _with_texts(connection: Connection, wish: Append) -> tuple[Draft, ...]:
    for text in wish.keep:
        put_blob(connection, wish.tenant, text.encode(), JSON)
    if not wish.comment:
        return wish.drafts
    ref = put_blob(connection, wish.tenant, wish.comment.encode(), "text/plain; charset=utf-8")
    *others, last = wish.drafts
    body = last.body | {"comment": ref.model_dump(mode="json")}
    return (*others, last.model_copy(update={"body": body}))


def _lock(connection: Connection, tenant: str) -> int:
    """Size of the log, with its head row held until the transaction ends."""
    query = select(HEAD.c.size).where(HEAD.c.log_id == tenant).with_for_update()
    size = connection.execute(query).scalar_one_or_none()
    if size is None:
        insert = sqlite_insert if connection.dialect.name == "sqlite" else pg_insert
        connection.execute(insert(HEAD).values(log_id=tenant, size=0).on_conflict_do_nothing())
        size = connection.execute(query).scalar_one()
    return size


def _grow(connection: Connection, tenant: str, size: int) -> None:
    connection.execute(update(HEAD).where(HEAD.c.log_id == tenant).values(size=size))


def _last_version(connection: Connection, tenant: str, stream: str) -> int:
    query = select(func.max(EVENT.c.version)).where(EVENT.c.log_id == tenant, EVENT.c.stream == stream)
    return connection.execute(query).scalar_one() or 0


def _insert(connection: Connection, tenant: str, draft: Draft, seq: int, version: int, now: datetime) -> None:
    plain = draft.model_dump(mode="json")
    plain |= {"log_id": tenant, "seq": seq, "version": version, "recorded_at": now.isoformat()}
    envelope = canonical(plain)
    connection.execute(
        EVENT.insert().values(
            log_id=tenant,
            seq=seq,
            event_id=draft.event_id,
            stream=draft.stream,
            version=version,
            type=draft.type.value,
            correlation_id=draft.correlation_id,
            recorded_at=to_micros(now),
            envelope=envelope,
            leaf_hash=sha256(LEAF_PREFIX + envelope),
        )
    )


def _read(row: Row[Any, Any]) -> Event:
    if sha256(LEAF_PREFIX + row.envelope) != row.leaf_hash:
        raise LedgerBroken("an event does not hash to its leaf; stop all workers and restore the database")
    return Event.model_validate(json.loads(row.envelope) | {"leaf_hash": row.leaf_hash})


def _entry(event: Event) -> Entry:
    return Entry(version=event.version, type=event.type, body=event.body, recorded_at=event.recorded_at)


def _same(draft: Draft, entry: Entry) -> bool:
    return draft.type is entry.type and draft.body == entry.body
