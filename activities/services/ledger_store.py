"""The append-only log of each tenant: gapless, idempotent, and optimistic per stream.

A stream is written at a named version. Whoever comes first at a version wins; everybody else gets what stands
there. Functions ending in `_in` run inside a transaction that is under way, so that an event and what it
speaks of are one commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, update

from activities.services.content import JSON, put_blob
from activities.services.database import Database, insert_for, to_micros
from activities.services.merkle import extend, leaf_hash, pack, unpack
from activities.services.statements import Statement
from models.canonical import canonical
from models.errors import LedgerBroken
from models.ledger import Append, Appended, Draft, Entry, Event
from models.tables import EventRow, LogHead, MerkleNode, table

EVENT = table(EventRow)
HEAD = table(LogHead)
NODE = table(MerkleNode)

_LOG, _STREAM, _AFTER = bindparam("log"), bindparam("stream"), bindparam("after")
_IN_STREAM = (EVENT.c.log_id == _LOG) & (EVENT.c.stream == _STREAM)
_ENTRIES = Statement(
    select(EVENT.c.version, EVENT.c.envelope, EVENT.c.leaf_hash)
    .where(_IN_STREAM, EVENT.c.version > _AFTER)
    .order_by(EVENT.c.version)
)
_LAST = Statement(select(func.max(EVENT.c.version)).where(_IN_STREAM))
_KNOWN = Statement(select(EVENT.c.seq).where(EVENT.c.log_id == _LOG, EVENT.c.event_id == bindparam("event")))
_HEAD = Statement(select(HEAD.c.size, HEAD.c.peaks).where(HEAD.c.log_id == _LOG).with_for_update())
_GROW = Statement(
    update(HEAD).where(HEAD.c.log_id == _LOG).values(size=bindparam("new_size"), peaks=bindparam("new_peaks"))
)
_ADD_EVENTS = Statement(EVENT.insert())
_ADD_NODES = Statement(NODE.insert())


@dataclass(frozen=True, slots=True)
class _Head:
    """The end of a log, held until the transaction ends."""

    tenant: str
    size: int
    peaks: list[bytes]


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
            lambda connection: tuple(_read(row.envelope, row.leaf_hash) for row in connection.execute(query))
        )


def append_in(connection: Connection, wish: Append, now: datetime) -> Appended:
    """Append all drafts after `expected`, or return what stands from there on.

    Raises:
        LedgerBroken: the stream is shorter than the writer knows it to be.
    """
    drafts = _with_texts(connection, wish)
    head = _lock(connection, wish.tenant)
    # From the last event the writer knows of, so that one look says both what stands and whether that does.
    known = {"log": wish.tenant, "stream": wish.stream, "after": wish.expected - 1}
    rows = _ENTRIES.rows(connection, known)
    last = wish.expected if rows and rows[0][0] == wish.expected else 0
    if standing := tuple(_entry(_read(*row[1:])) for row in rows if row[0] > wish.expected):
        same = [_same(draft, entry) for draft, entry in zip(drafts, standing, strict=False)]
        won = len(standing) == len(drafts) and all(same)
        return _won(connection, wish) if won else Appended(won=False, entries=standing)
    if last != wish.expected:
        last = _last_version(connection, wish.tenant, wish.stream)
        raise LedgerBroken(
            f"stream {wish.stream} ends at version {last}, its writer saw {wish.expected}; events are "
            "missing, restore the database before going on"
        )
    _insert(connection, head, drafts, wish.expected + 1, now)
    return _won(connection, wish)


def add_in(connection: Connection, tenant: str, draft: Draft, now: datetime) -> None:
    """Append at the end of the draft's stream; an event id that stands already is left as it is."""
    head = _lock(connection, tenant)
    if _KNOWN.rows(connection, {"log": tenant, "event": draft.event_id}):
        return
    _insert(connection, head, (draft,), _last_version(connection, tenant, draft.stream) + 1, now)


def entries_in(connection: Connection, tenant: str, stream: str, after: int = 0) -> tuple[Entry, ...]:
    """The events of a stream beyond version `after`."""
    found = _ENTRIES.rows(connection, {"log": tenant, "stream": stream, "after": after})
    return tuple(_entry(_read(*row[1:])) for row in found)


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


def _lock(connection: Connection, tenant: str) -> _Head:
    """The head of the log, with its row held until the transaction ends."""
    rows = _HEAD.rows(connection, {"log": tenant})
    if not rows:
        insert = insert_for(connection.dialect.name)
        fresh = insert(HEAD).values(log_id=tenant, size=0, peaks=b"")
        connection.execute(fresh.on_conflict_do_nothing())
        rows = _HEAD.rows(connection, {"log": tenant})
    size, peaks = rows[0]
    try:
        return _Head(tenant, size, unpack(size, bytes(peaks)))
    except ValueError as error:
        raise LedgerBroken(f"the head of log {tenant}: {error}; restore the database") from None


def _last_version(connection: Connection, tenant: str, stream: str) -> int:
    return _LAST.rows(connection, {"log": tenant, "stream": stream})[0][0] or 0


def _insert(
    connection: Connection, head: _Head, drafts: Sequence[Draft], version: int, now: datetime
) -> None:
    """Write events, the subtrees they complete, and the new head."""
    rows = [_row(head, draft, place, version + place, now) for place, draft in enumerate(drafts)]
    leaves = [bytes.fromhex(row["leaf_hash"]) for row in rows]
    peaks, nodes = extend(head.size, head.peaks, leaves)
    _ADD_EVENTS.run_many(connection, rows)
    if nodes:
        _ADD_NODES.run_many(
            connection,
            [{"log_id": head.tenant, "level": n.level, "idx": n.index, "hash": n.hash} for n in nodes],
        )
    grown = {"log": head.tenant, "new_size": head.size + len(rows), "new_peaks": pack(peaks)}
    _GROW.run(connection, grown)


def _row(head: _Head, draft: Draft, place: int, version: int, now: datetime) -> dict[str, Any]:
    seq = head.size + place + 1
    plain = draft.model_dump(mode="json")
    plain |= {"log_id": head.tenant, "seq": seq, "version": version, "recorded_at": now.isoformat()}
    envelope = canonical(plain)
    return {
        "log_id": head.tenant,
        "seq": seq,
        "event_id": draft.event_id,
        "stream": draft.stream,
        "version": version,
        "type": draft.type.value,
        "correlation_id": draft.correlation_id,
        "recorded_at": to_micros(now),
        "envelope": envelope,
        "leaf_hash": leaf_hash(envelope).hex(),
    }


def _read(envelope: bytes, hashed: str) -> Event:
    if leaf_hash(envelope).hex() != hashed:
        raise LedgerBroken("an event does not hash to its leaf; stop all workers and restore the database")
    return Event.model_validate(json.loads(envelope) | {"leaf_hash": hashed})


def _entry(event: Event) -> Entry:
    return Entry(version=event.version, type=event.type, body=event.body, recorded_at=event.recorded_at)


def _same(draft: Draft, entry: Entry) -> bool:
    return draft.type is entry.type and draft.body == entry.body
