"""Actions on targets, as Temporal activities of the `act` role."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Protocol

from temporalio import activity

from activities.heartbeat import heartbeats
from models.errors import ConnectorUnavailable
from models.orders import Effect, EffectOrder, Planned, PlanOrder

BEHIND, AHEAD = timedelta(seconds=1), timedelta(seconds=5)
"""By how much a worker's clock may differ from Temporal's. One that was held up looks as if it were ahead."""


class Acting(Protocol):
    """The engine that knows connectors and the ledger."""

    async def plan(self, order: PlanOrder) -> Planned:
        """Dry-run actions."""
        ...

    async def apply(self, order: EffectOrder) -> Effect:
        """Do one action, once."""
        ...

    async def verify(self, order: EffectOrder) -> Effect:
        """See it as a reader would."""
        ...

    async def settle(self, order: EffectOrder) -> Effect:
        """Find out what became of it."""
        ...

    async def undo(self, order: EffectOrder) -> Effect:
        """Take it back."""
        ...


class Actions:
    """Dry runs and effects. Every method may be called again with the same input.

    Whatever acts raises ConnectorUnavailable on a machine whose clock is off.
    """

    def __init__(self, actor: Acting, clock: Callable[[], datetime]) -> None:
        """All decisions are the engine's, by this clock."""
        self._actor = actor
        self._clock = clock

    @activity.defn(name="plan")
    async def plan(self, order: PlanOrder) -> Planned:
        """Dry-run actions."""
        async with heartbeats():
            return await self._actor.plan(order)

    @activity.defn(name="apply")
    async def apply(self, order: EffectOrder) -> Effect:
        """Do one action of a passed intent, exactly once."""
        _on_time(self._clock())
        async with heartbeats():
            return await self._actor.apply(order)

    @activity.defn(name="verify")
    async def verify(self, order: EffectOrder) -> Effect:
        """See an applied action as a reader would."""
        async with heartbeats():
            return await self._actor.verify(order)

    @activity.defn(name="settle")
    async def settle(self, order: EffectOrder) -> Effect:
        """Establish what became of an action that will not be tried again."""
        _on_time(self._clock())
        async with heartbeats():
            return await self._actor.settle(order)

    @activity.defn(name="undo")
    async def undo(self, order: EffectOrder) -> Effect:
        """Take an applied action back."""
        _on_time(self._clock())
        async with heartbeats():
            return await self._actor.undo(order)


def _on_time(now: datetime) -> None:
    """Attempts are over at a time that is written down: workers that differ about the time would overlap.

    Raises:
        ConnectorUnavailable: this worker's clock is off, or it was held up; another one may try.
    """
    off = now - activity.info().started_time
    if not -BEHIND <= off <= AHEAD:
        raise ConnectorUnavailable(
            f"clock: it is {off.total_seconds():+.0f} s off Temporal's, so nothing is done here; set it",
            next_retry_delay=timedelta(seconds=1),
        )
