"""What is asked of models and how it was routed. Hard constraints stand in `Needs` and are never relaxed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from models.loop import Amount, Cost, Frozen, Name, Ref

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


class Completion(Frozen):
    """What a model answered; counts are the server's own."""

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    model: str
    """Identity as the server reports it."""
    milliseconds: int


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


class Candidate(Frozen):
    """A tier that was looked at."""

    tier: Name
    lost: str | None = None
    """Why it was passed over; `None` for the one that was chosen or stands by as fallback."""
    predicted_milliseconds: int | None = None
    predicted_amount: Amount | None = None
    currency: str | None = None


class Route(Frozen):
    """The router's choice: tiers in the order in which they may be tried."""

    purpose: Name
    tiers: tuple[Name, ...]
    candidates: tuple[Candidate, ...]


class Call(Frozen):
    """One task for a model; texts travel as references."""

    task: Name
    inputs: dict[str, Ref] = Field(default_factory=dict)
    params: dict[str, Param] = Field(default_factory=dict)
    data_class: DataClass = DataClass.INTERNAL
    region: str | None = None


class Ask(Frozen):
    """One call, put to one tier on behalf of one run."""

    tenant: Name
    workflow_id: str
    call: Call
    tier: Name


class Answered(Frozen):
    """A validated answer, stored; `problems` are what the task's own checks still object to."""

    text: Ref
    tier: Name
    model: str
    problems: tuple[str, ...] = ()
    repaired: bool = False
    cost: Cost = Cost()


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
