"""Leases for the few jobs that only one process may do; the epoch fences off whoever did it before."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import Connection, select, update

from activities.services.database import Database, insert_for, to_micros
from models.errors import LedgerConflict
from models.tables import Lease, table

LEASE = table(Lease)


class Leases:
    """Leases as one holder sees them."""

    def __init__(self, database: Database, holder: str, clock: Callable[[], datetime]) -> None:
        """The holder's name must be its process's own."""
        self._database = database
        self._holder = holder
        self._clock = clock

    async def take(self, name: str, lasting: timedelta) -> int | None:
        """Take or renew a lease: its epoch, or `None` while somebody else has it."""
        now = self._clock()
        return await self._database.write(lambda link: take_in(link, name, self._holder, lasting, now))

    async def give_back(self, name: str, epoch: int) -> None:
        """Let the next one have it at once."""
        mine = (LEASE.c.name == name, LEASE.c.holder == self._holder, LEASE.c.epoch == epoch)
        await self._database.write(lambda link: link.execute(update(LEASE).where(*mine).values(expires_at=0)))


def take_in(connection: Connection, name: str, holder: str, lasting: timedelta, now: datetime) -> int | None:
    """Take or renew a lease inside a transaction; a new holder gets the next epoch."""
    kind = insert_for(connection.dialect.name)
    blank = dict(name=name, holder="", epoch=0, expires_at=0)
    connection.execute(kind(LEASE).values(**blank).on_conflict_do_nothing())
    row = connection.execute(select(LEASE).where(LEASE.c.name == name).with_for_update()).one()
    if row.holder != holder and row.expires_at > to_micros(now):
        return None
    # Whoever let it run out may have been followed and not know it: it starts over as well.
    renews = row.holder == holder and row.expires_at > to_micros(now)
    epoch = int(row.epoch) + (not renews)
    values = dict(holder=holder, epoch=epoch, expires_at=to_micros(now + lasting))
    connection.execute(update(LEASE).where(LEASE.c.name == name).values(**values))
    return epoch


def seize_in(connection: Connection, name: str, holder: str, now: datetime) -> int:
    """Take a lease from whoever has it, for one whom something else has made the only one."""
    kind = insert_for(connection.dialect.name)
    blank = dict(name=name, holder="", epoch=0, expires_at=to_micros(now))
    connection.execute(kind(LEASE).values(**blank).on_conflict_do_nothing())
    row = connection.execute(select(LEASE).where(LEASE.c.name == name).with_for_update()).one()
    if row.holder == holder:
        return int(row.epoch)
    values = dict(holder=holder, epoch=row.epoch + 1)
    connection.execute(update(LEASE).where(LEASE.c.name == name).values(**values))
    return int(row.epoch) + 1


def check_in(connection: Connection, name: str, epoch: int, holder: str = "") -> None:
    """Refuse a protected write of a former holder, or of another one; in the transaction of that write.

    Raises:
        LedgerConflict: somebody else has taken over.
    """
    query = select(LEASE.c.epoch, LEASE.c.holder).where(LEASE.c.name == name).with_for_update()
    row = connection.execute(query).first()
    now = row.epoch if row is not None else None
    if row is None or now != epoch:
        raise LedgerConflict(f"lease: {name} epoch {epoch} was followed by {now}; take it again first")
    if holder and row.holder != holder:
        raise LedgerConflict(f"lease: {name} epoch {epoch} is somebody else's; take it yourself first")
