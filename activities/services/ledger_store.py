"""The append-only log of each tenant: gapless, idempotent, and optimistic per stream.

A stream is written at a named version. Whoever comes first at a version wins; everybody else gets what stands
there. Functions ending in `_in` run inside a transaction that is under way, so that an event and what it
speaks of are one commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, bindparam, func, select, text, union_all, update

from activities.services.content import JSON, TEXT, put_blob
from activities.services.database import Database, Shared, insert_for, to_micros
from activities.services.envelopes import Written, write
from activities.services.merkle import extend, leaf_hash, pack, unpack
from activities.services.regions import home_of
from activities.services.residence import withheld_in
from activities.services.statements import Insertion, Statement
from models.errors import LedgerBroken
from models.ledger import Append, Appended, Draft, Entry, Event, EventType
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
# An aggregate over all the streams at once would read each of them from its beginning.
_LASTS = "SELECT value, (SELECT max(version) FROM event WHERE log_id = :log AND stream = value) FROM "
_LASTS_OF = {
    "sqlite": Statement(text(f"{_LASTS} json_each(:streams)")),
    "postgresql": Statement(text(f"{_LASTS} unnest(CAST(:streams AS varchar[])) AS value")),
}
_KNOWN = Statement(select(EVENT.c.seq).where(EVENT.c.log_id == _LOG, EVENT.c.event_id == bindparam("event")))
_HEAD = Statement(select(HEAD.c.size, HEAD.c.peaks).where(HEAD.c.log_id == _LOG).with_for_update())
_GROW = Statement(
    update(HEAD).where(HEAD.c.log_id == _LOG).values(size=bindparam("new_size"), peaks=bindparam("new_peaks"))
)
_ADD_EVENTS = Insertion(EVENT)
_ADD_NODES = Insertion(NODE)
_WON = Appended(won=True)
TAILS, LOGS = 4096, 64
"""Of so many streams in each of so many logs a process remembers where they end."""


@dataclass(frozen=True, slots=True)
class _Head:
    """The end of a log, held until the transaction ends."""

    tenant: str
    size: int
    packed: bytes
    """The peaks as they stand: no two logs that differ in anything have the same."""


class _Prepared(NamedTuple):
    """A wish, with its envelopes as far as they are known before it has its turn."""

    wish: Append
    stream: str
    expected: int
    written: list[Written] | None
    """Nothing if texts must be kept first, since the drafts name them."""


class Tails:
    """Where streams of a log end, as long as nobody else has appended to it.

    What is remembered holds for the peaks that it was learned at, and these name everything that stands: it
    is forgotten as soon as another process appended, or a transaction was undone.
    """

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._known = dict[str, tuple[bytes, dict[str, int]]]()

    def take(self, head: _Head) -> dict[str, int]:
        """The last versions that are known of this very log, forgotten unless they are kept again."""
        packed, versions = self._known.pop(head.tenant, (b"", {}))
        return versions if packed == head.packed else {}

    def keep(self, head: _Head, versions: dict[str, int]) -> None:
        """Remember them at this head."""
        if len(self._known) >= LOGS:
            self._known.clear()
        if len(versions) <= TAILS:
            self._known[head.tenant] = head.packed, versions


class LedgerStore:
    """Reads and writes of the ledger."""

    def __init__(
        self,
        database: Database,
        clock: Callable[[], datetime],
        heed: Callable[[Connection, Append, datetime], None] | None = None,
    ) -> None:
        """The clock gives `recorded_at`; `heed` is told of what was appended, in the same transaction."""
        self._database = database
        self._heed = heed
        self._clock = clock
        self._tails = Tails()

    async def append(self, wish: Append) -> Appended:
        """Append at a version, or learn what stands there."""
        return await self._database.write(Shared(self._append, _prepare(wish)))

    def _append(self, connection: Connection, wishes: Sequence[_Prepared]) -> list[Appended]:
        now = self._clock()
        answers = _append_all(connection, wishes, now, self._tails)
        if self._heed is not None:
            for one, answer in zip(wishes, answers, strict=True):
                if answer.won:
                    self._heed(connection, one.wish, now)
        return answers

    async def add(self, tenant: str, draft: Draft) -> None:
        """Append at the end of a stream, once per event id."""
        await self._database.write(lambda connection: add_in(connection, tenant, draft, self._clock()))

    async def has(self, tenant: str, stream: str, kind: EventType) -> bool:
        """Whether an event of a kind stands in a stream."""
        wanted = (EVENT.c.log_id == tenant) & (EVENT.c.stream == stream) & (EVENT.c.type == str(kind))
        query = select(EVENT.c.seq).where(wanted).limit(1)
        return await self._database.read(lambda connection: connection.execute(query).first() is not None)

    async def of_run(self, tenant: str, workflow_id: str) -> tuple[Event, ...]:
        """Everything that happened in a run, in the order of the log."""
        wanted = in_runs(tenant, [workflow_id])
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


def in_runs(tenant: str, names: Collection[str]) -> ColumnElement[bool]:
    """Which events belong to these runs. Those in a run's own stream are found by the stream.

    A list of places, since with an order asked for SQLite would rather read the whole log than sort a run.
    """
    one = EVENT.alias()
    own, place = one.c.correlation_id == one.c.stream, select(one.c.seq).where(one.c.log_id == tenant)
    by_stream = place.where(one.c.stream.in_(names), own)
    by_run = place.where(one.c.correlation_id.in_(names), ~own)
    return (EVENT.c.log_id == tenant) & EVENT.c.seq.in_(union_all(by_stream, by_run))


def hold_in(connection: Connection, tenant: str) -> None:
    """Let nobody else append to a log until this transaction ends: what is read of it now stays so."""
    _lock(connection, tenant)


def append_in(connection: Connection, wish: Append, now: datetime) -> Appended:
    """Append all drafts after `expected`, or return what stands from there on.

    Raises:
        LedgerBroken: the stream is shorter than the writer knows it to be.
    """
    return _append_all(connection, [_prepare(wish)], now, Tails())[0]


def add_in(connection: Connection, tenant: str, draft: Draft, now: datetime) -> None:
    """Append at the end of the draft's stream; an event id that stands already is left as it is."""
    add_all_in(connection, [(tenant, draft)], now)


def add_all_in(connection: Connection, drafts: Sequence[tuple[str, Draft]], now: datetime) -> None:
    """The same for several, each with its tenant, in this order."""
    # Everybody takes the heads of several logs in one order, so that nobody waits for each other.
    for tenant in sorted({tenant for tenant, _ in drafts}):
        _add_to(connection, tenant, [draft for of, draft in drafts if of == tenant], now)


def _add_to(connection: Connection, tenant: str, drafts: Sequence[Draft], now: datetime) -> None:
    head = _lock(connection, tenant)
    # Of drafts with one event id the first counts.
    own = {draft.event_id: draft for draft in reversed(drafts)}
    known = (name for name in own if _KNOWN.rows(connection, {"log": tenant, "event": name}))
    for name in tuple(known):
        del own[name]
    told = withheld_in(connection, tenant, tuple(reversed(own.values())))
    last = _last_versions(connection, tenant, {draft.stream for draft in told})
    rows = list[tuple[Written, int]]()
    for draft in told:
        last[draft.stream] += 1
        rows.append((write(tenant, draft), last[draft.stream]))
    _insert(connection, head, rows, now)


def entries_in(connection: Connection, tenant: str, stream: str, after: int = 0) -> tuple[Entry, ...]:
    """The events of a stream beyond version `after`."""
    found = _ENTRIES.rows(connection, {"log": tenant, "stream": stream, "after": after})
    return tuple(_entry(_read(*row[1:])) for row in found)


def _prepare(wish: Append) -> _Prepared:
    texts = wish.comment or wish.keep
    written = None if texts else [write(wish.tenant, draft) for draft in wish.drafts]
    return _Prepared(wish, wish.stream, wish.expected, written)


def _withheld(connection: Connection, wish: Append) -> _Prepared:
    drafts = withheld_in(connection, wish.tenant, wish.drafts)
    return _prepare(wish.model_copy(update={"drafts": drafts}))


def _append_all(
    connection: Connection, wishes: Sequence[_Prepared], now: datetime, tails: Tails
) -> list[Appended]:
    """Append each wish, in as few statements as there are tables."""
    if home_of(connection) is not None:
        wishes = [_withheld(connection, one.wish) for one in wishes]
    answers = dict[int, Appended]()
    # Everybody takes the heads of several logs in one order, so that nobody waits for each other.
    for tenant in sorted({one.wish.tenant for one in wishes}):
        own = {place: one for place, one in enumerate(wishes) if one.wish.tenant == tenant}
        told = _append_to(connection, _lock(connection, tenant), list(own.values()), now, tails)
        answers |= zip(own, told, strict=True)
    return [answers[place] for place in range(len(wishes))]


def _append_to(
    connection: Connection, head: _Head, wishes: Sequence[_Prepared], now: datetime, tails: Tails
) -> list[Appended]:
    last = tails.take(head)
    if unknown := {one.stream for one in wishes}.difference(last):
        last |= _last_versions(connection, head.tenant, unknown)
    won, rows = list[bool](), list[tuple[Written, int]]()
    for one in wishes:
        version = one.expected
        won.append(last[one.stream] == version)
        if not won[-1]:
            continue
        for written in one.written or _with_texts(connection, one.wish):
            version += 1
            rows.append((written, version))
        last[one.stream] = version
    tails.keep(_insert(connection, head, rows, now), last)
    return [
        _WON if first and one.written else _told(connection, one.wish, first)
        for first, one in zip(won, wishes, strict=True)
    ]


def _told(connection: Connection, wish: Append, won: bool) -> Appended:
    return _won(connection, wish) if won else _standing(connection, wish)


def _standing(connection: Connection, wish: Append) -> Appended:
    """What stands where the drafts were to go; they may have been written there before.

    Raises:
        LedgerBroken: the stream is shorter than the writer knows it to be.
    """
    entries = entries_in(connection, wish.tenant, wish.stream, wish.expected)
    if not entries:
        last = _last_version(connection, wish.tenant, wish.stream)
        raise LedgerBroken(
            f"stream {wish.stream} ends at version {last}, its writer saw {wish.expected}; events are "
            "missing, restore the database before going on"
        )
    drafts = [one.draft for one in _with_texts(connection, wish)]
    same = [_same(draft, entry) for draft, entry in zip(drafts, entries, strict=False)]
    if len(entries) == len(drafts) and all(same):
        return _won(connection, wish)
    return Appended(won=False, entries=entries)


def _won(connection: Connection, wish: Append) -> Appended:
    # The caller knows what it wrote, except for where its comment went.
    entries = entries_in(connection, wish.tenant, wish.stream, wish.expected) if wish.comment else ()
    return Appended(won=True, entries=entries)


def _with_texts(connection: Connection, wish: Append) -> list[Written]:
    """The drafts, once the texts that they refer to are kept."""
    for text_ in wish.keep:
        put_blob(connection, wish.tenant, text_.encode(), JSON)
    drafts = wish.drafts
    if wish.comment:
        ref = put_blob(connection, wish.tenant, wish.comment.encode(), TEXT, wish.subject)
        *others, last = wish.drafts
        body = last.body | {"comment": ref.model_dump(mode="json")}
        drafts = (*others, last.model_copy(update={"body": body}))
    return [write(wish.tenant, draft) for draft in drafts]


def _lock(connection: Connection, tenant: str) -> _Head:
    """The head of the log, with its row held until the transaction ends."""
    rows = _HEAD.rows(connection, {"log": tenant})
    if not rows:
        insert = insert_for(connection.dialect.name)
        fresh = insert(HEAD).values(log_id=tenant, size=0, peaks=b"")
        connection.execute(fresh.on_conflict_do_nothing())
        rows = _HEAD.rows(connection, {"log": tenant})
    size, peaks = rows[0]
    return _Head(tenant, size, bytes(peaks))


def _peaks(head: _Head) -> list[bytes]:
    try:
        return unpack(head.size, head.packed)
    except ValueError as error:
        raise LedgerBroken(f"the head of log {head.tenant}: {error}; restore the database") from None


def _last_version(connection: Connection, tenant: str, stream: str) -> int:
    return _LAST.rows(connection, {"log": tenant, "stream": stream})[0][0] or 0


def _last_versions(connection: Connection, tenant: str, streams: set[str]) -> dict[str, int]:
    dialect, names = connection.dialect.name, sorted(streams)
    given = json.dumps(names) if dialect == "sqlite" else names
    rows = _LASTS_OF[dialect].rows(connection, {"log": tenant, "streams": given})
    return {stream: version or 0 for stream, version in rows}


def _insert(
    connection: Connection, head: _Head, written: Sequence[tuple[Written, int]], now: datetime
) -> _Head:
    """Write events at their versions, the subtrees they complete, and the new head."""
    if not written:
        return head
    log, moment, micros, known = head.tenant, now.isoformat(), to_micros(now), _peaks(head)
    rows, leaves = list[tuple[Any, ...]](), list[bytes]()
    for seq, (one, version) in enumerate(written, head.size + 1):
        draft, envelope = one.draft, one.at(seq, version, moment)
        leaf = leaf_hash(envelope)
        leaves.append(leaf)
        # In the order of the table's columns.
        place = (log, seq, draft.event_id, draft.stream, version, str(draft.type), draft.correlation_id)
        rows.append((*place, micros, envelope, leaf.hex()))
    peaks, nodes = extend(head.size, known, leaves)
    grown = _Head(log, head.size + len(rows), pack(peaks))
    _ADD_EVENTS.run(connection, rows)
    _ADD_NODES.run(connection, [(log, *node) for node in nodes])
    _GROW.run(connection, {"log": log, "new_size": grown.size, "new_peaks": grown.packed})
    return grown


def _read(envelope: bytes, hashed: str) -> Event:
    if leaf_hash(envelope).hex() != hashed:
        raise LedgerBroken("an event does not hash to its leaf; stop all workers and restore the database")
    return Event.model_validate(json.loads(envelope) | {"leaf_hash": hashed})


def _entry(event: Event) -> Entry:
    return Entry(version=event.version, type=event.type, body=event.body, recorded_at=event.recorded_at)


def _same(draft: Draft, entry: Entry) -> bool:
    return draft.type is entry.type and draft.body == entry.body
