"""What stands behind one order to act: what it names, and what its key's standing means for it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import ValidationError

from activities.connectors.base import Applied, Connector, Work
from activities.services.reservations import Claimant, Hold, Turn
from models.errors import ConnectorUnavailable, InvalidInput
from models.loop import Guarantee, Intent, Plan, Receipt
from models.orders import Effect, Effected, EffectOrder

CLOCK_SKEW = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Job:
    """An order with everything it names read back from what was bound."""

    order: EffectOrder
    intent: Intent
    plan: Plan
    work: Work
    connector: Connector
    expected: str
    who: Claimant
    stale: str | None = None
    rethink: bool = False
    barred: str | None = None
    """Why nothing more may be sent, though an earlier attempt may have been."""
    hold: Hold | None = None


def intent_of(data: bytes, digest: str) -> Intent:
    """Read what a digest names.

    Raises:
        InvalidInput: it is no intent.
        ConnectorUnavailable: it says more than this version knows of. Nothing that people agreed to is left
            out, and nothing refused for good: a worker of the version that bound it may act.
    """
    try:
        return Intent.model_validate_json(data)
    except ValidationError as error:
        if all(one["type"] == "extra_forbidden" for one in error.errors(include_url=False)):
            raise ConnectorUnavailable(
                f"intent {digest[:12]}… is of a newer version; upgrade this worker",
                next_retry_delay=timedelta(seconds=1),
            ) from None
        raise InvalidInput.field("digest", digest, "it names something that is no intent") from None


def wait_for_clock(job: Job, now: datetime) -> None:
    """Two machines' clocks differ; what is due in a moment is not refused for good."""
    due = job.intent.proposal.not_before
    if due is not None and now < due <= now + CLOCK_SKEW:
        raise ConnectorUnavailable(
            f"action {job.who.key} is due at {due.isoformat()}", next_retry_delay=due - now
        )


def ended(job: Job) -> Effect | None:
    """What became of it, if nothing is left to be done or found out."""
    hold = held(job)
    match hold.turn:
        case Turn.DONE:
            return Effect(what=Effected.APPLIED, receipt=hold.receipt)
        case Turn.CLOSED:
            return Effect(what=Effected.ABSENT, reason="it was closed earlier")
        case Turn.DRIFTED:
            return Effect(what=Effected.DRIFTED, reason="the target had changed", rethink=job.rethink)
        case Turn.DOUBT:
            return Effect(what=Effected.IN_DOUBT, reason="it cannot be known whether it happened")
        case _:
            return None


def may_be_there(job: Job) -> bool:
    """Whether the target is asked for the key before anything is sent, or said of it.

    A database that took over from another, or was restored, may lack the latest reservations. A target that
    refuses a second use needs no question before it is sent to.
    """
    if job.hold is None:
        return job.who.guarantee is not Guarantee.BLIND
    first = job.hold.turn is Turn.SEND and job.who.guarantee is Guarantee.ASKED
    return first or job.hold.turn in (Turn.ASK, Turn.WAIT)


def held(job: Job) -> Hold:
    """The standing of its key, once that was looked at."""
    if job.hold is None:
        raise LookupError(f"action {job.who.key} holds no reservation")
    return job.hold


def too_early(until: datetime, now: datetime) -> ConnectorUnavailable:
    """What is said while a silence may still be broken."""
    return ConnectorUnavailable(
        f"an earlier attempt may still arrive until {until.isoformat()}; asking again after that",
        next_retry_delay=max(until - now, timedelta(milliseconds=50)),
    )


def wait_for_earlier(job: Job, now: datetime) -> None:
    """What refuses this attempt may still take the one before it, which is not over."""
    hold = held(job)
    if hold.earlier is not None and now <= hold.earlier:
        # By then this one is over as well, so that the next one need not wait for it.
        raise too_early(hold.until, now)


def applied_of(receipt: Receipt) -> Applied:
    """What the target said, from what was kept of it."""
    return Applied(receipt.reference, receipt.version, receipt.links, receipt.detail)


def receipt_of(job: Job, applied: Applied, verified: bool) -> Receipt:
    """What is kept of what the target said."""
    return Receipt(
        action_key=job.who.key,
        action=job.order.action,
        reference=applied.reference,
        version=applied.version,
        links=applied.links,
        detail=applied.detail[:300],
        verified=verified,
    )
