"""The loop's nouns: Request, Action, Proposal, Plan, Intent, Receipt, Outcome. Texts travel as references."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from models.canonical import Digest, derived_id, sha256

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_.\-]{0,62}$")]
"""A tenant, agent, connector or operation."""
WEB = r"^https?://[^/\s]\S*$"
LOCAL = ("127.0.0.1", "localhost", "::1")
"""Hosts that are this machine."""

Amount = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,12}(\.[0-9]{1,8})?$")]
"""A decimal number as a string; its unit stands beside it."""
TOO_MUCH = Decimal(10**12)
"""No amount is as large; a sum that is counts as unknown."""

Currency = Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
"""ISO 4217, as EUR."""

Count = Annotated[int, Field(ge=0, le=10**15)]
"""A whole number that every JSON reader reads exactly."""


class Frozen(BaseModel):
    """Immutable, and strict about keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Subject = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]{1,200}$")]
"""What or whom something is about: a SKU, an address, a customer. Forgetting goes by it."""


class Guarantee(StrEnum):
    """What a target can promise about using an action key twice."""

    KEYED = "keyed"
    ASKED = "asked"
    BLIND = "blind"


class Reversibility(StrEnum):
    """How an applied action could be taken back."""

    READ_ONLY = "read_only"
    REVERSIBLE = "reversible"
    CORRECTABLE = "correctable"
    IRREVERSIBLE = "irreversible"


class Status(StrEnum):
    """How a loop ended."""

    EXECUTED = "executed"
    PARTLY_EXECUTED = "partly_executed"
    REJECTED = "rejected"
    EXPIRED = "expired"
    STALE = "stale"
    CANCELLED = "cancelled"
    FAILED = "failed"
    COMPENSATED = "compensated"
    COMPENSATION_FAILED = "compensation_failed"
    IN_DOUBT = "in_doubt"


class Ref(Frozen):
    """A blob in the content store, named by the SHA-256 of its bytes."""

    digest: Digest
    size: int = Field(ge=0)
    media_type: str = "text/plain; charset=utf-8"


class Request(Frozen):
    """What starts a loop."""

    tenant: Name = "default"
    agent: Name
    region: Name | None = None
    """Its texts are stored and fetched by the processes of that region only."""
    key: str = Field(min_length=1, max_length=200)
    """Unique per tenant; the workflow id derives from it."""
    key_from_workflow_id: bool = False
    """The key derives from the workflow id instead: a Temporal schedule repeats one fixed request, and only
    the id that it gives each run tells one time from the next."""
    body: Ref | Annotated[str, StringConstraints(min_length=1, max_length=65536)]
    """A stored blob, or the text itself, which then stands in Temporal's history."""
    subject: Subject | None = None
    """Whom or what it is about: its texts go when the subject is forgotten. Best an opaque id, such as a
    customer number, since it stands in Temporal's history."""
    requester: str | None = Field(default=None, max_length=200, pattern=r"^[^\s\x00-\x1f]+$")
    """Who wants it, where that is known; they may not approve it themselves unless policy says so."""


class Evidence(Frozen):
    """A record the proposal leans on, at the version that was read."""

    reference: str
    version: str


class Action(Frozen):
    """One operation on one connector, its exact arguments bound by reference."""

    connector: Name
    operation: Name
    arguments: Ref
    title: str = Field(max_length=200)


class Cost(Frozen):
    """Money and time, as far as known; `None` is unknown, never zero."""

    amount: Amount | None = None
    currency: str | None = None
    milliseconds: int | None = None
    tokens: int | None = None


class Proposal(Frozen):
    """What the agent wants."""

    agent: Name
    title: str = Field(max_length=200)
    actions: tuple[Action, ...] = Field(min_length=1, max_length=50)
    reasons: Ref | None = None
    evidence: tuple[Evidence, ...] = ()
    confidence_percent: int | None = Field(default=None, ge=0, le=100)
    estimated: Cost = Cost()
    concerns: tuple[str, ...] = ()
    """Checks that did not pass, in words for the approver."""
    not_before: AwareDatetime | None = None
    """Apply no earlier than this, however early it was approved."""


class Change(Frozen):
    """A number that an action moves, as the dry run read it: from what stands there to what is asked."""

    what: str = Field(min_length=1, max_length=120)
    old: Count
    new: Count
    currency: Currency | None = None
    """Of an amount in its smallest unit, as cents; without it a plain number, as pieces in stock."""


class Limits(Frozen):
    """How far numbers may be moved; a plan that says nothing of numbers lies within no limit."""

    at_most_permille: int | None = Field(default=None, ge=0, le=1_000_000)
    """Of what stood there, up or down, for each change; from nothing to something is beyond all of them."""
    at_most_minor: Count | None = None
    """Up or down, in the smallest unit of the currency, all changes of the intent together."""
    currency: Currency | None = None

    @model_validator(mode="after")
    def _minor_with_currency(self) -> Self:
        if (self.at_most_minor is None) != (self.currency is None):
            raise ValueError("at_most_minor and currency stand together; set both, or neither")
        return self


class Plan(Frozen):
    """A connector's dry run of one action; made without side effects."""

    action: int
    connector: Name
    operation: Name
    target: str = Field(max_length=300)
    target_version: str = Field(max_length=200)
    """Covers only what the action reads or overwrites."""
    diff: Ref
    reversibility: Reversibility
    guarantee: Guarantee
    undo: str = Field(max_length=300)
    cost: Cost = Cost()
    changes: tuple[Change, ...] = Field(default=(), max_length=200)
    """The numbers it moves, each of them, or none where the connector cannot say."""


class Assurance(StrEnum):
    """How surely we know who answered, weakest first."""

    CLAIMED = "claimed"
    """A name that was given."""
    PRINCIPAL = "principal"
    """What the Temporal server knows of the sender."""
    SIGNED = "signed"
    """A signature over the exact answer, by a key that is theirs."""


class Day(StrEnum):
    """Days of the week."""

    MONDAY = "mon"
    TUESDAY = "tue"
    WEDNESDAY = "wed"
    THURSDAY = "thu"
    FRIDAY = "fri"
    SATURDAY = "sat"
    SUNDAY = "sun"


TimeOfDay = Annotated[str, StringConstraints(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]
"""As 09:00."""


class Hours(Frozen):
    """When people are at work, by the clock on their wall."""

    days: tuple[Day, ...] = Field(default=tuple(Day)[:5], min_length=1)
    opens: TimeOfDay = "09:00"
    closes: TimeOfDay = "17:00"
    zone: str
    """An IANA name, as Europe/Berlin."""
    closed: tuple[date, ...] = Field(default=(), max_length=100)
    """Holidays."""

    @model_validator(mode="after")
    def _opens_before_it_closes(self) -> Self:
        if self.opens >= self.closes:
            raise ValueError(f"opens {self.opens} is not before closes {self.closes}; turn them round")
        return self


class Rung(Frozen):
    """One step of the escalation ladder."""

    after: int = Field(ge=1)
    """That many reminders went unanswered."""
    notify: tuple[Name, ...] = Field(min_length=1)
    """Channels that hear of it from then on."""


class BreakGlass(Frozen):
    """Who may go ahead alone when it cannot wait, and who says afterwards whether that was right."""

    classes: tuple[Reversibility, ...] = Field(min_length=1)
    """By the gravest class in the intent; what is not named cannot go ahead so."""
    roles: tuple[Name, ...] = Field(default=("break_glass",), min_length=1)
    reviewers: int = Field(default=1, ge=1, le=20)
    """Other people who have to find it right."""
    review_roles: tuple[Name, ...] = ()
    """A review counts in one of them; empty means anybody who had no part in it."""
    review_seconds: int = Field(default=86400, ge=1)
    """How long they have, from the answer; the alarm is raised then, and once more after as long again."""
    notify: tuple[Name, ...] = ()
    """Channels that hear of it at once."""
    alarm: tuple[Name, ...] = Field(min_length=1)
    """Channels that hear of a review that is late."""


def _unset(value: bool) -> bool:
    """Left out of what is bound where it says nothing, so that what was bound before it came still holds."""
    return not value


class GateRule(Frozen):
    """Which verdicts an intent needs."""

    automatic: bool = False
    automatic_up_to: Literal[Reversibility.READ_ONLY, Reversibility.REVERSIBLE] = Reversibility.REVERSIBLE
    """The gravest class that passes without a person."""
    automatic_amount: Amount | None = None
    """The most that may cost without a person, all actions together; unknown cost is never automatic."""
    automatic_currency: Currency | None = None
    automatic_within: Limits | None = None
    """How far numbers may be moved without a person."""
    approvals: int = Field(default=1, ge=1, le=20)
    roles: tuple[Name, ...] = ()
    """Roles that must each be covered by a different approver; empty means any person."""
    assurance: Assurance = Assurance.CLAIMED
    """How surely an approver must be known."""
    hardware: bool = Field(default=False, exclude_if=_unset)
    """Approvals count only if a FIDO security key signed them, breaking the glass included."""
    self_approval: bool = False
    """Whoever asked for it may approve it too."""
    veto_roles: tuple[Name, ...] = ()
    """In these roles one may reject even what was delegated to somebody else."""
    expire_seconds: int = Field(default=7 * 86400, ge=1)
    """From the first delivery."""
    expire_by_class: dict[Reversibility, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Instead of that, for intents of this class."""
    absolute_seconds: int = Field(default=30 * 86400, ge=1)
    """From the intent, whatever was delivered."""
    remind_seconds: int | None = Field(default=86400, ge=1)
    hours: Hours | None = None
    """When reminders go out; one that falls due outside waits for the next opening."""
    channels: tuple[Name, ...] = Field(default=("inbox",), min_length=1)
    """Expiry runs from the first delivery on one of these."""
    notify: tuple[Name, ...] = ()
    """Channels that hear of it too, without starting the clock."""
    ladder: tuple[Rung, ...] = ()
    """Who else hears of it while nobody answers."""
    break_glass: BreakGlass | None = None
    """Without it nobody may go ahead alone."""
    keep_partial: bool = False
    """Keep what was applied when a later action fails, instead of compensating it."""

    @model_validator(mode="after")
    def _hardware_signs(self) -> Self:
        if self.hardware and self.assurance is not Assurance.SIGNED:
            raise ValueError('hardware needs signatures to look at; set assurance = "signed" too')
        return self

    @model_validator(mode="after")
    def _amount_with_currency(self) -> Self:
        if (self.automatic_amount is None) != (self.automatic_currency is None):
            raise ValueError("automatic_amount and automatic_currency stand together; set both, or neither")
        return self


class Exemption(Limits):
    """A narrow grant: what lies wholly within it passes without a person, so often and so long."""

    name: Name
    """Uses are counted under it; a new name starts a new count."""
    connector: Name
    operations: tuple[Name, ...] = Field(min_length=1)
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    """Patterns with `*`, `?` and `[…]` over the plan's target; upper and lower case differ."""
    up_to: Reversibility = Reversibility.REVERSIBLE
    """The gravest class it covers; irreversible is never covered."""
    max_uses: int = Field(ge=1, le=10_000)
    """Intents, whatever became of them."""
    valid_until: AwareDatetime

    @field_validator("up_to")
    @classmethod
    def _not_beyond_recall(cls, value: Reversibility) -> Reversibility:
        if value is Reversibility.IRREVERSIBLE:
            raise ValueError("what cannot be taken back needs a person; write correctable at most")
        return value


class Use(Frozen):
    """One counted use of a grant, bound into the intent that takes it."""

    grant: Exemption
    number: int = Field(ge=1)


class Intent(Frozen):
    """What is put to people; its canonical bytes are named by their digest."""

    schema_version: int = 1
    tenant: Name
    workflow_id: str
    request_key: str
    number: int = Field(ge=1)
    proposer: Name
    proposal: Proposal
    plans: tuple[Plan, ...]
    already_applied: tuple[int, ...] = ()
    requester: str | None = None
    gate: GateRule
    use: Use | None = None
    """The narrow grant under which it passes without a person."""
    policy_digest: Digest
    card_digest: Digest
    created_at: AwareDatetime
    expires_at: AwareDatetime
    """The absolute limit."""
    nonce: str


class Receipt(Frozen):
    """What applying an action returned."""

    action_key: str
    action: int
    reference: str
    """The target's own name for what happened: a commit, an order id."""
    version: str
    """The target's version after the action, which a later action of the same intent expects."""
    links: tuple[str, ...] = ()
    verified: bool = False
    detail: str = ""


class Outcome(Frozen):
    """How the loop ended, and what stands."""

    status: Status
    workflow_id: str
    digest: Digest | None = None
    receipts: tuple[Receipt, ...] = ()
    reason: str = ""
    cost: Cost = Cost()


def sum_costs(so_far: Cost | None, more: Cost) -> Cost:
    """Add up; what is unknown in one part is unknown in the sum, and currencies never mix."""
    if so_far is None:
        return more
    amount, currency = None, None
    if so_far.amount is not None and more.amount is not None and so_far.currency == more.currency:
        total = Decimal(so_far.amount) + Decimal(more.amount)
        # Written out: what is nearly nothing would be 0E-8 otherwise, which is no amount.
        amount, currency = (f"{total:f}", more.currency) if total < TOO_MUCH else (None, None)
    return Cost(
        amount=amount,
        currency=currency,
        milliseconds=_added(so_far.milliseconds, more.milliseconds),
        tokens=_added(so_far.tokens, more.tokens),
    )


def action_key(digest: str, number: int) -> str:
    """The key of action `number` of the intent with this digest; the same for every attempt."""
    return f"{digest}.{number}"


def workflow_id(tenant: str, agent: str, key: str) -> str:
    """The run's id, derived from the request key, so that a repeated request finds it."""
    return f"{agent}-{derived_id('request', tenant, agent, key)}"


def body_digest(request: Request) -> str:
    """The name of a request's body, whether it is stored already or written out."""
    return sha256(request.body.encode()) if isinstance(request.body, str) else request.body.digest


def keyed(request: Request, run_id: str) -> Request:
    """The request as the run with this workflow id has to take it."""
    return request.model_copy(update={"key": run_id}) if request.key_from_workflow_id else request


def _added(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second
