"""The Temporal surface of the model tiers: one question to one tier, with heartbeats while it thinks."""

from __future__ import annotations

from typing import Protocol

from temporalio import activity

from activities.heartbeat import heartbeats
from activities.ordered import of_this_run
from models.inference import Answered, Ask, Call, Grant


class Answers(Protocol):
    """What answers a call on one tier; `services.router.Answerer` does."""

    async def answer(
        self, tenant: str, call: Call, tier: str, grant: Grant | None = None, attempt: int = 1
    ) -> Answered:
        """A checked answer, stored."""
        ...


class Inference:
    """Activities of the infer role."""

    def __init__(self, answers: Answers) -> None:
        """Take what answers."""
        self._answers = answers

    @activity.defn
    async def answer(self, ask: Ask) -> Answered:
        """Put a call to a tier. Asking twice costs twice and changes nothing else.

        The heartbeat is also how a cancellation reaches a call that waits for a slow model.
        """
        of_this_run(ask.workflow_id)
        async with heartbeats():
            attempt = activity.info().attempt
            return await self._answers.answer(ask.tenant, ask.call, ask.tier, ask.grant, attempt)
