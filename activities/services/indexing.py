"""The outbox of memory: which records have no vector yet, and the loop that sees to it that they get one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from sqlalchemy import ColumnElement, Connection, Select, func, select

from activities.services.content import get_blob
from activities.services.discreet import text_reader
from activities.services.leases import Leases
from activities.services.vectors import EMBEDDING, MEMORY
from models.errors import Final
from models.inference import DataClass

logger = logging.getLogger(__name__)


class Indexer(Protocol):
    """What the background loop needs of the memory store."""

    async def newest(self) -> int:
        """Position of the newest record, by one cheap query."""
        ...

    async def index_pending(self, limit: int = 32) -> int:
        """Give vectors to some records; how many were looked at, 0 when none is waiting."""
        ...


class Sweeper(Protocol):
    """What the sweeping loop needs of the memory store."""

    async def sweep(self, limit: int = 500) -> int:
        """Take expired records out of the indexes; how many, at most `limit`."""
        ...


@dataclass(frozen=True, slots=True)
class Pending:
    """A record that waits for its vector."""

    tenant: str
    record_id: str
    position: int
    words: str
    """Title and text; empty when the text cannot be read."""


class Outbox:
    """Which records have no vector of one model yet."""

    def __init__(self, model: str, sees: Collection[DataClass]) -> None:
        """Start from the first record; the floors then spare later queries what is known to be done.

        Records of classes that the model may not see wait for nothing.
        """
        self._model = model
        self._sees = frozenset(sees)
        self._floor = 0
        self._floors: dict[str, int] = {}

    def pending(self, connection: Connection, limit: int, skip: Iterable[tuple[str, str]]) -> list[Pending]:
        """The oldest records without a vector, except those in `skip`."""
        skipped = set(skip)
        newest = newest_position(connection)
        rows = connection.execute(self._waiting(self._floor).limit(limit + len(skipped))).all()
        self._floor = rows[0].position - 1 if rows else max(self._floor, newest)
        wanted = [row for row in rows if (row.tenant, row.record_id) not in skipped][:limit]
        return [
            Pending(r.tenant, r.record_id, r.position, _words(connection, r.tenant, r.title, r.text_digest))
            for r in wanted
        ]

    def waits(self, connection: Connection, tenant: str) -> bool:
        """Whether a record of the tenant has no vector yet."""
        # A floor for each tenant: one whose record is never taken must not slow down the others' searches.
        newest = newest_position(connection)
        floor = max(self._floor, self._floors.get(tenant, 0))
        if newest <= floor:
            return False
        # Wrapped, so that no database walks the tenant's whole index instead of what is beyond the floor.
        mine = self._waiting(floor).where(func.coalesce(MEMORY.c.tenant, "") == tenant).limit(1)
        first = connection.execute(mine).first()
        self._floors[tenant] = first.position - 1 if first else newest
        return first is not None

    def _waiting(self, floor: int) -> Select[Any, Any, Any, Any, Any]:
        m, e = MEMORY.c, EMBEDDING.c
        has = select(e.position).where(
            e.tenant == m.tenant,
            e.record_id == m.record_id,
            e.model == self._model,
            # One that is empty belongs to a record that expired once and was learned again.
            func.length(e.vector) > 0,
        )
        return (
            select(m.tenant, m.record_id, m.position, m.title, m.text_digest)
            .where(m.position > floor, m.forgotten_at.is_(None), m.standing != "expired", ~has.exists())
            .where(seen(self._sees))
            .order_by(m.position)
        )


def seen(by: Collection[DataClass]) -> ColumnElement[bool]:
    """Which records a model may be shown that may see these classes."""
    m = MEMORY.c
    permitted = m.data_class.in_(sorted(by))
    return permitted if DataClass.PERSONAL in by else permitted & m.personal.is_(False)


def newest_position(connection: Connection) -> int:
    """Position of the newest record of all tenants."""
    return int(connection.execute(select(func.coalesce(func.max(MEMORY.c.position), 0))).scalar_one())


async def keep_indexed(
    store: Indexer, stop: asyncio.Event, pause: float = 0.25, longest: float = 10.0
) -> None:
    """Index new records until `stop` is set; waits longer and longer while the embedding server is away."""
    delay, done = pause, -1
    while not stop.is_set():
        try:
            newest = await store.newest()
            while newest != done and not stop.is_set() and await store.index_pending():
                delay = pause
            done, delay = newest, pause
        except Exception as error:
            # The loop must outlive any fault of a server or database; its records wait in SQL.
            delay = min(delay * 2, longest)
            logger.warning("memory is not indexed (%s: %s); next try in %.1f s", _kind(error), error, delay)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), delay)


async def keep_swept(
    store: Sweeper, leases: Leases, stop: asyncio.Event, pause: float = 60.0, part: int = 500
) -> None:
    """Take expired records out of the indexes until `stop` is set, in one process at a time."""
    while not stop.is_set():
        try:
            epoch = await leases.take("sweeper", timedelta(seconds=3 * pause))
            while epoch is not None and await store.sweep(part) == part:
                epoch = await leases.take("sweeper", timedelta(seconds=3 * pause))
        except Exception as error:
            # No answer depends on it; what is due is still due at the next turn.
            logger.warning("expired memory was not swept (%s: %s)", _kind(error), error)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause)


def _kind(error: Exception) -> str:
    return type(error).__name__


def _words(connection: Connection, tenant: str, title: str, digest: str) -> str:
    """What is embedded of a record; a text that is missing or broken must not hold up the others."""
    try:
        opened = text_reader(connection, tenant)(title)
        body = get_blob(connection, tenant, digest).decode(errors="replace")
    except Final as error:
        logger.error("a memory of %s is not indexed: %s", tenant, error)
        return ""
    return f"{opened}\n{body}"
