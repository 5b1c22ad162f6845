"""Texts to unit vectors over llama.cpp's embedding route; an answer is checked before it is believed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, cast

import httpx

from activities.tiers.wire import json_or_none, kind_of, message_of
from models.errors import InvalidInput, MemoryUnavailable
from models.settings import EmbeddingSettings

PATH = "/v1/embeddings"
BATCH = 32
TOO_LONG = ("too large to process", "context size")
SHORTEST_PIECE = 64
"""Characters; a server that refuses even this is misconfigured."""


class TooLong(Exception):
    """The server refuses a text of this length; it never leaves this module."""


class Embeddings:
    """One embedding server."""

    def __init__(self, settings: EmbeddingSettings, client: httpx.AsyncClient) -> None:
        """Take the settings and a client built with `wire.http_client`."""
        self._settings = settings
        self._client = client

    @property
    def model(self) -> str:
        """Identity of model and revision; the server must answer as this."""
        return self._settings.model

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
            return (await self._client.get("/health")).status_code == HTTPStatus.OK
        except httpx.HTTPError:
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

    async def _ask(self, texts: Sequence[str]) -> list[list[float]]:
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                response = await self._client.post(PATH, json={"input": list(texts)})
        except (TimeoutError, httpx.HTTPError) as error:
            raise MemoryUnavailable(
                f"embeddings: no answer ({type(error).__name__}); check that the server runs at its url"
            ) from None
        if response.status_code != HTTPStatus.OK:
            raise _refused(response)
        return self._vectors(json_or_none(response), len(texts))

    def _vectors(self, body: Any, count: int) -> list[list[float]]:
        if not isinstance(body, dict):
            raise _unusable("no JSON object")
        answer = cast(dict[str, Any], body)
        if answer.get("model") != self.model:
            raise _unusable(f"model {str(answer.get('model'))[:80]!r} instead of {self.model!r}")
        rows = answer.get("data")
        if not isinstance(rows, list) or len(cast(list[Any], rows)) != count:
            found = len(cast(list[Any], rows)) if isinstance(rows, list) else 0
            raise _unusable(f"{found} vectors for {count} texts")
        return [self._vector(row) for row in _in_order(cast(list[Any], rows))]

    def _vector(self, row: dict[str, Any]) -> list[float]:
        values = row.get("embedding")
        if not isinstance(values, list) or len(cast(list[Any], values)) != self._settings.dimensions:
            found = len(cast(list[Any], values)) if isinstance(values, list) else 0
            raise _unusable(f"{found} dimensions instead of {self._settings.dimensions}")
        numbers = cast(list[Any], values)
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
            raise _unusable("a value that is no finite number")
        return unit([float(value) for value in numbers])


def unit(vector: list[float]) -> list[float]:
    """The vector at length one.

    Raises:
        MemoryUnavailable: it has no direction.
    """
    length = math.sqrt(math.fsum(value * value for value in vector))
    if not length or not math.isfinite(length):
        raise _unusable("a vector without direction")
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


def _in_order(rows: list[Any]) -> list[dict[str, Any]]:
    if sorted(row.get("index", -1) if isinstance(row, dict) else -1 for row in rows) != list(
        range(len(rows))
    ):
        raise _unusable("vectors that do not say which text they belong to")
    return sorted(rows, key=lambda row: row["index"])


def _refused(response: httpx.Response) -> Exception:
    if any(mark in message_of(response) for mark in TOO_LONG):
        return TooLong()
    kind = kind_of(json_or_none(response)) or ""
    return MemoryUnavailable(
        f"embeddings: the server answered {response.status_code} {kind}".rstrip() + "; look at its log"
    )


def _unusable(what: str) -> MemoryUnavailable:
    return MemoryUnavailable(f"embeddings: the server answered with {what}; check which model it serves")
