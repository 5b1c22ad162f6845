"""A log as a sequence of items, from the database or from an export, in which one line is one item.

Event lines carry the attribute names of CloudEvents; `data_base64` holds the bytes that the tree commits to.
An intent stands before the event that refers to it, a checkpoint right after the last event it covers. What
was erased is named too: a destroyed key right after the beginning, a payload before the event that names it.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, select

from activities.services.checkpoints import CHECKPOINT, tree_of
from activities.services.content import BLOB, peek_blob, unconfigured, vault_of
from activities.services.cosignatures import with_lines
from activities.services.cosigning import cosignatures
from activities.services.database import from_micros, to_micros
from activities.services.ledger_store import EVENT
from activities.services.regions import NAMES
from activities.services.row_types import misfits
from activities.services.vault import KEY, Sealed
from models.canonical import sha256
from models.errors import InvalidInput, LedgerBroken
from models.ledger import Event, EventType

FORMAT = "countersign-ledger/1"
CHUNK = 4096
PART = 50
"""Payloads that are read at once; each may have megabytes."""
REF = {"digest", "size", "media_type"}
"""The fields of a reference to content."""
BOUND = ("digest", "card", "short_card")
"""What an intent's event names besides."""


@dataclass(frozen=True, slots=True)
class Header:
    """Whose log it is, and where it ends."""

    origin: str
    tenant: str
    size: int
    root: bytes


@dataclass(frozen=True, slots=True)
class IntentBytes:
    """The canonical bytes of an intent."""

    digest: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Leaf:
    """An event's bytes, with whatever was written beside them as it was found."""

    seq: int
    envelope: bytes
    beside: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Note:
    """A checkpoint, with the cosignatures that it has."""

    text: str


@dataclass(frozen=True, slots=True)
class Gone:
    """Something that is not to be had any more: a payload that an event names, or a key."""

    name: str
    """The payload's digest, or the key's id."""
    key: str | None = None
    """The key that a payload is sealed by, if it still stands there."""
    at: str | None = None
    """When a key was destroyed."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A line that is no item."""

    line: int
    why: str


Item = Header | IntentBytes | Leaf | Note | Gone | Unreadable


def of_database(link: Connection, tenant: str, origin: str) -> Iterator[Item]:
    """Everything of a log, as one transaction sees it."""
    _hold_still(link)
    for what in misfits(link, tenant):
        raise LedgerBroken(f"log {tenant}: {what}; nobody can read it: restore the database")
    yield _header(link, tenant, origin)
    yield from _destroyed(link, tenant)
    notes = _notes(link, tenant)
    for leaf, gone in _with_gone(link, tenant):
        yield from gone
        if leaf.beside["type"] == EventType.INTENT:
            yield from _intent(link, tenant, leaf)
        yield leaf
        yield from (Note(text) for text in notes.pop(leaf.seq, ()))
    # Checkpoints of what is not there are for the reader to judge.
    yield from (Note(text) for size in sorted(notes) for text in notes[size])


def to_lines(items: Iterable[Item]) -> Iterator[str]:
    """Items as lines of an export, without line ends."""
    tenant = ""
    for item in items:
        if isinstance(item, Header):
            tenant = item.tenant
        yield json.dumps(_plain(item, tenant), separators=(",", ":"), sort_keys=True)


def of_lines(lines: Iterable[str]) -> Iterator[Item]:
    """Items of an export; a line that is none becomes `Unreadable`."""
    tenant = ""
    for number, line in enumerate(lines, start=1):
        try:
            item = _item(json.loads(line))
            if isinstance(item, Header):
                tenant = item.tenant
            if json.dumps(_plain(item, tenant), separators=(",", ":"), sort_keys=True) != line.rstrip("\n"):
                raise ValueError("it is not written as an export writes it")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            yield Unreadable(number, f"{type(error).__name__}: {error}")
        else:
            yield item


def attributes(event: Event, tenant: str) -> dict[str, Any]:
    """What must stand beside an event's bytes."""
    return {
        "specversion": "1.0",
        "id": event.event_id,
        "source": f"countersign/{tenant}",
        "type": f"countersign.{event.type.value}",
        "subject": event.stream,
        "time": event.recorded_at.isoformat(),
        "datacontenttype": "application/json",
        "sequence": event.seq,
        "streamversion": event.version,
        "correlationid": event.correlation_id,
        "leafhash": event.leaf_hash,
    }


def columns(event: Event) -> dict[str, Any]:
    """What must stand in the other columns of an event's row."""
    return {
        "seq": event.seq,
        "event_id": event.event_id,
        "stream": event.stream,
        "version": event.version,
        "type": event.type.value,
        "correlation_id": event.correlation_id,
        "recorded_at": to_micros(event.recorded_at),
        "leaf_hash": event.leaf_hash,
    }


def _plain(item: Item, tenant: str) -> dict[str, Any]:
    match item:
        case Header():
            return {
                "format": FORMAT,
                "origin": item.origin,
                "tenant": item.tenant,
                "size": item.size,
                "root": b64encode(item.root).decode(),
            }
        case IntentBytes():
            return {"intent": item.digest, "data_base64": b64encode(item.data).decode()}
        case Leaf():
            beside = item.beside if "specversion" in item.beside else _named(item.beside, tenant)
            return beside | {"data_base64": b64encode(item.envelope).decode()}
        case Note():
            return {"checkpoint": item.text}
        case Gone():
            return {"gone": item.name, "key": item.key, "at": item.at}
        case Unreadable():
            raise InvalidInput.field("export", f"line {item.line}", "it cannot be written back")


def _named(row: dict[str, Any], tenant: str) -> dict[str, Any]:
    """A row's columns under the names of `attributes`, as they were found."""
    return {
        "specversion": "1.0",
        "id": row["event_id"],
        "source": f"countersign/{tenant}",
        "type": f"countersign.{row['type']}",
        "subject": row["stream"],
        "time": from_micros(row["recorded_at"]).isoformat(),
        "datacontenttype": "application/json",
        "sequence": row["seq"],
        "streamversion": row["version"],
        "correlationid": row["correlation_id"],
        "leafhash": row["leaf_hash"],
    }


def _item(plain: dict[str, Any]) -> Item:
    if "format" in plain:
        if plain["format"] != FORMAT:
            raise ValueError(f"the format is {plain['format']}, not {FORMAT}")
        root = b64decode(plain["root"], validate=True)
        return Header(_text(plain["origin"]), _text(plain["tenant"]), int(plain["size"]), root)
    if "intent" in plain:
        return IntentBytes(_text(plain["intent"]), b64decode(plain["data_base64"], validate=True))
    if "checkpoint" in plain:
        return Note(_text(plain["checkpoint"]))
    if "gone" in plain:
        if plain["at"] is not None and datetime.fromisoformat(plain["at"]).tzinfo is None:
            raise ValueError("a time says where it is meant")
        return Gone(_text(plain["gone"]), None if plain["key"] is None else _text(plain["key"]), plain["at"])
    envelope = b64decode(plain.pop("data_base64"), validate=True)
    return Leaf(int(plain["sequence"]), envelope, plain)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} stands where a text belongs")
    return value


def _hold_still(link: Connection) -> None:
    """See one state of the log from here on, whatever is appended meanwhile; SQLite does that by itself."""
    if link.dialect.name != "sqlite" and not link.in_transaction():
        link.execution_options(isolation_level="REPEATABLE READ")


def _header(link: Connection, tenant: str, origin: str) -> Header:
    try:
        tree = tree_of(link, tenant, origin)
    except LedgerBroken:
        # A head that makes no sense names no root; whoever checks finds that it differs.
        return Header(origin, tenant, 0, b"")
    return Header(origin, tenant, tree.size, tree.root)


def payloads(kind: str, envelope: bytes) -> frozenset[str]:
    """The content that an event names, which was stored in the commit that logged it."""
    if kind != EventType.INTENT and b'"media_type"' not in envelope:
        return frozenset()
    try:
        body = json.loads(envelope)["body"]
        named = [one["digest"] for one in body.values() if isinstance(one, dict) and set(one) == REF]
    except (ValueError, KeyError, TypeError, AttributeError):
        return frozenset()
    named += [body.get(name) for name in BOUND] if kind == EventType.INTENT else ()
    return frozenset(one for one in named if isinstance(one, str))


def _destroyed(link: Connection, tenant: str) -> Iterator[Gone]:
    mine = (KEY.c.tenant == tenant, KEY.c.destroyed_at.is_not(None))
    query = select(KEY.c.subject_key_id, KEY.c.destroyed_at).where(*mine).order_by(KEY.c.subject_key_id)
    for row in link.execute(query).all():
        yield Gone(row.subject_key_id, at=from_micros(row.destroyed_at).isoformat())


def _with_gone(link: Connection, tenant: str) -> Iterator[tuple[Leaf, Sequence[Gone]]]:
    """All events, each with what it names and is not to be had."""
    told = set[str]()
    for rows in _chunks(link, tenant):
        named = [payloads(leaf.beside["type"], leaf.envelope) for leaf in rows]
        gone = _gone(link, tenant, sorted(frozenset[str]().union(*named) - told))
        for leaf, names in zip(rows, named, strict=True):
            mine = sorted(name for name in names if name in gone and name not in told)
            told.update(mine)
            yield leaf, [gone[name] for name in mine]


def _gone(link: Connection, tenant: str, names: Sequence[str]) -> dict[str, Gone]:
    """Those of the payloads that are not there as they were stored, or sealed by a key that was destroyed."""
    there = dict[str, str | None]()
    vault = vault_of(link)
    reader = None if vault is None else vault.reader(link, tenant)
    destroyed = (KEY.c.tenant == BLOB.c.tenant) & (KEY.c.subject_key_id == BLOB.c.sealed_by)
    query = select(BLOB.c.digest, BLOB.c.data, BLOB.c.sealed_by, KEY.c.destroyed_at)
    query = query.outerjoin_from(BLOB, KEY, destroyed)
    for start in range(0, len(names), PART):
        part = names[start : start + PART]
        for row in link.execute(query.where(BLOB.c.tenant == tenant, BLOB.c.digest.in_(part))):
            if row.destroyed_at is not None:
                there[row.digest] = row.sealed_by
            elif _is_whole(row, reader):
                there[row.digest] = None
        # What only a region holds is for that region to judge.
        elsewhere = select(NAMES.c.digest).where(NAMES.c.tenant == tenant, NAMES.c.digest.in_(part))
        there |= dict.fromkeys(link.execute(elsewhere).scalars())
    return {name: Gone(name, there.get(name)) for name in names if there.get(name, "absent") is not None}


def _is_whole(row: Any, reader: Callable[[Sealed], bytes] | None) -> bool:
    """Whether a payload is what its name says, and opens.

    Raises:
        KeyMissing: it is sealed, and the key is not here, so that nobody can tell.
    """
    data = bytes(row.data)
    if row.sealed_by is None:
        return sha256(data) == row.digest
    if reader is None:
        raise unconfigured(row.sealed_by)
    try:
        return row.digest in (sha256(reader(Sealed(row.sealed_by, data))), sha256(data))
    except LedgerBroken:
        return False


def _chunks(link: Connection, tenant: str) -> Iterator[list[Leaf]]:
    """All rows in order; by what was seen last, so that no number in the database can lead astray."""
    query = select(EVENT).where(EVENT.c.log_id == tenant).order_by(EVENT.c.seq).limit(CHUNK)
    rows = link.execute(query).mappings().all()
    while rows:
        yield [_leaf(row) for row in rows]
        rows = link.execute(query.where(EVENT.c.seq > rows[-1]["seq"])).mappings().all()


def _leaf(row: RowMapping) -> Leaf:
    beside = {name: value for name, value in row.items() if name not in ("log_id", "envelope")}
    return Leaf(row["seq"], bytes(row["envelope"]), beside)


def _intent(link: Connection, tenant: str, leaf: Leaf) -> Iterator[IntentBytes]:
    try:
        digest = str(json.loads(leaf.envelope)["body"]["digest"])
    except (ValueError, KeyError, TypeError):
        return
    data = peek_blob(link, tenant, digest)
    if data is not None:
        yield IntentBytes(digest, data)


def _notes(link: Connection, tenant: str) -> dict[int, list[str]]:
    rows = link.execute(
        select(CHECKPOINT.c.size, CHECKPOINT.c.note)
        .where(CHECKPOINT.c.log_id == tenant)
        .order_by(CHECKPOINT.c.size)
    )
    cosigned = cosignatures(link, tenant)
    return {row.size: [with_lines(row.note, cosigned.get(row.size, ()))] for row in rows}
