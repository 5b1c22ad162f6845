"""Asks one tier one question and lets only a checked answer out.

The choice of tiers is `models.routing`; here its hard constraints are applied once more, because the caller's
word that a tier may see the data is not enough. Retries nothing and falls back to nothing by itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jsonschema import Draft202012Validator

from activities.tiers.base import Endpoint
from models.errors import InvalidInput, OutputInvalid, PolicyDenied, UnknownName
from models.inference import Answered, Call, Completion, Inputs, Message, Prompt, Task
from models.loop import Cost, Ref
from models.routing import needs_of, price, unsuitable
from models.settings import TierSettings

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
MOST_OBJECTIONS = 5
REPAIR = "That answer cannot be used:\n{objections}\nAnswer again in full and correct only this."
RETOLD = "An earlier answer could not be used:\n{objections}\nAvoid this."


class Contents(Protocol):
    """Where texts are kept."""

    async def text(self, tenant: str, ref: Ref) -> str:
        """The text behind a reference."""
        ...

    async def put(self, tenant: str, data: bytes, media_type: str = ...) -> Ref:
        """Keep bytes and name them."""
        ...


@dataclass(frozen=True, slots=True)
class Examined:
    """One answer and what is wrong with it."""

    completion: Completion
    text: str
    objections: tuple[str, ...]
    usable: bool
    """Fit to be shown to a person, objections and all; an answer that breaks its schema is not."""


@dataclass(frozen=True, slots=True)
class Question:
    """A task with its texts read and its prompt built."""

    task: Task
    call: Call
    inputs: Inputs
    prompt: Prompt

    @property
    def schema(self) -> dict[str, Any] | None:
        """What the answer must satisfy."""
        return self.prompt.answer_schema

    def examine(self, completion: Completion) -> Examined:
        """Judge an answer: cut off, then schema, then the task's own check."""
        text = completion.text.strip()
        cut = ()
        if completion.finish == "length":
            cut = (f"it was cut off after {completion.completion_tokens} tokens; make it shorter",)
        broken = () if self.schema is None else schema_objections(text, self.schema)
        if broken:
            return Examined(completion, text, cut or broken, usable=False)
        objections = cut + self.task.check(text, self.inputs, self.call.params)
        return Examined(completion, text, objections, usable=True)


class Answerer:
    """The tiers of this process, each with its own limit of questions at once."""

    def __init__(
        self,
        tiers: Sequence[TierSettings],
        endpoints: Mapping[str, Endpoint],
        tasks: Mapping[str, Task],
        contents: Contents,
    ) -> None:
        """Take settings and endpoints by tier name, tasks by name, and the content store."""
        self._tiers = {tier.name: tier for tier in tiers if tier.name in endpoints}
        self._endpoints = endpoints
        self._tasks = tasks
        self._contents = contents
        self._slots = {tier.name: asyncio.Semaphore(tier.concurrency) for tier in tiers}

    async def answer(self, tenant: str, call: Call, tier: str) -> Answered:
        """Build the prompt, ask, check, ask once more if need be, and store the answer.

        Raises:
            UnknownName: no such tier or task here.
            PolicyDenied: the tier may not take this call, whatever the caller says.
            OutputInvalid: the answer breaks its schema even after one repair.
        """
        settings = self._tier(tier)
        question = await self._question(tenant, call)
        permit(settings, question, question.prompt)
        async with self._slots[tier]:
            answers = await self._ask(settings, question)
        best = best_of(answers)
        if not best.usable:
            raise OutputInvalid(
                f"{call.task} on {tier}: the answer breaks its schema after {len(answers) - 1} repair "
                f"({'; '.join(best.objections)}); try another tier"
            )
        media_type = TEXT if question.schema is None else JSON
        ref = await self._contents.put(tenant, best.text.encode(), media_type)
        return Answered(
            text=ref,
            tier=tier,
            model=best.completion.model,
            problems=best.objections,
            repaired=best is not answers[0],
            cost=cost_of(settings, [answer.completion for answer in answers]),
        )

    def _tier(self, name: str) -> TierSettings:
        if name not in self._tiers:
            known = ", ".join(self._tiers) or "none"
            raise UnknownName(f"tier: {name!r} is not served here; known: {known}")
        return self._tiers[name]

    async def _question(self, tenant: str, call: Call) -> Question:
        task = self._tasks.get(call.task)
        if task is None:
            raise UnknownName(f"task: {call.task!r} is unknown; known: {', '.join(sorted(self._tasks))}")
        inputs = {name: await self._contents.text(tenant, ref) for name, ref in call.inputs.items()}
        prompt = task.build(inputs, call.params)
        if task.structured and prompt.answer_schema is None:
            raise InvalidInput.field(
                "answer_schema", None, f"{task.name} is structured; build it with a schema"
            )
        return Question(task, call, inputs, prompt)

    async def _ask(self, tier: TierSettings, question: Question) -> list[Examined]:
        endpoint = self._endpoints[tier.name]
        first = question.examine(await endpoint.complete(question.prompt))
        if not first.objections:
            return [first]
        for again in (repair(question.prompt, first), retold(question.prompt, first)):
            if refusal(tier, question, again) is None:
                return [first, question.examine(await endpoint.complete(again))]
        return [first]


def permit(tier: TierSettings, question: Question, prompt: Prompt) -> None:
    """Apply the hard constraints to the very prompt that would be sent.

    Raises:
        PolicyDenied: the tier may not take it.
    """
    reason = refusal(tier, question, prompt)
    if reason:
        raise PolicyDenied(
            f"{question.task.name}: {tier.name} may not take this call, {reason}; route it again"
        )


def refusal(tier: TierSettings, question: Question, prompt: Prompt) -> str | None:
    """Why the tier may not take this prompt; `None` if it may."""
    return unsuitable(needs_of(question.task, question.call, prompt), tier)


def repair(prompt: Prompt, answer: Examined) -> Prompt:
    """The same question, followed by the answer and what is wrong with it."""
    turns = (
        Message(role="assistant", content=answer.text),
        Message(role="user", content=REPAIR.format(objections=_listed(answer))),
    )
    return prompt.model_copy(update={"messages": (*prompt.messages, *turns)})


def retold(prompt: Prompt, answer: Examined) -> Prompt:
    """The same question with only the objections, for an answer too long to be quoted."""
    *before, last = prompt.messages
    content = f"{last.content}\n\n{RETOLD.format(objections=_listed(answer))}"
    return prompt.model_copy(update={"messages": (*before, Message(role=last.role, content=content))})


def best_of(answers: Sequence[Examined]) -> Examined:
    """The usable one with the fewest objections; of equals the later, which knew more."""
    return min(reversed(answers), key=lambda answer: (not answer.usable, len(answer.objections)))


def schema_objections(text: str, schema: Mapping[str, Any]) -> tuple[str, ...]:
    """What in a JSON text breaks the schema: where and which rule, never the text itself."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return ("it is not valid JSON",)
    errors = Draft202012Validator(schema).iter_errors(value)
    return tuple(_objection(error) for error, _ in zip(errors, range(MOST_OBJECTIONS), strict=False))


def cost_of(tier: TierSettings, completions: Sequence[Completion]) -> Cost:
    """What the calls took together; the amount is unknown unless the tier has prices."""
    asked = sum(completion.prompt_tokens for completion in completions)
    answered = sum(completion.completion_tokens for completion in completions)
    amount, currency = price(tier, asked, answered)
    return Cost(
        amount=amount,
        currency=currency,
        milliseconds=sum(completion.milliseconds for completion in completions),
        tokens=asked + answered,
    )


def _listed(answer: Examined) -> str:
    return "\n".join(f"- {objection}" for objection in answer.objections)


def _objection(error: Any) -> str:
    rule = json.dumps(error.validator_value, ensure_ascii=False)
    return f"{error.json_path}: breaks {error.validator} {rule[:120]}"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
