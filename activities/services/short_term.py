"""Short-lived derived answers, keyed by the belief version they rest on, so that none can be stale.

Held in this process only: bounded, with a time to live, computed once however many ask at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from opentelemetry.metrics import Meter


class Use(StrEnum):
    """How an answer came about."""

    HIT = "hit"
    MISS = "miss"
    WARMED = "warmed"


Told = Callable[[Use], None]


def metered(meter: Meter) -> Told:
    """Counts every use under its name in OpenTelemetry."""
    counter = meter.create_counter("countersign.short_term", description="Answers of the short-term cache")
    return lambda use: counter.add(1, {"use": use.value})


@dataclass(frozen=True, slots=True)
class Key:
    """What an answer is about, and on which version it rests."""

    tenant: str
    subject: str
    version: int
    question: str


@dataclass(frozen=True, slots=True)
class Rate:
    """How often the cache had the answer."""

    hits: int
    misses: int
    warmed: int

    @property
    def permille(self) -> int | None:
        """Hits in a thousand; `None` before anybody asked."""
        asked = self.hits + self.misses
        return None if asked == 0 else 1000 * self.hits // asked


@dataclass(slots=True)
class _Entry:
    answer: asyncio.Future[Any]
    until: datetime


class ShortTerm:
    """Answers by key; used from one event loop."""

    def __init__(
        self, capacity: int, lasting: timedelta, clock: Callable[[], datetime], told: Told | None = None
    ) -> None:
        """Keep at most `capacity` answers, each for `lasting`; `told` hears of every use."""
        self._capacity = capacity
        self._lasting = lasting
        self._clock = clock
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._told = told
        self._used: Counter[Use] = Counter()

    @property
    def rate(self) -> Rate:
        """How often it had the answer; pre-warming does not count as asking."""
        return Rate(self._used[Use.HIT], self._used[Use.MISS], self._used[Use.WARMED])

    def __len__(self) -> int:
        """How many answers there are, over-aged ones included."""
        return len(self._entries)

    async def get(self, key: Key, make: Callable[[], Awaitable[Any]]) -> Any:
        """The answer, made if there is none; a failure is not kept."""
        while (entry := self._alive(key)) is not None:
            await asyncio.wait([entry.answer])
            # Who was making it was cancelled, and nobody else is by that.
            if not entry.answer.cancelled():
                self._count(Use.HIT)
                return entry.answer.result()
        self._count(Use.MISS)
        return await self._make(key, make)

    async def warm(self, wanted: Iterable[tuple[Key, Callable[[], Awaitable[Any]]]]) -> int:
        """Make answers before anybody asks; how many were missing."""
        made = 0
        for key, make in wanted:
            if self._alive(key) is None:
                await self._make(key, make)
                self._count(Use.WARMED)
                made += 1
        return made

    def drop(self, tenant: str, subject: str) -> int:
        """Forget everything about a subject; how many answers that was."""
        gone = [key for key in self._entries if (key.tenant, key.subject) == (tenant, subject)]
        for key in gone:
            del self._entries[key]
        return len(gone)

    def held(self) -> tuple[Key, ...]:
        """What there are answers to; over-aged ones are dropped."""
        now = self._clock()
        for key in [key for key, entry in self._entries.items() if entry.until <= now]:
            del self._entries[key]
        return tuple(self._entries)

    def discard(self, key: Key) -> bool:
        """Forget one answer; whether there was one."""
        return self._entries.pop(key, None) is not None

    def holds(self, tenant: str, subject: str) -> int:
        """How many answers there are about a subject."""
        return sum((key.tenant, key.subject) == (tenant, subject) for key in self._entries)

    def _count(self, use: Use) -> None:
        self._used[use] += 1
        if self._told is not None:
            self._told(use)

    def _alive(self, key: Key) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None or entry.until <= self._clock():
            self._entries.pop(key, None)
            return None
        self._entries.move_to_end(key)
        return entry

    async def _make(self, key: Key, make: Callable[[], Awaitable[Any]]) -> Any:
        entry = _Entry(asyncio.get_running_loop().create_future(), self._clock() + self._lasting)
        self._entries[key] = entry
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        try:
            answer = await make()
        except asyncio.CancelledError:
            self._lost(key, entry)
            entry.answer.cancel()
            raise
        except BaseException as error:
            self._lost(key, entry)
            entry.answer.set_exception(error)
            # Whoever waited for it gets the error too; if nobody did, that is no fault of theirs.
            entry.answer.exception()
            raise
        entry.answer.set_result(answer)
        return answer

    def _lost(self, key: Key, entry: _Entry) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]
