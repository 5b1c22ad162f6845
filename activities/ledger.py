"""Bookkeeping of a run, as local activities of the `decide` role: short, idempotent, one commit each."""

from __future__ import annotations

from typing import Protocol

from temporalio import activity

from activities.heartbeat import heartbeats
from activities.ordered import of_this_run
from models.ledger import Append, Appended
from models.orders import Admission, Admitted, Conclusion, Presentation, Presented


class Admitting(Protocol):
    """Knows which requests were taken and how they ended."""

    async def admit(self, admission: Admission) -> Admitted:
        """Say whether a run may start, and from where."""
        ...

    async def conclude(self, conclusion: Conclusion) -> Appended:
        """Log the end."""
        ...


class Appending(Protocol):
    """The ledger."""

    async def append(self, wish: Append) -> Appended:
        """Append at a version."""
        ...


class Presenting(Protocol):
    """Binds intents."""

    async def present(self, presentation: Presentation) -> Presented:
        """Bind and log."""
        ...


class Ledger:
    """What a run writes down before each next step; PolicyDenied where it is ordered by anybody else."""

    def __init__(self, requests: Admitting, ledger: Appending, intents: Presenting) -> None:
        """All three share one database."""
        self._requests = requests
        self._ledger = ledger
        self._intents = intents

    @activity.defn(name="admit")
    async def admit(self, admission: Admission) -> Admitted:
        """Claim the request key and say what already happened."""
        of_this_run(admission.workflow_id)
        return await self._requests.admit(admission)

    @activity.defn(name="record")
    async def record(self, wish: Append) -> Appended:
        """Append to the run's stream, or learn what stands there."""
        of_this_run(wish.stream)
        async with heartbeats():
            return await self._ledger.append(wish)

    @activity.defn(name="present")
    async def present(self, presentation: Presentation) -> Presented:
        """Bind and log an intent."""
        of_this_run(presentation.append.stream)
        return await self._intents.present(presentation)

    @activity.defn(name="conclude")
    async def conclude(self, conclusion: Conclusion) -> Appended:
        """Log the outcome and keep what is worth remembering."""
        of_this_run(conclusion.append.stream)
        return await self._requests.conclude(conclusion)
