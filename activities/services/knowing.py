"""What an agent knows about a subject, from memory that cannot be stale.

An answer is kept under the version of the belief and the standing of the records it was made from. Both are
looked up each time, which is cheap; only what follows from them is kept. What was erased, forgotten or
followed is dropped within `PAUSE`, and was out of reach before.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, select

from activities.services.beliefs import HEAD, belief_in, mine_in
from activities.services.database import Database, from_micros, insert_for, to_micros
from activities.services.discreet import names_of
from activities.services.short_term import Key, Rate, ShortTerm
from activities.services.vectors import MEMORY
from models.beliefs import Look
from models.errors import LedgerConflict, UnknownName
from models.knowledge import RECORDS, Known, Noted, Warmed
from models.tables import ShortTermUse, table

USE = table(ShortTermUse)
HOT = 200
"""How many of the subjects asked about last are had ready."""
PAUSE = 10.0
TRIES = 5
DAYS = 7
"""Over which the hit rate is shown."""
logger = logging.getLogger(__name__)


class Knowing:
    """Beliefs and records by subject, kept for a short time in this process."""

    def __init__(
        self,
        database: Database,
        short: ShortTerm,
        clock: Callable[[], datetime],
        named: Iterable[Look] = (),
    ) -> None:
        """`named` are to be had ready always; what was asked for of late joins them."""
        self._database = database
        self._short = short
        self._clock = clock
        self._named = tuple(named)
        self._hot: OrderedDict[Look, None] = OrderedDict()
        self._written = Rate(0, 0, 0)
        self._writing = asyncio.Lock()

    async def about(self, look: Look) -> Known:
        """What an agent knows of a subject now.

        Raises:
            LedgerConflict: it changed under every attempt.
        """
        self._hot[look] = None
        self._hot.move_to_end(look)
        if len(self._hot) > HOT:
            self._hot.popitem(last=False)
        for _ in range(TRIES):
            key = await self._key(look)
            # Between the two looks the subject may have been erased, version and all.
            with suppress(UnknownName):
                return await self._short.get(key, lambda key=key: self._made(look, key))
        raise LedgerConflict(f"belief: {look.agent}'s about a subject changed under every attempt; ask again")

    async def warm(self) -> Warmed:
        """Have ready what is named and what was asked for of late."""
        looks = tuple(dict.fromkeys((*self._named, *reversed(self._hot))))
        made = 0
        for look in looks:
            key = await self._key(look)
            with suppress(UnknownName):
                made += await self._short.warm([(key, lambda key=key, look=look: self._made(look, key))])
        await self.write_use()
        return Warmed(subjects=len(looks), made=made)

    async def sweep(self) -> int:
        """Drop what has been followed, forgotten or erased since; how many answers that was."""
        held, now = self._short.held(), to_micros(self._clock())
        if not held:
            return 0
        followed = await self._database.read(
            lambda link: [key for key in held if _key(link, _look(key), now) != key]
        )
        return sum(self._short.discard(key) for key in followed)

    async def write_use(self) -> None:
        """Add what was asked since the last time to the counts that everybody can read."""
        async with self._writing:
            rate, before = self._short.rate, self._written
            more = Rate(rate.hits - before.hits, rate.misses - before.misses, rate.warmed - before.warmed)
            if more != Rate(0, 0, 0):
                now = self._clock()
                await self._database.write(lambda link: _add_use(link, more, now))
                self._written = rate

    async def _key(self, look: Look) -> Key:
        now = to_micros(self._clock())
        return await self._database.read(lambda link: _key(link, look, now))

    async def _made(self, look: Look, key: Key) -> Known:
        now = to_micros(self._clock())
        return await self._database.read(lambda link: _known(link, look, key.version, now))


def use_of(connection: Connection, now: datetime) -> Rate:
    """What was asked of all processes in the last days."""
    since = now.date().toordinal() - DAYS
    sums = (func.coalesce(func.sum(USE.c[name]), 0).label(name) for name in ("hits", "misses", "warmed"))
    row = connection.execute(select(*sums).where(USE.c.day > since)).one()
    return Rate(int(row.hits), int(row.misses), int(row.warmed))


async def keep_known(knowing: Knowing, stop: asyncio.Event, pause: float = PAUSE) -> None:
    """Pre-warm, then keep clean and counted until `stop` is set."""
    await _try(knowing.warm)
    while not stop.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause)
        await _try(knowing.sweep)
        await _try(knowing.write_use)
    await _try(knowing.write_use)


async def _try(step: Callable[[], Any]) -> None:
    try:
        await step()
    except Exception as error:
        # No answer depends on it: what is not ready is made when it is asked for.
        logger.warning("the short-term cache was not kept (%s: %s)", type(error).__name__, error)


def _look(key: Key) -> Look:
    return Look(tenant=key.tenant, agent=key.question.partition(" ")[0], subject=key.subject)


def _key(connection: Connection, look: Look, now: int) -> Key:
    """The version of the belief, and a mark that differs whenever other records count."""
    mine = mine_in(connection, HEAD, look.tenant, look.agent, look.subject)
    version = connection.execute(select(HEAD.c.version).where(*mine)).scalar_one_or_none()
    m = MEMORY.c
    marks = (func.count(), func.sum(m.position), func.max(m.active_at), func.sum(m.recorded_at % 1_000_003))
    mark = connection.execute(select(*marks).where(*_counting(connection, look, now))).one()
    standing = ".".join(str(part or 0) for part in mark)
    return Key(look.tenant, look.subject, int(version or 0), f"{look.agent} {standing}")


def _known(connection: Connection, look: Look, version: int, now: int) -> Known:
    belief = belief_in(connection, look.tenant, look.agent, look.subject, version)
    counting = select(MEMORY).where(*_counting(connection, look, now))
    newest = counting.order_by(MEMORY.c.position.desc()).limit(RECORDS)
    records = tuple(
        Noted(
            record_id=row.record_id,
            version=row.text_digest,
            kind=row.kind,
            recorded_at=from_micros(row.recorded_at),
        )
        for row in connection.execute(newest)
    )
    return Known(belief=belief, records=records)


def _counting(connection: Connection, look: Look, now: int) -> tuple[Any, ...]:
    m = MEMORY.c
    return (
        m.tenant == look.tenant,
        m.subject.in_(names_of(connection, look.tenant, look.subject)),
        m.agent.in_(("", look.agent)),
        m.forgotten_at.is_(None),
        m.expires_at > now,
        m.active_at <= now,
        m.valid_from <= now,
        m.valid_to > now,
    )


def _add_use(connection: Connection, more: Rate, now: datetime) -> None:
    insert = insert_for(connection.dialect.name)
    counts = dict(hits=more.hits, misses=more.misses, warmed=more.warmed)
    fresh = insert(USE).values(day=now.date().toordinal(), **counts)
    added = {name: USE.c[name] + count for name, count in counts.items()}
    connection.execute(fresh.on_conflict_do_update(index_elements=["day"], set_=added))
