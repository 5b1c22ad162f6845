"""Takes away what nothing will ask for again: answers that were kept for identical calls and have expired."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta

from activities.services.cache import sweep_in
from activities.services.database import Database
from activities.services.leases import Leases

logger = logging.getLogger(__name__)


async def keep_tidy(
    database: Database,
    clock: Callable[[], datetime],
    leases: Leases,
    stop: asyncio.Event,
    pause: float = 60.0,
) -> None:
    """Delete expired answers until `stop` is set, in one process at a time."""
    while not stop.is_set():
        try:
            if await leases.take("cache sweeper", timedelta(seconds=3 * pause)) is not None:
                await database.write(lambda link: sweep_in(link, clock()))
        except Exception as error:
            # No answer depends on it: an expired one is given to nobody, and is still there at the next turn.
            logger.warning("expired answers were not swept (%s: %s)", type(error).__name__, error)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause)
