"""Heartbeats beside work: a worker that dies is noticed long before its activity would time out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from temporalio import activity


@asynccontextmanager
async def heartbeats() -> AsyncGenerator[None]:
    """Beat at a third of the heartbeat timeout for as long as the block runs; does nothing without one."""
    limit = activity.info().heartbeat_timeout
    if not limit:
        yield
        return
    task = asyncio.create_task(_beat(limit.total_seconds() / 3))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _beat(seconds: float) -> None:
    while True:
        activity.heartbeat()
        await asyncio.sleep(seconds)
