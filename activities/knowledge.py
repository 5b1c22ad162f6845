"""The activities that say what is known about a subject, and have it ready before anybody asks."""

from __future__ import annotations

from typing import Protocol

from temporalio import activity

from models.beliefs import Look
from models.knowledge import Known, Warm, Warmed


class Knower(Protocol):
    """What knows; `services/knowing.py` in a worker."""

    async def about(self, look: Look) -> Known:
        """What an agent knows."""
        ...

    async def warm(self) -> Warmed:
        """Have ready what will be asked for."""
        ...


class Knowledge:
    """Local activities: an answer is of the moment it is asked for, wherever it was kept."""

    def __init__(self, knower: Knower) -> None:
        """Take what knows."""
        self._knower = knower

    @activity.defn(name="know")
    async def know(self, look: Look) -> Known:
        """What an agent knows about a subject."""
        return await self._knower.about(look)

    @activity.defn(name="prewarm")
    async def prewarm(self, order: Warm) -> Warmed:
        """Have ready, in this process, what will be asked for."""
        return await self._knower.warm()
