"""How many calls wait for each tier, so that a deadline is held against the line and not only the work.

Work waits in Temporal's queues, which know their length. A route is never held up to learn it: the last count
is used while it is young, and a new one is asked for beside. That nothing waits says nothing of what is under
way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from activities.services.routes import Sensing
from models.routing import Telemetry
from models.settings import TierSettings

FRESH, OLD = 1.0, 10.0
"""Seconds after which a count is asked for again, and after which it is not believed any more."""


@dataclass(frozen=True, slots=True)
class Line:
    """What stands in a queue, and by how many processes it is served."""

    waiting: int
    served_by: int


Count = Callable[[str], Awaitable[Line | None]]
"""Counts a queue by its name; `None` if it cannot be told."""


class Loads:
    """Telemetry with the lines before the tiers laid over it."""

    def __init__(
        self,
        sensing: Sensing,
        tiers: Sequence[TierSettings],
        queue: Callable[[str], str],
        count: Count,
        ticks: Callable[[], float],
    ) -> None:
        """Take where telemetry comes from otherwise, the tiers and their queues, and what counts those."""
        self._sensing = sensing
        self._tiers = {tier.name: tier for tier in tiers}
        self._queue = queue
        self._count = count
        self._ticks = ticks
        self._seen: dict[str, tuple[float, Line | None]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    async def of(self, task: str) -> Mapping[str, Telemetry]:
        """Telemetry by tier, for one task."""
        known = await self._sensing.of(task)
        lines = {name: self._line(name) for name in self._tiers}
        laid = {name: self._laid_over(name, known, line) for name, line in lines.items() if line is not None}
        return {**known, **laid}

    def fell(self, tier: str, kind: str) -> None:
        """A tier failed a call; that is for others to judge."""
        self._sensing.fell(tier, kind)

    async def counted(self) -> None:
        """Wait until the counts that are asked for have come."""
        await asyncio.gather(*self._asking.values())

    async def close(self) -> None:
        """Ask no more."""
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)

    def _line(self, tier: str) -> Line | None:
        now = self._ticks()
        at, line = self._seen.get(tier, (None, None))
        if (at is None or now - at >= FRESH) and tier not in self._asking:
            self._asking[tier] = asyncio.create_task(self._ask(tier))
        return line if at is not None and now - at < OLD else None

    async def _ask(self, tier: str) -> None:
        try:
            self._seen[tier] = (self._ticks(), await self._count(self._queue(tier)))
        finally:
            del self._asking[tier]

    def _laid_over(self, name: str, known: Mapping[str, Telemetry], line: Line) -> Telemetry:
        telemetry = known.get(name, Telemetry())
        if line.waiting == 0:
            return telemetry
        # A line forms only behind servers that are busy, or away, and then nobody knows when they come back.
        room = self._tiers[name].concurrency * max(1, line.served_by)
        return telemetry.model_copy(update={"busy": room + line.waiting, "room": room})
