"""Actions on targets, as Temporal activities of the `act` role."""

from __future__ import annotations

from typing import Protocol

from temporalio import activity

from activities.heartbeat import heartbeats
from models.orders import Effect, EffectOrder, Planned, PlanOrder


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
    """Dry runs and effects. Every method may be called again with the same input."""

    def __init__(self, actor: Acting) -> None:
        """All decisions are the engine's."""
        self._actor = actor

    @activity.defn(name="plan")
    async def plan(self, order: PlanOrder) -> Planned:
        """Dry-run actions."""
        async with heartbeats():
            return await self._actor.plan(order)

    @activity.defn(name="apply")
    async def apply(self, order: EffectOrder) -> Effect:
        """Do one action of a passed intent, exactly once."""
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
        async with heartbeats():
            return await self._actor.settle(order)

    @activity.defn(name="undo")
    async def undo(self, order: EffectOrder) -> Effect:
        """Take an applied action back."""
        async with heartbeats():
            return await self._actor.undo(order)
