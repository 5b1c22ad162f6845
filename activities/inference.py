"""The Temporal surface of the model tiers: one question to one tier, with heartbeats while it thinks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Protocol

from temporalio import activity

from models.inference import Answered, Ask, Call

HEARTBEAT = timedelta(seconds=5)


class Answers(Protocol):
    """What answers a call on one tier; `services.router.Answerer` does."""

    async def answer(self, tenant: str, call: Call, tier: str) -> Answered:
        """A checked answer, stored."""
        ...


class Inference:
    """Activities of the infer role."""

    def __init__(self, answers: Answers, heartbeat: timedelta = HEARTBEAT) -> None:
        """Take what answers, and how often to tell Temporal that it still does."""
        self._answers = answers
        self._heartbeat = heartbeat

    @activity.defn
    async def answer(self, ask: Ask) -> Answered:
        """Put a call to a tier. Asking twice costs twice and changes nothing else."""
        async with _beating(self._heartbeat):
            return await self._answers.answer(ask.tenant, ask.call, ask.tier)


@contextlib.asynccontextmanager
async def _beating(every: timedelta) -> AsyncGenerator[None]:
    """Heartbeat in the background; that is also how a cancellation reaches the waiting call."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(every.total_seconds())
            activity.heartbeat()

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
