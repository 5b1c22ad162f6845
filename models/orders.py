"""What activities are asked and what they answer, beyond the loop's own nouns. One input, one result each."""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, Field

from models.canonical import Digest
from models.gate import Answer, Kind
from models.inference import Call, Grant, Route
from models.ledger import Append, Entry
from models.loop import (
    Cost,
    Frozen,
    Intent,
    Name,
    Outcome,
    Plan,
    Proposal,
    Receipt,
    Ref,
    Request,
    Subject,
)
from models.memory import Memo
from models.policy import AgentPolicy

Span = Annotated[timedelta, Field(gt=timedelta(0))]


class Pace(Frozen):
    """How long steps may take; from settings, frozen in the history when the run is admitted."""

    attempt: Span = timedelta(seconds=30)
    """One attempt at an effect, after which it may no longer send."""
    heartbeat: Span = timedelta(seconds=10)
    """A worker that was silent for so long is taken for dead."""
    effect: Span = timedelta(hours=1)
    """All attempts at one effect."""
    answer: Span = timedelta(minutes=5)
    """One model call, all repairs included."""
    read: Span = timedelta(minutes=2)
    """Dry runs and recalls."""
    verify: Span = timedelta(minutes=5)
    """How long a reader's view of an effect is waited for."""


class Admission(Frozen):
    """A run asks whether it may start, or go on."""

    request: Request
    workflow_id: str
    chain: str


class Admitted(Frozen):
    """What a run starts from: its policy, and whatever its stream says already happened."""

    body: Ref
    policy: AgentPolicy
    policy_digest: Digest
    pace: Pace = Pace()
    people: bool = False
    """People are configured, so that every answer's giver is established first."""
    requester: str | None = None
    """Who asked for it first, as the stream says; a later start of the same request changes nothing."""
    entries: tuple[Entry, ...] = ()
    intent: Intent | None = None
    """The last intent of the stream, as it was bound."""
    proposal: Proposal | None = None
    """The last proposal of the stream."""
    card: str = ""
    earlier: Outcome | None = None
    """How another run with the same request key ended."""
    refusal: str = ""
    """Why this request cannot run: its key was used for another body."""


class Identification(Frozen):
    """An answer whose giver is to be established."""

    tenant: Name
    kind: Kind
    answer: Answer


class Presentation(Frozen):
    """What is to become an intent."""

    append: Append
    """Two drafts, plan and intent; the store fills their bodies."""
    request: Request
    number: int
    proposal: Proposal
    plans: tuple[Plan, ...]
    already_applied: tuple[int, ...] = ()
    policy: AgentPolicy
    policy_digest: Digest
    created_at: AwareDatetime
    nonce: str


class Presented(Frozen):
    """The intent that stands, and how to show it."""

    won: bool
    entries: tuple[Entry, ...] = ()
    """What stands if it is not this one."""
    digest: Digest | None = None
    intent: Intent | None = None
    card: str = ""


class Conclusion(Frozen):
    """The end of a run: its outcome, and what is worth remembering, in one commit."""

    append: Append
    request: Request
    outcome: Outcome
    memos: tuple[Memo, ...] = ()


class RouteOrder(Frozen):
    """One call that needs a model."""

    tenant: Name
    workflow_id: str
    event_id: str
    agent: Name
    call: Call


class Routed(Frozen):
    """Where the call may go: tiers in order, with the queue of each."""

    route: Route
    queues: tuple[str, ...]
    estimated: Cost = Cost()
    grant: Grant = Grant()


class Fell(Frozen):
    """A tier failed, or was not sure enough, and the next one is tried."""

    tenant: Name
    workflow_id: str
    event_id: str
    task: str
    tier: Name
    to: Name | None
    reason: str
    kind: str = ""
    """The type of the error; a hint to the router, which reads no texts."""
    reservation: str | None = None
    """The money held for the call; with no tier left it is settled."""


class PlanOrder(Frozen):
    """Actions to be tried dry; `numbers` are their positions in the proposal."""

    tenant: Name
    proposal: Proposal
    numbers: tuple[int, ...]
    subject: Subject | None = None


class Planned(Frozen):
    """The dry runs."""

    plans: tuple[Plan, ...]


class EffectOrder(Frozen):
    """One action of one intent; everything else is read from the ledger and the content store."""

    tenant: Name
    workflow_id: str
    digest: Digest
    action: int = Field(ge=0)


class Effected(StrEnum):
    """What became of an action."""

    APPLIED = "applied"
    DRIFTED = "drifted"
    """What the plan was made against has changed; nothing was done."""
    REFUSED = "refused"
    """The ledger does not allow it; nothing was done."""
    ABSENT = "absent"
    """It did not happen, and no attempt can make it happen any more."""
    IN_DOUBT = "in_doubt"
    UNDONE = "undone"


class Effect(Frozen):
    """The truth about an action, as far as it can be known."""

    what: Effected
    receipt: Receipt | None = None
    reason: str = ""
    rethink: bool = False
    """What the proposal rests on has changed, so that planning it again is not enough."""


class Reading(Frozen):
    """A request's body that is to be read."""

    tenant: Name
    body: Ref
    subject: Subject | None = None
