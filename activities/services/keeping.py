"""The memory contract in SQL: what is kept and refused, what confirms it, and when it stops to count.

Nothing here asks a model. A record starts as its origin allows, a second independent source or a person
promotes it, confirmation renews it and reading never does, and what an agent was shown is nothing new.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from difflib import SequenceMatcher
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from activities.services.content import get_blob
from activities.services.database import insert_for, to_micros
from activities.services.discreet import name_of, seal_text
from activities.services.ledger_store import EVENT, entries_in
from activities.services.vectors import MEMORY, empty_vectors, next_position, touch_vectors
from activities.services.words import drop_words, put_words
from models.canonical import sha256, subject_id
from models.errors import Final, InvalidInput, KeyDestroyed, UnknownName
from models.memory import (
    Cause,
    Keeping,
    Kept,
    Memo,
    Origin,
    Sort,
    Standing,
    expiry,
    first_standing,
    habits,
)
from models.tables import NEVER, GivenText, MemorySupport, table

SUPPORT = table(MemorySupport)
GIVEN = table(GivenText)
TEXT_BYTES = 256 * 1024
GIVEN_KEPT = timedelta(days=30)
GIVEN_TEXTS = 200
"""So many of the texts a run was shown are compared with what it wants to remember."""
COMPARED = 400
"""Words of a text that are compared; ten times as many of each that was shown."""
RESTATED = 0.8
"""Share of a text's words that stand, in order, in one text that the run was shown; then it restates it."""
FILLER = frozenset(
    ("a", "an", "and", "as", "is", "are", "was", "it", "its", "of", "that", "the", "this", "to", "user")
    + ("known", "note", "noted", "recall", "recalled", "remember", "remembered", "said", "says")
)
"""Words that introduce a repetition and add nothing to it."""
GROUNDED = 0.5
"""Share of a text's longer words that must stand in what it was inferred from."""
PERSON = "person"
LASTING = (Standing.EXPIRED, Standing.QUARANTINED)
"""Time changes nothing about these; what was quarantined stays so until a person promotes it."""


def keep(connection: Connection, memo: Memo, now: datetime, cause: Cause | None = None) -> bool:
    """Keep a record inside a transaction that is under way; False when it was known or is nothing new.

    Raises:
        InvalidInput: its text is not stored, too long, or not of the size that the reference says.
    """
    return take(connection, memo, now, cause or Cause()).what is Kept.KEPT


def take(connection: Connection, memo: Memo, now: datetime, cause: Cause) -> Keeping:
    """Keep a record, let it confirm one that is there, or say why it is junk.

    Raises:
        InvalidInput: its text is not stored or too long, its event does not stand in the ledger, or it has
            expired already.
    """
    # The position comes first: it holds the lock that keeps another process from the same id.
    position = next_position(connection, MEMORY.c.position)
    row = connection.execute(select(MEMORY).where(*_mine(memo.tenant, memo.record_id))).first()
    event = memo.event or cause.event or memo.source
    if row is not None and (row.forgotten_at is not None or _told(connection, memo, event)):
        return Keeping(what=Kept.KNOWN, record_id=memo.record_id, standing=Standing(row.standing))
    if memo.event:
        _stands(connection, memo)
    text, sealed, reason = _readable(connection, memo)
    reason = reason or _junk(connection, memo, text, cause.run)
    if reason:
        return Keeping(what=Kept.JUNK, record_id=memo.record_id, reason=reason)
    basis = _basis(connection, memo, cause.run, event)
    _support_row(connection, memo.tenant, memo.record_id, event, basis, now)
    if row is not None and not _is_over(row, now):
        return _confirm(connection, memo, row, basis, now)
    if row is not None:
        # Whether it was swept already must not matter.
        _end(connection, row.tenant, row.record_id, row.position)
        connection.execute(delete(MEMORY).where(*_mine(memo.tenant, memo.record_id)))
    standing = first_standing(memo)
    connection.execute(insert(MEMORY).values(**_row(memo, event, standing, now) | sealed, position=position))
    put_words(connection, position, f"{memo.title}\n{text}", memo.tenant)
    return Keeping(what=Kept.KEPT, record_id=memo.record_id, standing=standing)


def shown(connection: Connection, tenant: str, run: str, digests: Iterable[str], now: datetime) -> None:
    """Note texts that a run (or with an empty name: every run) was shown, so that it cannot learn them."""
    kind = insert_for(connection.dialect.name)
    for digest in digests:
        values = dict(tenant=tenant, run=run, digest=digest, given_at=to_micros(now))
        connection.execute(kind(GIVEN).values(**values).on_conflict_do_nothing())


def promote(connection: Connection, tenant: str, record_id: str, event: str, now: datetime) -> Standing:
    """A person agrees: the record counts from now on, and is renewed.

    Raises:
        UnknownName: there is no such record, or it is not to be had any more.
    """
    row = _live(connection, tenant, record_id)
    _support_row(connection, tenant, record_id, event, PERSON, now)
    values: dict[str, Any] = dict(standing=Standing.ACTIVE, valid_to=NEVER, expires_at=_renewed(row, now))
    if row.standing != Standing.ACTIVE:
        values |= dict(active_at=to_micros(now))
    _change(connection, tenant, record_id, values)
    return Standing.ACTIVE


def supersede(connection: Connection, tenant: str, old: str, new: str, now: datetime) -> Standing:
    """Another record says it better from now on; the old one stays for questions about its time.

    Raises:
        UnknownName: one of them is not there.
        InvalidInput: the other one does not count, so that neither would be found any more.
    """
    _live(connection, tenant, old)
    if _live(connection, tenant, new).standing != Standing.ACTIVE or new == old:
        raise InvalidInput.field("new", new, "name another record, one that counts; promote it first")
    _change(connection, tenant, old, dict(standing=Standing.SUPERSEDED, valid_to=to_micros(now)))
    return Standing.SUPERSEDED


def quarantine(connection: Connection, tenant: str, record_id: str) -> Standing:
    """Take a record out of sight until a person promotes it.

    Raises:
        UnknownName: there is no such record.
    """
    _live(connection, tenant, record_id)
    _change(connection, tenant, record_id, dict(standing=Standing.QUARANTINED, active_at=NEVER))
    return Standing.QUARANTINED


def sweep(connection: Connection, now: datetime, limit: int = 500) -> int:
    """Take records that have expired out of the indexes; how many. No answer depends on it."""
    due = (
        select(MEMORY.c.tenant, MEMORY.c.record_id, MEMORY.c.position)
        .where(MEMORY.c.standing.not_in(LASTING), MEMORY.c.expires_at <= to_micros(now))
        .where(MEMORY.c.forgotten_at.is_(None))
        .order_by(MEMORY.c.position)
        .limit(limit)
    )
    rows = connection.execute(due).all()
    for row in rows:
        _end(connection, row.tenant, row.record_id, row.position)
    old = to_micros(now - GIVEN_KEPT)
    connection.execute(delete(GIVEN).where(GIVEN.c.given_at < old, GIVEN.c.run != ""))
    return len(rows)


def forget(connection: Connection, tenant: str, record_id: str, now: datetime) -> bool:
    """Empty a record, its words and its vectors for good; the row stays, so that no retry brings it back."""
    mine = (*_mine(tenant, record_id), MEMORY.c.forgotten_at.is_(None))
    row = connection.execute(select(MEMORY.c.position).where(*mine)).first()
    if row is None:
        return False
    blank = dict(title="", text_digest="", text_size=0, links="[]", why="", subject="", derived_from="[]")
    gone = dict(source="", active_at=NEVER, forgotten_at=to_micros(now))
    connection.execute(update(MEMORY).where(*mine).values(**blank, **gone))
    drop_words(connection, row.position)
    empty_vectors(connection, tenant, record_id)
    return True


def personal(connection: Connection, records: Iterable[tuple[str, str]]) -> None:
    """Note of records, each by tenant and id, that personal data were found in them."""
    for tenant, record_id in records:
        connection.execute(update(MEMORY).where(*_mine(tenant, record_id)).values(personal=True))


def _is_over(row: Row[Any], now: datetime) -> bool:
    over = row.standing not in LASTING and row.expires_at <= to_micros(now)
    return over or row.standing == Standing.EXPIRED


def _end(connection: Connection, tenant: str, record_id: str, position: int) -> None:
    values = dict(standing=Standing.EXPIRED, active_at=NEVER)
    connection.execute(update(MEMORY).where(*_mine(tenant, record_id)).values(**values))
    drop_words(connection, position)
    empty_vectors(connection, tenant, record_id)


def _mine(tenant: str, record_id: str) -> tuple[Any, Any]:
    return MEMORY.c.tenant == tenant, MEMORY.c.record_id == record_id


def _live(connection: Connection, tenant: str, record_id: str) -> Row[Any]:
    found = select(MEMORY).where(*_mine(tenant, record_id), MEMORY.c.forgotten_at.is_(None))
    row = connection.execute(found.where(MEMORY.c.standing != Standing.EXPIRED)).first()
    if row is None:
        raise UnknownName(f"record: {record_id!r} is not in memory; `countersign memory search` shows ids")
    return row


def _change(connection: Connection, tenant: str, record_id: str, values: dict[str, Any]) -> None:
    connection.execute(update(MEMORY).where(*_mine(tenant, record_id)).values(**values))
    touch_vectors(connection, tenant, record_id)


def _readable(connection: Connection, memo: Memo) -> tuple[str, dict[str, str], str]:
    """Its text, and its columns as they are to be stored; or that there is nothing left to remember.

    A run that ends after its subject was erased must end all the same.
    """
    try:
        return _text(connection, memo), _sealed(connection, memo), ""
    except (InvalidInput, KeyDestroyed):
        if not memo.subject or not entries_in(connection, memo.tenant, _erasure(memo)):
            raise
        return "", {}, "its subject was erased"


def _erasure(memo: Memo) -> str:
    return f"erasure/{subject_id(memo.tenant, memo.subject)}"


def _text(connection: Connection, memo: Memo) -> str:
    try:
        data = get_blob(connection, memo.tenant, memo.text.digest)
    except InvalidInput:
        raise InvalidInput.field(
            "text", memo.text.digest, "no such content is stored; store it first"
        ) from None
    if len(data) > TEXT_BYTES:
        raise InvalidInput.field("text", f"{len(data)} bytes", f"remember at most {TEXT_BYTES} bytes")
    if len(data) != memo.text.size:
        raise InvalidInput.field("text.size", memo.text.size, f"the stored text has {len(data)} bytes")
    return data.decode(errors="replace").replace("\0", " ")


def _stands(connection: Connection, memo: Memo) -> None:
    known = select(EVENT.c.seq).where(EVENT.c.log_id == memo.tenant, EVENT.c.event_id == memo.event)
    if connection.execute(known).first() is None:
        raise InvalidInput.field("event", memo.event, "no such event stands in the ledger; log it first")


def _row(memo: Memo, event: str, standing: Standing, now: datetime) -> dict[str, Any]:
    return dict(
        tenant=memo.tenant,
        record_id=memo.record_id,
        kind=memo.kind,
        text_digest=memo.text.digest,
        text_size=memo.text.size,
        media_type=memo.text.media_type,
        source=memo.source,
        data_class=memo.data_class.value,
        recorded_at=to_micros(now),
        agent=memo.agent or "",
        source_event=event,
        derived_from=json.dumps(memo.derived_from),
        origin=memo.origin.value,
        confidence_percent=memo.confidence_percent,
        standing=standing.value,
        active_at=to_micros(now) if standing is Standing.ACTIVE else NEVER,
        valid_from=0 if memo.valid_from is None else to_micros(memo.valid_from),
        valid_to=_or_never(memo.valid_to),
        expires_at=_or_never(expiry(memo, now)),
    )


def _sealed(connection: Connection, memo: Memo) -> dict[str, str]:
    """What says something about somebody in a record's own columns."""
    tenant, subject = memo.tenant, memo.subject
    return dict(
        title=seal_text(connection, tenant, memo.title, subject),
        links=seal_text(connection, tenant, json.dumps(memo.links), subject),
        why=seal_text(connection, tenant, memo.why, subject),
        subject=name_of(connection, tenant, subject),
    )


def _or_never(moment: datetime | None) -> int:
    return NEVER if moment is None else to_micros(moment)


# Confirmation.


def _told(connection: Connection, memo: Memo, event: str) -> bool:
    """Whether this very event told it before: a retry, which confirms nothing."""
    mine = (SUPPORT.c.tenant == memo.tenant, SUPPORT.c.record_id == memo.record_id)
    return (
        connection.execute(select(SUPPORT.c.basis).where(*mine, SUPPORT.c.event_id == event)).first()
        is not None
    )


def _basis(connection: Connection, memo: Memo, run: str, event: str) -> str:
    """What a source rests on, a line for each; two that have one in common are one source."""
    if memo.origin is Origin.HUMAN:
        return PERSON
    if not memo.grounds:
        return f"run:{run}" if run else f"event:{event}"
    digests = sorted(ref.digest for ref in memo.grounds)
    # What every run is shown grounds nothing; and how a text is laid out or punctuated makes no second one.
    new = set(digests) - set(_given(connection, memo.tenant, run))
    texts = {sha256(" ".join(_words(one)).encode()) for one in _texts(connection, memo.tenant, sorted(new))}
    # The last line is what earlier versions wrote instead of all.
    return "\n".join([*sorted(texts), sha256("\n".join(digests).encode())])


def _support_row(
    connection: Connection, tenant: str, record_id: str, event: str, basis: str, now: datetime
) -> None:
    kind = insert_for(connection.dialect.name)
    values = dict(tenant=tenant, record_id=record_id, event_id=event, basis=basis, seen_at=to_micros(now))
    connection.execute(kind(SUPPORT).values(**values).on_conflict_do_nothing())


def _confirm(connection: Connection, memo: Memo, row: Row[Any], basis: str, now: datetime) -> Keeping:
    """Another source says the same: renew it, and let it count once two independent ones agree."""
    standing = Standing(row.standing)
    values: dict[str, Any] = dict(expires_at=_renewed(row, now))
    if standing is Standing.PROPOSED and _established(connection, memo, basis):
        standing = Standing.ACTIVE
        values |= dict(standing=standing.value, active_at=to_micros(now))
    _change(connection, memo.tenant, memo.record_id, values)
    return Keeping(what=Kept.KNOWN, record_id=memo.record_id, standing=standing)


def _renewed(row: Row[Any], now: datetime) -> int:
    lifetime = habits(row.kind).lifetime
    return NEVER if lifetime is None else max(row.expires_at, to_micros(now + lifetime))


def _established(connection: Connection, memo: Memo, basis: str) -> bool:
    """Whether a person agreed, or a source that has nothing in common with this one."""
    mine = (SUPPORT.c.tenant == memo.tenant, SUPPORT.c.record_id == memo.record_id)
    bases = set(connection.execute(select(SUPPORT.c.basis).where(*mine)).scalars())
    rests_on = set(basis.splitlines())
    return PERSON in bases or any(rests_on.isdisjoint(one.splitlines()) for one in bases)


# Junk: what was shown, and what was made up.


def _junk(connection: Connection, memo: Memo, text: str, run: str) -> str:
    """Why there is nothing to learn from it; empty when there is."""
    happened = memo.origin is Origin.TOOL and habits(memo.kind).sort is Sort.EPISODE
    if memo.origin is Origin.HUMAN or happened:
        return ""
    given = _given(connection, memo.tenant, run)
    if memo.text.digest in given:
        return "it is a text that the run was shown"
    if memo.origin is Origin.TOOL:
        return ""
    return _restated(connection, memo, text, given) or _invented(connection, memo, text, given)


def _given(connection: Connection, tenant: str, run: str) -> tuple[str, ...]:
    mine = select(GIVEN.c.digest).where(GIVEN.c.tenant == tenant, GIVEN.c.run.in_(("", run)))
    return tuple(connection.execute(mine.order_by(GIVEN.c.given_at.desc()).limit(GIVEN_TEXTS)).scalars())


def _restated(connection: Connection, memo: Memo, text: str, given: Sequence[str]) -> str:
    mine = _telling(text)[:COMPARED]
    for one in _texts(connection, memo.tenant, given):
        if _contained(mine, _telling(one)[: 10 * COMPARED]) >= RESTATED:
            return "it restates what the run was shown"
    return ""


def _contained(mine: list[str], theirs: list[str]) -> float:
    """Share of my words that stand in the other text in the same order."""
    common = set(theirs)
    if not mine or sum(word in common for word in mine) / len(mine) < RESTATED:
        # The order can only take away from that.
        return float(not mine)
    blocks = SequenceMatcher(None, theirs, mine, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(mine)


def _invented(connection: Connection, memo: Memo, text: str, given: Sequence[str]) -> str:
    """Names and numbers that stand in no text it was inferred from; a model makes them up."""
    grounds = [ref.digest for ref in memo.grounds if ref.digest not in given]
    if not grounds:
        return "it names nothing new that it was inferred from"
    there = {word for one in _texts(connection, memo.tenant, grounds) for word in _words(one)}
    if any(name.lower() not in there for name in _names(text)):
        return "it holds a name or number that stands in no text it was inferred from"
    longer = {word for word in _words(text) if len(word) > 3}
    share = len(longer & there) / len(longer) if longer else 1.0
    return "" if share >= GROUNDED else "most of its words stand in no text it was inferred from"


def _texts(connection: Connection, tenant: str, digests: Iterable[str]) -> list[str]:
    texts: list[str] = []
    for digest in digests:
        # One that was erased since says nothing any more.
        with suppress(Final):
            texts.append(get_blob(connection, tenant, digest)[:TEXT_BYTES].decode(errors="replace"))
    return texts


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _telling(text: str) -> list[str]:
    return [word for word in _words(text) if word not in FILLER]


def _names(text: str) -> set[str]:
    """Words with a digit, and capitalised ones that do not begin a sentence."""
    inner = re.findall(r"(?<=[\w,;:] )[A-Z]\w+", text)
    return {*inner, *re.findall(r"\w*\d\w*", text)}
