"""Choosing a model, as local activities of the `decide` role: on record before the call is made."""

from __future__ import annotations

from typing import Protocol

from temporalio import activity

from activities.ordered import of_this_run
from models.orders import Fell, Routed, RouteOrder


class Choosing(Protocol):
    """The engine that knows tiers, tasks and earlier calls."""

    async def route(self, order: RouteOrder) -> Routed:
        """Choose and record."""
        ...

    async def fell(self, fell: Fell) -> None:
        """Record that a tier failed."""
        ...


class Routing:
    """Routes calls."""

    def __init__(self, choosing: Choosing) -> None:
        """All rules are the engine's."""
        self._choosing = choosing

    @activity.defn(name="route")
    async def route(self, order: RouteOrder) -> Routed:
        """Say which tiers may take a call, in order, and on which queues."""
        of_this_run(order.workflow_id)
        return await self._choosing.route(order)

    @activity.defn(name="fell")
    async def fell(self, fell: Fell) -> None:
        """Record a fallback before the next tier is tried."""
        of_this_run(fell.workflow_id)
        await self._choosing.fell(fell)
