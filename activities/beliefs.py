"""The activities of beliefs: owning a subject, handling its mail, reading what is believed."""

from __future__ import annotations

from typing import Protocol

from temporalio import activity

from models.beliefs import Belief, Delivered, Delivery, Look, Owning
from models.errors import LedgerConflict


class Store(Protocol):
    """Where beliefs are; `services/beliefs.py` in a worker."""

    async def own(self, owning: Owning) -> int:
        """Become the owner."""
        ...

    async def deliver(self, delivery: Delivery) -> Delivered:
        """Handle mail in order.

        Raises:
            LedgerConflict: another run owns the subject by now.
        """
        ...

    async def now(self, tenant: str, agent: str, subject: str) -> Belief:
        """What is believed."""
        ...


class Believing:
    """Local activities: each is one short transaction, and calling twice changes nothing twice."""

    def __init__(self, store: Store) -> None:
        """Take where beliefs are."""
        self._store = store

    @activity.defn(name="belief_own")
    async def own(self, owning: Owning) -> int:
        """Become the owner of a subject; its epoch."""
        return await self._store.own(owning)

    @activity.defn(name="belief_deliver")
    async def deliver(self, delivery: Delivery) -> Delivered:
        """Handle mail in order; `fenced` when another run owns the subject by now."""
        holder = activity.info().workflow_run_id or ""
        try:
            return await self._store.deliver(delivery.model_copy(update={"holder": holder}))
        except LedgerConflict:
            # Only the run knows whether it is still the owner: one that was replaced never hears this answer.
            return Delivered(fenced=True)

    @activity.defn(name="belief_read")
    async def read(self, look: Look) -> Belief:
        """What an agent believes about a subject."""
        return await self._store.now(look.tenant, look.agent, look.subject)
