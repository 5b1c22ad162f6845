"""Watching over the logs: each is signed and gone round in turn, and what speaks against one is told.

What is wrong with one log keeps no other from being signed.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from contextlib import suppress

from sqlalchemy.exc import DBAPIError

from activities.services.alarms import Alarm, Alarms
from activities.services.checkpoints import Checkpoints
from activities.services.cosigning import GRAVE
from activities.services.scrubbing import Scrub
from models.errors import CountersignError, LedgerBroken

BROKEN = "log_broken"
"""The word for a log that does not continue what was signed, or does not hold together."""
EVERYBODY = "all tenants"
TORN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
TORN_STATES = ("XX001", "XX002")
"""PostgreSQL: data_corrupted, index_corrupted."""
log = logging.getLogger(__name__)


async def keep_watch(
    checkpoints: Checkpoints, scrub: Scrub, alarms: Alarms, seconds: float, stop: asyncio.Event
) -> None:
    """Sign every log and look at a part of it each `seconds`, until stopped, and once more then."""
    log.info("ledger: a checkpoint every %s seconds; later events are not yet witnessed", seconds)
    while True:
        try:
            await alarms.tell(await watch(checkpoints, scrub))
        except Exception as error:
            # The loop must outlive any fault: without it nothing is signed, and nobody would know.
            log.error("no checkpoint (%s: %s)", type(error).__name__, error)
        if stop.is_set():
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)


async def watch(checkpoints: Checkpoints, scrub: Scrub) -> list[Alarm]:
    """Look after every log once; what speaks against any of them."""
    found = list[Alarm]()
    try:
        for tenant in await checkpoints.tenants():
            found += await _look_after(checkpoints, scrub, tenant)
    except DBAPIError as error:
        found += _unread(error)
    return found


def _unread(error: DBAPIError) -> list[Alarm]:
    """A database that is away comes back by itself; one whose pages are torn does not."""
    code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
    state = getattr(error.orig, "sqlstate", None)
    if code not in TORN and state not in TORN_STATES:
        log.warning("no checkpoint: %s", error)
        return []
    log.error("the database cannot be read: %s", error.orig)
    text = f"the database cannot be read: {error.orig}; stop all workers, restore it"
    return [Alarm(EVERYBODY, BROKEN, "", text)]


async def _look_after(checkpoints: Checkpoints, scrub: Scrub, tenant: str) -> list[Alarm]:
    try:
        written = await checkpoints.write(tenant)
        await scrub.go_on(tenant)
    except LedgerBroken as error:
        log.error("%s", error.message)
        return [Alarm(tenant, BROKEN, "", error.message)]
    except (CountersignError, OSError) as error:
        log.warning("no checkpoint of %s: %s", tenant, error)
        return []
    grave = [one for one in written.alerts if one.kind in GRAVE] if written is not None else []
    return [Alarm(tenant, one.kind, one.witness, one.text) for one in grave]
