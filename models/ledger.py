"""The event envelope and the ids of events."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import AwareDatetime, Field

from models.canonical import Digest, derived_id
from models.loop import Frozen


class EventType(StrEnum):
    """The words of the ledger."""

    REQUEST = "request"
    PROPOSAL = "proposal"
    PLAN = "plan"
    INTENT = "intent"
    DELIVERY = "delivery"
    REMINDER = "reminder"
    VERDICT = "verdict"
    REFUSAL = "refusal"
    GATE = "gate"
    ROUTE = "route"
    FALLBACK = "fallback"
    APPLY = "apply"
    RECEIPT = "receipt"
    ABSENT = "absent"
    DRIFT = "drift"
    COMPENSATION = "compensation"
    IN_DOUBT = "in_doubt"
    OUTCOME = "outcome"


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


class Append(Frozen):
    """Drafts for one stream, all or none, at the version after `expected`."""

    tenant: str
    stream: str
    expected: int = Field(ge=0)
    drafts: tuple[Draft, ...] = Field(min_length=1)


class Appended(Frozen):
    """What stands from `expected` + 1 on; `won` says whether it is what was asked for."""

    events: tuple[Event, ...]
    won: bool


def event_id(tenant: str, workflow_id: str, chain: str, step: str, ordinal: int) -> str:
    """The id of the `ordinal`-th event of a step; `chain` is the first run id of a continue-as-new chain."""
    return derived_id("event", tenant, workflow_id, chain, step, ordinal)
