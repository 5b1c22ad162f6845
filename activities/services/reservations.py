"""One use per action key: reserve before anything is sent, confirm after, and know what a silence means.

Each step is one transaction that also holds the ledger event which says so. An attempt owns its reservation
until its deadline; a later attempt takes over with the next epoch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, select, update

from activities.services.database import from_micros, to_micros
from activities.services.ledger_store import add_in, hold_in
from activities.services.residence import withheld
from models.canonical import derived_id
from models.ledger import Draft, EventType, act_stream
from models.loop import Guarantee, Intent, Plan, Receipt, action_key
from models.tables import Effect, table

EFFECT = table(Effect)


class Held(StrEnum):
    """The states of a key."""

    RESERVED = "reserved"
    CONFIRMED = "confirmed"
    CLOSED = "closed"
    """It did not happen, and nobody may make it happen."""
    DRIFTED = "drifted"
    """The same, because what it was planned against had changed."""
    DOUBT = "doubt"


class Turn(StrEnum):
    """What an attempt may do."""

    SEND = "send"
    ASK = "ask"
    """Look the key up first; "absent" may be believed."""
    WAIT = "wait"
    """Look the key up, but "absent" may not be believed before `until`."""
    DONE = "done"
    CLOSED = "closed"
    DRIFTED = "drifted"
    DOUBT = "doubt"


@dataclass(frozen=True, slots=True)
class Hold:
    """An attempt's standing."""

    turn: Turn
    epoch: int
    deadline: datetime
    until: datetime
    receipt: Receipt | None = None
    earlier: datetime | None = None
    """Until then the attempt it was taken over from may still arrive."""


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who reserves what, and how its target behaves."""

    tenant: str
    workflow_id: str
    key: str
    digest: str
    action: int
    guarantee: Guarantee
    attempt: timedelta
    settle: timedelta
    event: EventType
    """APPLY or COMPENSATION."""


def reserve(link: Connection, who: Claimant, now: datetime) -> Hold:
    """Take the key, take it over from an attempt that is past, or learn that there is nothing to take."""
    row = _row(link, who)
    if row is None:
        return _take(link, who, now, epoch=1, turn=Turn.SEND)
    if row.state != Held.RESERVED:
        return _ended(row)
    if who.guarantee is Guarantee.BLIND:
        seen = Hold(Turn.DOUBT, row.epoch, from_micros(row.deadline), from_micros(row.settles))
        why = "an attempt ended without an answer and the target cannot be asked"
        close(link, who, now, Held.DOUBT, why, seen)
        return seen
    if who.guarantee is Guarantee.ASKED and to_micros(now) <= row.settles:
        return Hold(Turn.WAIT, row.epoch, from_micros(row.deadline), from_micros(row.settles))
    taken = _take(link, who, now, epoch=row.epoch + 1, turn=Turn.ASK)
    return replace(taken, earlier=from_micros(row.settles))


def look(link: Connection, who: Claimant, now: datetime) -> Hold | None:
    """The key's standing for someone who will not send: `None` when nobody ever tried."""
    row = _row(link, who)
    if row is None:
        return None
    if row.state != Held.RESERVED:
        return _ended(row)
    turn = Turn.ASK if to_micros(now) > row.settles else Turn.WAIT
    if who.guarantee is Guarantee.BLIND:
        turn = Turn.DOUBT
    return Hold(turn, row.epoch, from_micros(row.deadline), from_micros(row.settles))


def confirm(link: Connection, who: Claimant, receipt: Receipt, now: datetime) -> Receipt:
    """Record that it happened; the first receipt stands.

    A confirmation counts whatever the epoch: a target that refuses a second use of the key, or was asked for
    it, speaks of the one effect there is.
    """
    # Before the key's row, as everywhere: locked the other way round they may deadlock.
    hold_in(link, who.tenant)
    plain = receipt.model_dump(mode="json")
    row = _row(link, who)
    if row is None:
        # The database that it was reserved in is not this one any more, and yet it happened.
        _take(link, who, now, epoch=1, turn=Turn.ASK)
    elif row.state not in (Held.RESERVED, Held.DOUBT):
        if row.result is not None:
            return Receipt.model_validate_json(row.result)
        raise LookupError(f"action {who.key} was closed before its effect was confirmed")
    result = json.dumps(withheld(link, who.tenant, plain))
    link.execute(update(EFFECT).where(_is(who)).values(state=Held.CONFIRMED, result=result))
    _log(link, who, now, EventType.RECEIPT, who.event, plain)
    return receipt


def close(
    link: Connection, who: Claimant, now: datetime, state: Held, reason: str, seen: Hold | None = None
) -> bool:
    """End a key without an effect (or without knowing); false if it is not as it was `seen` any more.

    An attempt that took it over since may be sending: whoever looked before that knows nothing of it.
    """
    hold_in(link, who.tenant)
    row = _row(link, who)
    if row is None:
        _insert(link, who, now, epoch=0, state=state)
    elif row.state == Held.RESERVED:
        if row.epoch != (seen.epoch if seen is not None else 0):
            return False
        link.execute(update(EFFECT).where(_is(who)).values(state=state))
    else:
        return row.state == state
    kind = EventType.IN_DOUBT if state is Held.DOUBT else EventType.ABSENT
    _log(link, who, now, kind, kind, {"reason": reason})
    return True


def confirmed(link: Connection, tenant: str, keys: Sequence[str]) -> dict[str, Receipt]:
    """Receipts of those keys that were confirmed."""
    rows = link.execute(
        select(EFFECT.c.key, EFFECT.c.result).where(
            EFFECT.c.tenant == tenant, EFFECT.c.key.in_(keys), EFFECT.c.state == Held.CONFIRMED
        )
    )
    return {row.key: Receipt.model_validate_json(row.result) for row in rows}


def expected_version(link: Connection, intent: Intent, digest: str, plan: Plan) -> str:
    """The version to find: the plan's, unless an earlier action of this intent has moved the same target."""
    earlier = [p for p in intent.plans if p.action < plan.action and p.target == plan.target]
    keys = [action_key(digest, p.action) for p in earlier]
    done = confirmed(link, intent.tenant, keys) if keys else {}
    versions = [done[key].version for key in keys if key in done]
    return versions[-1] if versions else plan.target_version


def _take(link: Connection, who: Claimant, now: datetime, epoch: int, turn: Turn) -> Hold:
    if epoch == 1:
        _insert(link, who, now, epoch, Held.RESERVED)
    else:
        deadline = now + who.attempt
        link.execute(
            update(EFFECT)
            .where(_is(who))
            .values(epoch=epoch, deadline=to_micros(deadline), settles=to_micros(deadline + who.settle))
        )
    _log(link, who, now, who.event, str(epoch), {"attempt": epoch})
    deadline = now + who.attempt
    return Hold(turn, epoch, deadline, deadline + who.settle)


def _insert(link: Connection, who: Claimant, now: datetime, epoch: int, state: Held) -> None:
    deadline = now + who.attempt
    link.execute(
        EFFECT.insert().values(
            tenant=who.tenant,
            key=who.key,
            workflow_id=who.workflow_id,
            state=state,
            epoch=epoch,
            deadline=to_micros(deadline),
            settles=to_micros(deadline + who.settle),
        )
    )


def _ended(row: Row[Any]) -> Hold:
    turn = Turn.DONE if row.state == Held.CONFIRMED else Turn(row.state)
    receipt = Receipt.model_validate_json(row.result) if row.result else None
    return Hold(turn, row.epoch, from_micros(row.deadline), from_micros(row.settles), receipt)


def _row(link: Connection, who: Claimant) -> Row[Any] | None:
    return link.execute(select(EFFECT).where(_is(who)).with_for_update()).first()


def _is(who: Claimant) -> Any:
    return (EFFECT.c.tenant == who.tenant) & (EFFECT.c.key == who.key)


def _log(
    link: Connection, who: Claimant, now: datetime, kind: EventType, part: str, body: dict[str, Any]
) -> None:
    stream = act_stream(who.workflow_id)
    draft = Draft(
        event_id=derived_id("event", who.tenant, stream, kind, who.key, part),
        stream=stream,
        type=kind,
        actor_kind="worker",
        actor_ref="act",
        correlation_id=who.workflow_id,
        body={"key": who.key, "digest": who.digest, "action": who.action} | body,
    )
    add_in(link, who.tenant, draft, now)


Clock = Callable[[], datetime]
