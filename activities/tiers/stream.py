"""Server-sent events read as they come, with bounds on size and on every kind of waiting.

Own and small, because a library would hide three things that matter here: errors inside a stream, comments
that keep a connection alive without being progress, and an end without a reason.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from typing import Any

import httpx

from models.inference import TimeLimit
from models.settings import TierSettings

MOST_BYTES = 16 * 2**20
"""Of one answer, decompressed."""
LONGEST_LINE = 2**20
DRAIN_SECONDS = 0.1
LINE_END = re.compile(rb"\r\n|\n|\r(?=[^\n])")


class TooMuch(Exception):
    """The server sends more than any answer can be, or what could become more."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event; `field` is `data`, or `error` as older llama.cpp servers name it."""

    field: str
    data: str


class Events:
    """Turns pieces of bytes, however they were cut, into events."""

    def __init__(self) -> None:
        """Nothing read yet."""
        self._rest = bytearray()
        self._lines: list[str] = []
        self._field = "data"

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that are whole now; one that is cut off by the end of the stream never is.

        Raises:
            TooMuch: a line without end.
            UnicodeDecodeError: it is no UTF-8.
        """
        # Only a piece that may end a line is worth looking through all that came before it.
        ends = b"\n" in piece or b"\r" in piece or self._rest.endswith(b"\r")
        self._rest += piece
        *lines, rest = LINE_END.split(self._rest) if ends else (self._rest,)
        if len(rest) > LONGEST_LINE:
            raise TooMuch(f"a line of more than {LONGEST_LINE} bytes")
        self._rest = rest
        for line in lines:
            if line:
                self._take(line.decode())
            elif self._lines:
                yield Event(self._field, "\n".join(self._lines))
                self._lines = []

    def _take(self, line: str) -> None:
        field, _, value = line.partition(":")
        # An empty name is a comment, which servers send so that nobody closes the connection.
        if field in ("data", "error"):
            self._field = field
            self._lines.append(value.removeprefix(" "))


@dataclass(frozen=True, slots=True)
class Limits:
    """How long each part may take, in seconds; `None` has no limit of its own."""

    connect: float
    first_token: float | None
    idle: float | None
    total: float

    @classmethod
    def of(cls, settings: TierSettings) -> Limits:
        """As the settings say; the first token has its own limit in any case.

        Only that one speaks of the server: a whole answer may be late because much was asked for.
        """
        return cls(
            connect=settings.connect_seconds,
            first_token=settings.first_token_seconds or settings.timeout_seconds * 0.75,
            idle=settings.idle_seconds,
            total=settings.timeout_seconds,
        )


class Watch:
    """The limits of one attempt, running; a `TimeoutError` leaves the block when one runs out."""

    def __init__(self, limits: Limits) -> None:
        """Start with `async with`."""
        self._idle = limits.idle
        self._whole = asyncio.timeout(limits.total)
        self._pause = asyncio.timeout(limits.first_token)
        self._stack = AsyncExitStack()
        self._begun = False

    async def __aenter__(self) -> Watch:
        await self._stack.enter_async_context(self._whole)
        await self._stack.enter_async_context(self._pause)
        return self

    async def __aexit__(self, *raised: Any) -> None:
        await self._stack.__aexit__(*raised)

    def progress(self) -> None:
        """A token came; from now on the pause between tokens counts."""
        self._begun = True
        now = asyncio.get_running_loop().time()
        self._pause.reschedule(None if self._idle is None else now + self._idle)

    @property
    def ran_out(self) -> TimeLimit:
        """Which limit it was."""
        if self._whole.expired() or not self._pause.expired():
            return TimeLimit.TOTAL
        return TimeLimit.IDLE if self._begun else TimeLimit.FIRST_TOKEN


async def pieces(response: httpx.Response, most: int = MOST_BYTES) -> AsyncGenerator[bytes]:
    """The body as it comes.

    Raises:
        TooMuch: it is larger than `most`, or packed, though nothing packed was asked for.
    """
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise TooMuch("a packed body")
    size = 0
    async for piece in response.aiter_bytes():
        size += len(piece)
        if size > most:
            raise TooMuch(f"more than {most} bytes")
        yield piece


async def whole(response: httpx.Response, most: int = MOST_BYTES) -> bytes:
    """The whole body.

    Raises:
        TooMuch: it is larger than `most`.
    """
    async with aclosing(pieces(response, most)) as body:
        return b"".join([piece async for piece in body])


async def beginning(response: httpx.Response, most: int) -> bytes:
    """What can be had of a body that matters little: nothing of a packed one, the rest up to about `most`."""
    content = b""
    with suppress(TooMuch, httpx.ReadError):
        async with aclosing(pieces(response, most)) as body:
            async for piece in body:
                content += piece
    return content


async def drain(response: AsyncIterator[bytes]) -> None:
    """Read what little follows the last event, so that the connection can be used again."""
    with suppress(TimeoutError, httpx.HTTPError, TooMuch):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for _ in response:
                pass
