"""The event envelope and the ids of events."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import AwareDatetime, Field

from models.canonical import Digest, derived_id
from models.loop import Frozen, Subject


class EventType(StrEnum):
    """The words of the ledger."""

    REQUEST = "request"
    PROPOSAL = "proposal"
    PLAN = "plan"
    INTENT = "intent"
    DELIVERY = "delivery"
    NOTICE_FAILED = "notice_failed"
    """An alert: a channel did not take a notice, and somebody may not know that something waits."""
    REMINDER = "reminder"
    VERDICT = "verdict"
    REFUSAL = "refusal"
    REVIEW = "review"
    """What somebody else thinks of what was done by breaking the glass."""
    GATE = "gate"
    ROUTE = "route"
    FALLBACK = "fallback"
    ANSWER = "answer"
    """How sure a model was, where that is asked for."""
    SIMILAR = "similar"
    """A call was given what a similar one got."""
    CALIBRATION = "calibration"
    """What confidence was worth, by the verdicts so far."""
    APPLY = "apply"
    RECEIPT = "receipt"
    ABSENT = "absent"
    DRIFT = "drift"
    COMPENSATION = "compensation"
    IN_DOUBT = "in_doubt"
    OUTCOME = "outcome"
    BELIEF = "belief"
    ERASURE_ORDER = "erasure_order"
    """A person wants a subject erased; it names what goes, and stands before anything is gone."""
    ERASURE = "erasure"
    """The receipt: what was erased on an order, and that nothing was found afterwards."""
    KEY_ROTATED = "key.rotated"
    """A key was replaced or revoked: of the ledger, of the vault, or a person's."""
    POLICY_CHANGED = "policy.changed"
    """What an agent may do without a person was changed, on the intent that it names."""
    POLICY_NARROWED = "policy.narrowed"
    """A class of actions lost what such a change had allowed it, because one was undone."""
    CANCEL = "cancel"
    """Somebody asked for a run to be stopped; what came of it is its outcome."""


class Draft(Frozen):
    """An event someone wishes to append; the store adds sequence and time."""

    event_id: str
    stream: str
    type: EventType
    actor_kind: str
    """person, agent, worker or system."""
    actor_ref: str
    correlation_id: str
    causation_id: str | None = None
    trace_id: str = ""
    span_id: str = ""
    body: dict[str, Any] = Field(default_factory=dict)
    """References and opaque ids only; no texts."""


class Event(Draft):
    """An event as it stands."""

    log_id: str
    seq: int
    version: int
    """Position in its stream, from 1."""
    recorded_at: AwareDatetime
    leaf_hash: Digest


class Entry(Frozen):
    """What a workflow needs of an event that stands in its stream."""

    version: int
    type: EventType
    body: dict[str, Any]
    recorded_at: AwareDatetime


class Append(Frozen):
    """Drafts for one stream, all or none, at the version after `expected`."""

    tenant: str
    stream: str
    expected: int = Field(ge=0)
    drafts: tuple[Draft, ...] = Field(min_length=1)
    comment: str = Field(default="", max_length=4000)
    """A person's words; kept as a blob, whose reference becomes `comment` in the last draft's body."""
    subject: Subject | None = None
    """Whom the comment is about."""
    keep: tuple[str, ...] = ()
    """Texts to store in the same commit, since the drafts refer to them."""


class Appended(Frozen):
    """Whether the drafts stand where they were meant to.

    `entries` is what stands from `expected` + 1 on, left out when the caller knows it already.
    """

    won: bool
    entries: tuple[Entry, ...] = ()


def event_id(tenant: str, workflow_id: str, chain: str, step: str, ordinal: int) -> str:
    """The id of the `ordinal`-th event of a step; `chain` is the first run id of a continue-as-new chain."""
    return derived_id("event", tenant, workflow_id, chain, step, ordinal)


def act_stream(workflow_id: str) -> str:
    """The stream in which the act worker records what it did for a run."""
    return f"{workflow_id}/act"


def cancel_stream(workflow_id: str) -> str:
    """The stream in which it is recorded who asked for a run to be stopped."""
    return f"{workflow_id}/cancel"


def calibration_stream(task: str) -> str:
    """The stream in which the calibrations of a task follow each other."""
    return f"calibration/{task}"


def route_stream(workflow_id: str) -> str:
    """The stream in which the routes of a run are recorded."""
    return f"{workflow_id}/route"


def policy_stream(agent: str) -> str:
    """The stream in which changes of an agent's policy follow each other."""
    return f"policy/{agent}"
