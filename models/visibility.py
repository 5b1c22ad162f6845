"""Names other systems see: task queues, search attributes, memo keys, states of a run."""

from __future__ import annotations

from enum import StrEnum

NAMESPACE = "default"


class Queue(StrEnum):
    """One task queue per role; inference has one per tier, see `infer_queue`."""

    DECIDE = "decide"
    REMEMBER = "remember"
    ACT = "act"


class Role(StrEnum):
    """A worker process's job."""

    DECIDE = "decide"
    INFER = "infer"
    REMEMBER = "remember"
    ACT = "act"
    DESK = "desk"


class State(StrEnum):
    """Where a run stands, as the search attribute says it."""

    THINKING = "thinking"
    WAITING = "waiting"
    SCHEDULED = "scheduled"
    ACTING = "acting"
    REVIEWING = "reviewing"
    """It has ended, and others have yet to say whether breaking the glass was right."""
    DONE = "done"


class Attribute(StrEnum):
    """Typed search attributes, registered on start."""

    STATE = "CountersignState"
    AGENT = "CountersignAgent"
    TENANT = "CountersignTenant"
    RISK = "CountersignRisk"
    WAITING_SINCE = "CountersignWaitingSince"


MEMO_CARD = "card"
MEMO_DIGEST = "digest"
MEMO_ANSWER = "answer"
MEMO_BODY = "body"


def queue_of(queue: str, region: str | None = None) -> str:
    """A queue, or the same one of a region: a request bound to a region can only run there."""
    return str(queue) if region is None else f"{queue}-{region}"


def infer_queue(tier: str, region: str | None = None) -> str:
    """The queue of one tier, or of its part that serves one region."""
    return queue_of(f"infer-{tier}", region)
