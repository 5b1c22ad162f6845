"""What is asked of models and how it was routed. Hard constraints stand in `Needs` and are never relaxed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import AwareDatetime, Field

from models.canonical import Digest
from models.errors import PolicyDenied
from models.loop import Amount, Cost, Frozen, Name, Ref, Subject

Param = str | int
Inputs = Mapping[str, str]
"""Texts by name, as read from the content store."""
Params = Mapping[str, Param]


class DataClass(StrEnum):
    """How far data may travel, mildest first."""

    PUBLIC = "public"
    INTERNAL = "internal"
    CONFIDENTIAL = "confidential"
    PERSONAL = "personal"


OPEN = (DataClass.PUBLIC, DataClass.INTERNAL)
"""What a model server may see of which nothing is said."""


class Ending(StrEnum):
    """How one attempt at one model ended, the same words for every kind of server."""

    OK = "ok"
    INVALID_REQUEST = "invalid_request"
    TOO_LONG = "too_long"
    SCHEMA_UNSUPPORTED = "schema_unsupported"
    SCHEMA_VIOLATED = "schema_violated"
    TRUNCATED = "truncated"
    OVERLOADED = "overloaded"
    """Back-pressure, not a fault."""
    BACKEND_FAULT = "backend_fault"
    INCOMPLETE = "incomplete"
    """The answer stopped before the server said that it was whole."""
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    AUTH = "auth"


class TimeLimit(StrEnum):
    """Which of the four limits ran out."""

    CONNECT = "connect"
    FIRST_TOKEN = "first_token"
    IDLE = "idle"
    TOTAL = "total"


class Timing(Frozen):
    """Where the time of one attempt went; `None` is unknown."""

    queue_milliseconds: int | None = None
    """Waiting in the server, as it says or as its own accounts leave over."""
    first_token_milliseconds: int | None = None
    """From sending to the first token; unknown when the answer came in one piece."""
    microseconds_per_token: int | None = None
    """After the first one."""


class TokenChance(Frozen):
    """How sure the model was of one token it wrote."""

    token: str
    logprob: float = Field(allow_inf_nan=False)
    margin: float | None = Field(default=None, allow_inf_nan=False)
    """Logprob of the likeliest token minus that of the second."""


class Message(Frozen):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(Frozen):
    """What is sent to a model; all sampling explicit, nothing left to a server's defaults."""

    messages: tuple[Message, ...] = Field(min_length=1)
    answer_schema: dict[str, Any] | None = None
    """JSON schema the answer must satisfy."""
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.3, ge=0, le=2)
    top_p: float = Field(default=0.95, gt=0, lt=1)
    seed: int = 7
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    """Ask how sure the model is of every token."""
    cache_group: str | None = None
    """Who may share a server's prefix cache with this prompt, for servers that keep groups apart."""


class Completion(Frozen):
    """What a model answered; counts are the server's own."""

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    model: str
    """Identity as the server reports it."""
    milliseconds: int
    usage: Literal["reported", "counted"] = "reported"
    """Counted: with the server's own tokenizer, because the answer named no counts."""
    cached_tokens: int | None = None
    """The part of the prompt the server did not have to read again."""
    timing: Timing = Timing()
    chances: tuple[TokenChance, ...] = ()
    """One per token, if the prompt asked for logprobs and the server gives them."""
    holds: bool | None = None
    """Whether the text satisfies the prompt's schema; `None` without one or where nobody looked."""

    @property
    def ending(self) -> Ending:
        """How the attempt ended."""
        if self.finish == "length":
            return Ending.TRUNCATED
        return Ending.SCHEMA_VIOLATED if self.holds is False else Ending.OK


class Attempt(Frozen):
    """One attempt at one tier, as breaker, admission and records see it; it holds no text."""

    tier: Name
    ending: Ending
    limit: TimeLimit | None = None
    """Which limit ran out, if `ending` is timeout."""
    sent: bool = True
    """Whether the request may have reached the server; if not, asking again costs nothing."""
    held: bool = False
    """Another model than the accepted one answers there; the tier waits for a person."""
    model: str | None = None
    milliseconds: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    usage: Literal["reported", "counted"] | None = None
    timing: Timing = Timing()

    @classmethod
    def of(cls, tier: str, answer: Completion) -> Attempt:
        """The attempt behind an answer."""
        return cls(
            tier=tier,
            ending=answer.ending,
            model=answer.model,
            milliseconds=answer.milliseconds,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            usage=answer.usage,
            timing=answer.timing,
        )


def attempt_of(error: BaseException) -> Attempt | None:
    """The attempt behind an endpoint's error; `None` if it carries none."""
    for detail in getattr(error, "details", ()):
        if isinstance(detail, dict) and "ending" in detail:
            return Attempt.model_validate(detail)
    return None


class Probed(Frozen):
    """What a server was seen to be and to do; `None` is not established, never assumed."""

    tier: Name
    reachable: bool
    held: bool = False
    """Another model than the accepted one answers there."""
    model: str | None = None
    context_tokens: int | None = None
    """Prompt plus answer that one request may use."""
    slots: int | None = None
    """Requests it works on or holds at once."""
    tokenizer: bool | None = None
    structured: bool | None = None
    """It held an answer to a schema that the model would not have kept by itself."""
    logprobs: bool | None = None
    usage: bool | None = None
    cancel: bool | None = None
    """It stopped working when the connection was closed."""
    false: tuple[str, ...] = ()
    """What the settings declare and the server does not keep, in words for people."""


class Needs(Frozen):
    """Hard constraints of one call."""

    data_class: DataClass = DataClass.INTERNAL
    region: str | None = None
    context_tokens: int = Field(ge=1)
    """Prompt plus answer, estimated from above."""
    structured: bool = False
    deadline_seconds: int = Field(default=120, ge=1)
    answer_tokens: int | None = Field(default=None, ge=1)
    """The part of `context_tokens` that is the answer; without it time and price are unknown."""
    pin: Name | None = None
    """The only tier that may take it."""
    within_milliseconds: int | None = Field(default=None, ge=1)
    """Somebody waits for the answer, this long; `None` is work that may queue."""
    may_queue: bool = False
    """What cannot be had within that time may be had later."""
    redacted: DataClass | None = None
    """The class of the call with placeholders for the personal data that rules find in it; `None` where its
    task does without them."""


class Candidate(Frozen):
    """A tier that was looked at."""

    tier: Name
    lost: str | None = None
    """Why it was passed over; `None` for the one that was chosen or stands by as fallback."""
    predicted_milliseconds: int | None = None
    predicted_amount: Amount | None = None
    currency: str | None = None


class Bar(Frozen):
    """How sure one model must be of its answer on one tier; below it the next tier is asked too."""

    tier: Name
    model: str
    confidence: int = Field(ge=0, le=1001)
    """In thousandths, and above them if nothing is sure enough; see `models.calibration.confidence`."""


class Route(Frozen):
    """The router's choice: tiers in the order in which they may be tried."""

    purpose: Name
    tiers: tuple[Name, ...]
    candidates: tuple[Candidate, ...]
    queued: bool = True
    """Nobody waits for it: it may stand in a queue. Otherwise the deadline holds."""
    bar: Bar | None = None
    """For the first of two tiers, where doubting its answer pays."""


class Call(Frozen):
    """One task for a model; texts travel as references."""

    task: Name
    inputs: dict[str, Ref] = Field(default_factory=dict)
    params: dict[str, Param] = Field(default_factory=dict)
    data_class: DataClass = DataClass.INTERNAL
    region: str | None = None
    pin: Name | None = None
    """The tier that answered earlier in the same tool loop; models are not switched within one."""
    subject: Subject | None = None
    """Whom it is about; the answer goes when the subject is forgotten."""

    def within(self, region: str) -> Call:
        """The same call, bound to the region of its request.

        Raises:
            PolicyDenied: it is bound to another one already.
        """
        if self.region not in (None, region):
            raise PolicyDenied(f"{self.task}: bound to region {self.region}, and its request to {region}")
        return self.model_copy(update={"region": region})


class Weigh(Frozen):
    """Whose answer is put on record with its confidence, so that a verdict can be held against it."""

    workflow_id: str
    route: str
    """The event id of the route."""


class Grant(Frozen):
    """What the router allows one call: money held for it, and until when it may be tried."""

    reservation: str | None = None
    """Name of the money held; `None` where no budget applies."""
    deadline: AwareDatetime | None = None
    """One for the whole chain, all tiers and repairs; `None` for queued work."""
    priority: int = Field(default=3, ge=1, le=5)
    """1 goes first."""
    weigh: Weigh | None = None
    """Set where the model is to say how sure it is, for the calibration."""
    silent: tuple[Name, ...] = ()
    """Tiers that are not asked how sure they are, for their servers were seen not to say."""
    bar: Bar | None = None
    similar: Weigh | None = None
    """Set where it may get what a similar call got, which is then put on record with its route."""


class Ask(Frozen):
    """One call, put to one tier on behalf of one run."""

    tenant: Name
    workflow_id: str
    call: Call
    tier: Name
    grant: Grant = Grant()


class Likeness(Frozen):
    """Why a call was given what another one got; see `models.similar`."""

    entry: Digest
    """The kept answer's key, as in the cache."""
    similarity: int = Field(ge=0, le=1000)
    """Of the texts, in thousandths."""
    wrong_permille: int = Field(ge=0, le=1000)
    """The share of wrong answers at such similarities, at most, by the comparisons so far."""
    permitted: int = Field(ge=1, le=1000)
    """What settings permitted."""


class Answered(Frozen):
    """A validated answer, stored; `problems` are what the task's own checks still object to."""

    text: Ref
    tier: Name
    model: str
    problems: tuple[str, ...] = ()
    repaired: bool = False
    cost: Cost = Cost()
    cached: bool = False
    """It was given to an identical call before."""
    similar: Likeness | None = None
    """It was given to a similar call before, and to none that is identical."""
    confidence: int | None = None
    """How sure the model sounded, in thousandths, if it was asked."""
    unsure: bool = False
    """It is below the bar: the next tier is to be asked, and this answer is kept in case that fails."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a model can be asked: how the prompt is built and how the answer is checked. Pure."""

    name: str
    prefer: Literal["small", "large"]
    """Small: cheapest tier first. Large: most capable first."""
    structured: bool
    build: Callable[[Inputs, Params], Prompt]
    check: Callable[[str, Inputs, Params], tuple[str, ...]]
    """Objections to an answer, in words the model can use; empty means good."""
    cache_seconds: int = 0
    """How long an answer may be given again to an identical call; only for what starts no action."""
    read_only: bool = False
    """Nothing is done because of its answer alone, and neither time nor caller matters to it: settings may
    let it be given again to a call that says the same in other words."""
    gist: Callable[[str], str] | None = None
    """What of an answer counts when two are compared; `None` is all of it."""
