"""The activity that searches memory."""

from __future__ import annotations

from typing import Protocol

from temporalio import activity

from activities.heartbeat import heartbeats
from models.memory import Recall, Recalled


class Recaller(Protocol):
    """What searches; `services/memory_store.py` in a worker."""

    async def recall(self, request: Recall) -> Recalled:
        """Find records by meaning."""
        ...


class Memory:
    """Searches long-lived memory; asking twice changes nothing."""

    def __init__(self, store: Recaller) -> None:
        """Take what searches."""
        self._store = store

    @activity.defn(name="recall")
    async def recall(self, request: Recall) -> Recalled:
        """Find records; `degraded` says what could not be asked. What it shows, the run cannot learn."""
        run = request.run or activity.info().workflow_id or ""
        async with heartbeats():
            return await self._store.recall(request.model_copy(update={"run": run}))
