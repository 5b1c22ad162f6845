"""One question and its answers: how it is asked, judged, and asked again. Pure but for the schema's rules."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from activities.tiers.schema import validator_of, value_of
from models.errors import PolicyDenied
from models.inference import Call, Completion, Inputs, Message, Needs, Prompt, Task
from models.redaction import Redaction, dangling, shows
from models.routing import unsuitable
from models.settings import TierSettings
from models.tokens import prompt_tokens

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
MOST_OBJECTIONS = 5
REPAIR = "That answer cannot be used:\n{objections}\nAnswer again in full and correct only this."
Asking = Callable[[Prompt], Awaitable[Completion]]
RETOLD = "An earlier answer could not be used:\n{objections}\nAvoid this."


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
    own: Needs
    """The hard constraints of this prompt."""
    cache_seconds: int = 0
    """How long the answer may be given again."""

    @property
    def mode(self) -> str:
        """How the server is asked; one way may fail while another works."""
        return "text" if self.schema is None else "json"

    @property
    def media_type(self) -> str:
        """What the answer is."""
        return TEXT if self.schema is None else JSON

    def needs(self, again: Prompt) -> Needs:
        """The hard constraints of a prompt that asks the same again: only its length differs."""
        if again is self.prompt:
            return self.own
        tokens = prompt_tokens(again) + again.max_tokens
        return self.own.model_copy(update={"context_tokens": tokens, "answer_tokens": again.max_tokens})

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
        objections += dangling(text, (message.content for message in self.prompt.messages))
        return Examined(completion, text, objections, usable=True)


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
    return unsuitable(question.needs(prompt), tier)


async def veiled(question: Question, tier: TierSettings, prompt: Prompt, complete: Asking) -> Completion:
    """Put a prompt to a tier; with placeholders, if it may not see what stands there.

    Raises:
        PolicyDenied: something would be left of it, or it becomes too long.
    """
    safe, redaction = as_sent(question, tier, prompt)
    if redaction is None:
        return await complete(prompt)
    permit(tier, question, safe)
    if shows(safe):
        raise PolicyDenied(f"{question.task.name}: personal data would reach {tier.name}; route it again")
    completion = await complete(safe)
    return completion.model_copy(update={"text": redaction.restore(completion.text)})


def as_sent(question: Question, tier: TierSettings, prompt: Prompt) -> tuple[Prompt, Redaction | None]:
    """A prompt as this tier gets it, and what turns its placeholders back, if there are any."""
    if question.own.data_class in tier.data_classes:
        return prompt, None
    redaction = Redaction()
    return redaction.veil(prompt), redaction


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
        errors = validator_of(schema).iter_errors(value_of(text))
        return tuple(map(_objection, islice(errors, MOST_OBJECTIONS)))
    except (ValueError, RecursionError):
        return ("it is not valid JSON, in which every name stands once",)


def for_the_record(objection: str) -> str:
    """An objection without the values its rule allows: they are for the model, and may quote a text."""
    place, breaks, rule = objection.partition(": breaks ")
    return f"{place}{breaks}{rule.partition(' ')[0]}"


def _listed(answer: Examined) -> str:
    return "\n".join(f"- {objection}" for objection in answer.objections)


def _objection(error: Any) -> str:
    rule = json.dumps(error.validator_value, ensure_ascii=False)
    return f"{error.json_path}: breaks {error.validator} {rule[:120]}"
