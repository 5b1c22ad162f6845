"""What a model has said so far, collected from the events of a stream or from one whole answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from models.inference import Timing, TokenChance

DONE = "[DONE]"
MOST_MILLISECONDS = 1000 * 60 * 60 * 24
MOST_TOKENS = 2**31 - 1
"""No answer has more, and databases keep no more; a larger number is no count."""
FINISHES = {"stop": "stop", "eos_token": "stop", "stop_sequence": "stop", "length": "length"}


class Unreadable(Exception):
    """A 200 whose content is none; the text says what stood there, never quoting it."""


@dataclass(slots=True)
class Heard:
    """One answer while it comes in."""

    started: float
    clock: Callable[[], float]
    parts: list[str] = field(default_factory=list[str])
    finish: str | None = None
    usage: tuple[int, int] | None = None
    cached: int | None = None
    model: str | None = None
    chances: list[TokenChance] = field(default_factory=list[TokenChance])
    first: float | None = None
    last: float | None = None
    queue: float | None = None
    """Milliseconds."""
    per_token: float | None = None
    """Milliseconds, by the server's account."""
    prompt: float | None = None
    """Milliseconds it took to read the prompt."""

    @property
    def text(self) -> str:
        """Everything written.

        Raises:
            ValueError: half a character stands in it, which no file can keep.
        """
        # What is left of an escape that was cut between two events finds its other half here.
        return "".join(self.parts).encode("utf-16-le", "surrogatepass").decode("utf-16-le")

    def headers(self, headers: Mapping[str, str]) -> None:
        """TGI's timings, which only an unstreamed answer carries."""
        self.queue = _milliseconds(headers.get("x-queue-time"))
        self.per_token = _milliseconds(headers.get("x-time-per-token"))

    def heard_now(self) -> None:
        """A token came."""
        self.last = self.clock()
        self.first = self.last if self.first is None else self.first

    def timing(self, tokens: int) -> Timing:
        """Where the time went."""
        first = None if self.first is None else (self.first - self.started) * 1000
        queue = self.queue
        if queue is None and first is not None and self.prompt is not None:
            queue = max(0.0, first - self.prompt)
        return Timing(
            queue_milliseconds=_rounded(queue),
            first_token_milliseconds=_rounded(first),
            microseconds_per_token=self._per_token(tokens),
        )

    def _per_token(self, tokens: int) -> int | None:
        if self.per_token is not None:
            return round(self.per_token * 1000)
        if self.first is None or self.last is None or tokens < 2:
            return None
        return round((self.last - self.first) * 1_000_000 / (tokens - 1))


def chat(said: Heard, body: Mapping[str, Any]) -> bool:
    """Take one event of the chat route, or its whole answer; true if the model has written more.

    Raises:
        Unreadable: it is neither.
    """
    try:
        return _chat(said, body)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise Unreadable("an unknown shape") from None


def parsed(content: bytes) -> Any:
    """JSON.

    Raises:
        Unreadable: it is none.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise Unreadable("something that is no JSON object") from None


def counts(prompt: Any, completion: Any) -> tuple[int, int]:
    """Both numbers of tokens.

    Raises:
        ValueError: one is no count.
    """
    pair = (prompt, completion)
    if not all(type(number) is int and 0 <= number <= MOST_TOKENS for number in pair):
        raise ValueError("no counts")
    return pair


def _chat(said: Heard, body: Mapping[str, Any]) -> bool:
    _account(said, body)
    model = body.get("model")
    said.model = model if isinstance(model, str) else said.model
    choices = cast(list[Any], body["choices"])
    if not choices:
        return False
    choice = choices[0]
    whole = "delta" not in choice
    more = _words(said, choice["message"] if whole else choice["delta"], whole)
    _chances(said, choice.get("logprobs"))
    if choice.get("finish_reason") is not None:
        said.finish = FINISHES[choice["finish_reason"]]
    return more


def _words(said: Heard, words: Mapping[str, Any], whole: bool) -> bool:
    text = words.get("content")
    if isinstance(text, str) and text:
        said.parts.append(text)
        if not whole:
            said.heard_now()
        return True
    # Thinking is progress, and no part of the answer.
    thought = bool(words.get("reasoning_content") or words.get("reasoning"))
    if thought and not whole:
        said.heard_now()
    return thought


def _account(said: Heard, body: Mapping[str, Any]) -> None:
    usage = body.get("usage")
    if usage:
        said.usage = counts(usage["prompt_tokens"], usage["completion_tokens"])
        details = usage.get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens")
        said.cached = cached if type(cached) is int and 0 <= cached <= MOST_TOKENS else None
    timings = body.get("timings")
    if isinstance(timings, dict):
        said.prompt = _milliseconds(timings.get("prompt_ms"))
        said.per_token = _milliseconds(timings.get("predicted_per_token_ms"))


def _chances(said: Heard, logprobs: Any) -> None:
    for token in (logprobs or {}).get("content") or ():
        top = sorted((float(other["logprob"]) for other in token.get("top_logprobs") or ()), reverse=True)
        margin = top[0] - top[1] if len(top) > 1 else None
        said.chances.append(TokenChance(token=token["token"], logprob=token["logprob"], margin=margin))


def _milliseconds(value: Any) -> float | None:
    """`None` where it is none, and where it is longer than anybody waited."""
    try:
        number = None if value is None else max(0.0, float(value))
    except (TypeError, ValueError, OverflowError):
        return None
    return None if number is None or number > MOST_MILLISECONDS else number


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)
