"""A model that says what it was told to say, for tests and benchmarks; settings cannot name it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from models.errors import TierUnavailable
from models.inference import Completion, Prompt

Line = str | Completion | Exception


class Scripted:
    """Answers from a list, in order, or from a function of the prompt; an exception in it is raised."""

    def __init__(self, name: str, script: Iterable[Line] | Callable[[Prompt], Line]) -> None:
        """Take the tier's name and what to say."""
        self._name = name
        self._script = script if callable(script) else _in_order(name, script)
        self.prompts: list[Prompt] = []
        """Everything it was asked."""

    @property
    def name(self) -> str:
        """The tier's name."""
        return self._name

    async def complete(self, prompt: Prompt) -> Completion:
        """Say the next line."""
        self.prompts.append(prompt)
        line = self._script(prompt)
        if isinstance(line, Exception):
            raise line
        return line if isinstance(line, Completion) else _spoken(line, prompt)

    async def ready(self) -> bool:
        """Always."""
        return True

    async def aclose(self) -> None:
        """Nothing to give back."""


def _in_order(name: str, script: Iterable[Line]) -> Callable[[Prompt], Line]:
    lines = iter(tuple(script))
    used_up = TierUnavailable(f"{name}: the script is used up; give it another line")
    return lambda _: next(lines, used_up)


def _spoken(text: str, prompt: Prompt) -> Completion:
    return Completion(
        text=text,
        finish="stop",
        prompt_tokens=sum(len(message.content.split()) for message in prompt.messages),
        completion_tokens=len(text.split()),
        model="scripted",
        milliseconds=1,
    )
