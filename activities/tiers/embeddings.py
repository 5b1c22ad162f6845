"""Texts to unit vectors over OpenAI's embedding route; an answer is checked before it is believed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, cast

import httpx

from activities.tiers.carrier import healthy
from activities.tiers.stream import TooMuch, whole
from activities.tiers.wire import READY_SECONDS, STATUSES, Said, json_or_none
from models.errors import InvalidInput, MemoryUnavailable
from models.inference import Attempt, DataClass, Ending, TimeLimit
from models.memory import EmbeddingSettings

PATH = "/v1/embeddings"
BATCH = 32
MOST_BYTES = 64 * 2**20
TOO_LONG = ("too large to process", "context size", "context length", "must have less than")
MOST_VALUE = 1e150
"""Of one number in a vector; the sum of their squares is a number still."""
SHORTEST_PIECE = 64
"""Characters; a server that refuses even this is misconfigured."""


class TooLong(Exception):
    """The server refuses a text of this length; it never leaves this module."""


class Embeddings:
    """One embedding server; llama.cpp as it stands, other kinds say what they do differently."""

    def __init__(self, settings: EmbeddingSettings, client: httpx.AsyncClient) -> None:
        """Take the settings and a client built with `wire.http_client`."""
        self._settings = settings
        self._client = client

    @property
    def model(self) -> str:
        """Identity of model and revision; the server must answer as this."""
        return self._settings.model

    @property
    def sees(self) -> frozenset[DataClass]:
        """The data classes that it may be shown, as settings say."""
        return self._settings.sees

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One unit vector per text, in order; a text longer than the model is the mean of its halves.

        Raises:
            MemoryUnavailable: the server is away, or what it answered cannot be used.
        """
        vectors: list[list[float]] = []
        for start in range(0, len(texts), BATCH):
            vectors += await self._batch(texts[start : start + BATCH])
        return vectors

    async def ready(self) -> bool:
        """Whether it would answer now."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                return await healthy(self._client)
        except (TimeoutError, httpx.HTTPError):
            return False

    async def aclose(self) -> None:
        """Give connections back."""
        await self._client.aclose()

    async def _batch(self, texts: Sequence[str]) -> list[list[float]]:
        try:
            return await self._ask(texts)
        except TooLong:
            # One by one, so that a vector never depends on what it was asked together with.
            return [await self._long(text) for text in texts]

    async def _long(self, text: str) -> list[float]:
        try:
            return (await self._ask([text]))[0]
        except TooLong:
            left, right = halves(text)
            first, second = await self._long(left), await self._long(right)
        weighted = [a * len(left) + b * len(right) for a, b in zip(first, second, strict=True)]
        return unit(weighted)

    async def identify(self) -> None:
        """See that the server runs the model of the settings, where its answers do not say.

        Raises:
            MemoryUnavailable: it runs another.
        """

    def request(self, texts: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """Path and body of the question."""
        return PATH, {"input": list(texts)}

    def rows(self, body: Any) -> list[Any]:
        """The vectors in an answer, in the order of their texts.

        Raises:
            MemoryUnavailable: it holds none, or another model's.
        """
        if not isinstance(body, dict):
            raise unusable("no JSON object")
        answer = cast(dict[str, Any], body)
        if answer.get("model") != self.model:
            raise unusable(f"model {str(answer.get('model'))[:80]!r} instead of {self.model!r}")
        rows = answer.get("data")
        return [row.get("embedding") for row in _in_order(rows)] if isinstance(rows, list) else []

    async def _ask(self, texts: Sequence[str]) -> list[list[float]]:
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                await self.identify()
                path, body = self.request(texts)
                found = await self.fetch(path, body)
        except TimeoutError as error:
            raise _away(error, Ending.TIMEOUT, limit=TimeLimit.TOTAL) from None
        except httpx.HTTPError as error:
            raise _away(error, Ending.BACKEND_FAULT) from None
        except TooMuch as error:
            raise unusable(str(error)) from None
        return self._vectors(found, len(texts))

    async def fetch(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask the server; JSON, or `None` for what is none.

        Raises:
            TooLong: a text is longer than its model takes.
            MemoryUnavailable: it refuses.
        """
        async with self._client.stream("GET" if body is None else "POST", path, json=body) as response:
            if response.status_code != HTTPStatus.OK:
                raise _refused(await Said.of(response))
            return json_or_none(await whole(response, MOST_BYTES))

    def _vectors(self, body: Any, count: int) -> list[list[float]]:
        rows = self.rows(body)
        if len(rows) != count:
            raise unusable(f"{len(rows)} vectors for {count} texts")
        return [self._vector(row) for row in rows]

    def _vector(self, values: Any) -> list[float]:
        numbers = cast(list[Any], values if isinstance(values, list) else [])
        if len(numbers) != self._settings.dimensions:
            raise unusable(f"{len(numbers)} dimensions instead of {self._settings.dimensions}")
        if not all(isinstance(value, int | float) and abs(value) <= MOST_VALUE for value in numbers):
            raise unusable("a value that is no finite number")
        return unit([float(value) for value in numbers])


class OpenAIEmbeddings(Embeddings):
    """A server that wants to be told which of its models is meant, as vLLM does."""

    def request(self, texts: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """With the model's name; numbers as numbers, since some clients' default is a packed string."""
        return PATH, {"input": list(texts), "model": self.model, "encoding_format": "float"}


def unit(vector: list[float]) -> list[float]:
    """The vector at length one.

    Raises:
        MemoryUnavailable: it has no direction.
    """
    length = math.sqrt(math.fsum(value * value for value in vector))
    if not length or not math.isfinite(length):
        raise unusable("a vector without direction")
    return [value / length for value in vector]


def halves(text: str) -> tuple[str, str]:
    """Split near the middle, between words where there are any.

    Raises:
        InvalidInput: it is too short to be split.
    """
    if len(text) < SHORTEST_PIECE:
        raise InvalidInput("embeddings: the server refuses even a short text; raise its context to 512")
    middle = text.rfind(" ", len(text) // 4, len(text) // 2 + 1)
    middle = middle if middle > 0 else len(text) // 2
    return text[:middle], text[middle:]


def unusable(what: str) -> MemoryUnavailable:
    """The error for an answer that cannot be believed."""
    text = f"embeddings: the server answered with {what}; check which model it serves"
    return MemoryUnavailable(text, _details(Ending.BACKEND_FAULT))


def _in_order(rows: list[Any]) -> list[dict[str, Any]]:
    numbers = [row.get("index", -1) if isinstance(row, dict) else -1 for row in rows]
    if any(not isinstance(number, int) for number in numbers) or sorted(numbers) != list(range(len(rows))):
        raise unusable("vectors that do not say which text they belong to")
    return sorted(rows, key=lambda row: row["index"])


def _refused(said: Said) -> Exception:
    if any(mark in said.message for mark in TOO_LONG):
        return TooLong()
    text = f"embeddings: the server answered {said}; look at its log"
    ending = STATUSES.get(said.status, Ending.BACKEND_FAULT)
    return MemoryUnavailable(text, _details(ending), next_retry_delay=said.retry)


def _away(error: Exception, ending: Ending, **more: Any) -> MemoryUnavailable:
    text = f"embeddings: no answer ({type(error).__name__}); check that the server runs at its url"
    return MemoryUnavailable(text, _details(ending, **more))


def _details(ending: Ending, **more: Any) -> dict[str, Any]:
    return Attempt(tier="embeddings", ending=ending, **more).model_dump(mode="json", exclude_none=True)
