"""Placeholders for personal data that rules find, so that a model can work on a text it may not see.

What was replaced is put back into the answer by code. Names are not found by rules, so this is for data with
a form, in tasks whose settings say so; it makes no call that was declared personal fit for a tier.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

from models.inference import Call, DataClass, Inputs, Message, Prompt
from models.privacy import found_in, raised, spans
from models.tokens import prompt_tokens

PLACEHOLDER = re.compile(r"⟦[A-Z]+_\d+⟧")
ESCAPED = re.compile(r"(?<!\\)\\u27[eE]6([A-Z]+_\d+)\\u27[eE]7")
"""The same in JSON, as some servers write whatever is no ASCII."""
ALMOST = re.compile(r"(?:⟦|\\u27[eE]6)\s*[A-Za-z]+[\s_-]*\d+\s*(?:⟧|\\u27[eE]7)?")
"""What a model makes of a mark that it does not copy exactly."""
HINT = "Marks such as ⟦EMAIL_0⟧ stand for words you are not shown. Copy them exactly where they belong."


class Redaction:
    """One prompt's placeholders, and what each stands for."""

    def __init__(self) -> None:
        """Begin with none."""
        self._taken: set[str] = set()
        """Marks that stand in a text by themselves; none of ours is one of them."""
        self._marks: dict[str, str] = {}
        """Placeholder by original."""
        self._originals: dict[str, str] = {}
        self._numbers: dict[str, int] = {}

    def redact(self, text: str) -> str:
        """The text with a placeholder for each datum that rules find; the same one for the same datum."""
        self._taken |= _marks(text) - self._originals.keys()
        # Without its neighbour a datum may be found that the rules did not see before.
        while found := spans(text):
            for start, end, kind in reversed(found):
                text = text[:start] + self._mark(text[start:end], kind.name) + text[end:]
        return text

    def restore(self, text: str) -> str:
        """The text with every placeholder turned back."""
        text = ESCAPED.sub(lambda mark: self._original(f"⟦{mark.group(1)}⟧", mark.group()), text)
        return PLACEHOLDER.sub(lambda mark: self._original(mark.group(), mark.group()), text)

    def veil(self, prompt: Prompt) -> Prompt:
        """A prompt whose messages and schema hold placeholders, and which says what they are."""
        self._taken.update(mark for text in _said(prompt) for mark in _marks(text))
        messages = [
            Message(role=message.role, content=self.redact(message.content)) for message in prompt.messages
        ]
        messages[0] = messages[0].model_copy(update={"content": f"{HINT}\n\n{messages[0].content}"})
        changes: dict[str, Any] = {
            "messages": tuple(messages),
            "answer_schema": self._without(prompt.answer_schema),
            "stop": tuple(self.redact(one) for one in prompt.stop),
        }
        return prompt.model_copy(update=changes)

    def _original(self, mark: str, otherwise: str) -> str:
        return self._originals.get(mark, otherwise)

    def _mark(self, original: str, kind: str) -> str:
        if original not in self._marks:
            mark = self._next(kind)
            self._marks[original], self._originals[mark] = mark, original
        return self._marks[original]

    def _next(self, kind: str) -> str:
        while True:
            number = self._numbers[kind] = self._numbers.get(kind, 0) + 1
            mark = f"⟦{kind}_{number}⟧"
            if mark not in self._taken:
                return mark

    def _without(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.redact(value)
        if isinstance(value, dict):
            plain = cast("dict[str, Any]", value)
            return {self.redact(key): self._without(item) for key, item in plain.items()}
        if isinstance(value, list | tuple):
            return [self._without(item) for item in cast("list[Any]", value)]
        return value


def classes_of(
    call: Call, inputs: Inputs, prompt: Prompt, redact: bool
) -> tuple[DataClass, DataClass | None, int]:
    """The class of a call, its class with marks if it may have them, and the tokens it needs either way."""
    texts = (*inputs.values(), *(str(value) for value in call.params.values()))
    found, tokens = raised(call.data_class, texts), prompt_tokens(prompt)
    # What a caller calls personal may hold names, which no rule finds.
    if not redact or found is call.data_class:
        return found, None, tokens
    return found, call.data_class, max(tokens, prompt_tokens(Redaction().veil(prompt)))


def shows(prompt: Prompt) -> bool:
    """Whether rules find personal data in what would be sent."""
    return any(found_in(text) for text in _said(prompt))


def dangling(text: str, seen: Iterable[str]) -> tuple[str, ...]:
    """What to object to in an answer with a placeholder that stands for nothing."""
    left = set(ALMOST.findall(text))
    if left:
        left -= {mark for one in seen for mark in ALMOST.findall(one)}
    return ("it holds a mark in ⟦⟧ that was not given; copy such marks exactly",) if left else ()


def _marks(text: str) -> set[str]:
    """Whatever would be turned back if one of ours stood there."""
    return {*PLACEHOLDER.findall(text), *(f"⟦{name}⟧" for name in ESCAPED.findall(text))}


def _said(prompt: Prompt) -> Iterable[str]:
    """Every text of a prompt."""
    yield from (message.content for message in prompt.messages)
    yield from prompt.stop
    yield from _words(prompt.answer_schema)


def _words(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in cast("dict[str, Any]", value).items():
            yield key
            yield from _words(item)
    elif isinstance(value, list | tuple):
        for item in cast("list[Any]", value):
            yield from _words(item)
