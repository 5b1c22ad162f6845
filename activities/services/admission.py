"""How many calls an endpoint gets at once: grown by one per round of good answers, halved by back-pressure.

Waiting happens here, in order of arrival, where a call can still be counted, cancelled and sent elsewhere,
and not in a model server's queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress

CUT_SECONDS = 1.0
"""Many refusals of one moment are one message."""


class Admission:
    """The door to one endpoint."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        """`most` is what the server can really run at once; the clock counts seconds."""
        self._most = most
        self._limit = float(most)
        self._clock = clock
        self._cut_at = float("-inf")
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.busy = 0
        self.share = 100
        """Percent of the room to use; less while an endpoint comes back."""

    @property
    def room(self) -> int:
        """How many calls may be under way now; never less than one, so that a recovery is noticed."""
        return max(1, int(self._limit) * self.share // 100)

    @property
    def queue(self) -> int:
        """Calls that wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def entered(self) -> AsyncGenerator[None]:
        """Wait for a place and hold it for as long as the block lasts."""
        await self._enter()
        try:
            yield
        finally:
            self.busy -= 1
            self._let_in()

    def good(self) -> None:
        """An answer came: one more per round."""
        self._limit = min(float(self._most), self._limit + 1 / self._limit)
        self._let_in()

    def pressed(self) -> None:
        """The server was full: half as many from now on."""
        now = self._clock()
        if now - self._cut_at >= CUT_SECONDS:
            self._limit, self._cut_at = max(1.0, self._limit / 2), now

    async def _enter(self) -> None:
        if self.busy < self.room and not self._waiting:
            self.busy += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                # Let in and cancelled in the same moment: the place goes to the next one.
                self.busy -= 1
                self._let_in()
            else:
                with suppress(ValueError):
                    self._waiting.remove(place)
            raise

    def _let_in(self) -> None:
        while self._waiting and self.busy < self.room:
            place = self._waiting.popleft()
            if not place.done():
                self.busy += 1
                place.set_result(None)
