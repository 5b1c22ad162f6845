"""Money for model calls: held before the call, settled after it, and counted as spent if nobody came back.

Functions ending in `_in` run inside a transaction that is under way, so that a reservation and the route that
needs it are one commit, as are a settlement and the answer that was paid for. What an expired reservation
took is unknown, and unknown is not nothing: it counts in full until a late settlement says better. So what is
spent and held together never exceeds the cap, whoever dies when.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from activities.services.database import Database, to_micros
from models.budget import Account, amount_of
from models.errors import BudgetExceeded
from models.tables import BudgetRow, ModelCall, ReservationRow, table

BUDGET = table(BudgetRow)
RESERVATION = table(ReservationRow)
CALL = table(ModelCall)
LEASE = timedelta(minutes=30)
"""Longer than all tiers of a chain may take."""
SWEEP = 100
"""Leases ended in one go; the next call ends the rest."""


class State(StrEnum):
    """What became of money that was held."""

    HELD = "held"
    SETTLED = "settled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Hold:
    """Money to be held for one call; `id` derives from the workflow and the number of the call in it."""

    tenant: str
    id: str
    workflow_id: str
    agent: str
    task: str
    accounts: Mapping[str, int]
    """What they may spend, by name."""
    currency: str
    worst: int


@dataclass(frozen=True, slots=True)
class Spent:
    """One try at one tier and what it took; `micros` is `None` where there is no price."""

    id: str
    tenant: str
    tier: str
    task: str
    model: str
    milliseconds: int
    prompt_tokens: int
    completion_tokens: int
    usable: bool = True
    reservation: str | None = None
    micros: int | None = None
    currency: str | None = None


def opened_in(link: Connection, accounts: Sequence[Account], now: datetime) -> tuple[Account, ...]:
    """The accounts as they stand, locked until the transaction ends; leases that ran out are ended first."""
    if not accounts:
        return ()
    expire_in(link, now)
    names = [one.name for one in accounts]
    rows = link.execute(_locked(names)).all()
    if len(rows) < len(accounts):
        # A row that is not there cannot be held, and two calls could each think they are the first.
        new = [{"account": name, "held": 0, "spent": 0} for name in names]
        link.execute(_insert(link)(BUDGET).values(new).on_conflict_do_nothing())
        rows = link.execute(_locked(names)).all()
    return _filled(accounts, rows)


def reserve_in(link: Connection, hold: Hold, now: datetime, lease: timedelta = LEASE) -> bool:
    """Hold the money, once per id; whether there is room was seen in this transaction, by `opened_in`.

    Returns whether this call did it; `False` when it is held, settled or expired already.
    """
    row = {
        "tenant": hold.tenant,
        "id": hold.id,
        "workflow_id": hold.workflow_id,
        "agent": hold.agent,
        "task": hold.task,
        "state": State.HELD,
        "accounts": json.dumps(dict(sorted(hold.accounts.items()))),
        "currency": hold.currency,
        "worst": hold.worst,
        "spent": 0,
        "expires_at": to_micros(now + lease),
    }
    made = link.execute(_insert(link)(RESERVATION).values(**row).on_conflict_do_nothing())
    if made.rowcount != 1:
        return False
    _move(link, hold.accounts, held=hold.worst)
    return True


def resume_in(
    link: Connection, tenant: str, reservation: str, now: datetime, lease: timedelta = LEASE
) -> Account | None:
    """Hold the money of a settled reservation again, for a call that is tried once more all the same.

    Somebody may settle and die before saying so. Returns the account that has no room, if there is one.
    """
    row = link.execute(select(RESERVATION).where(_is(tenant, reservation)).with_for_update()).first()
    if row is None or row.state != State.SETTLED:
        return None
    caps: dict[str, int] = json.loads(row.accounts)
    accounts = [Account(name=name, currency=row.currency, cap=cap) for name, cap in caps.items()]
    for account in opened_in(link, accounts, now):
        if account.left < row.worst - row.spent:
            return account
    _move(link, caps, held=row.worst, spent=-row.spent)
    values = {"state": State.HELD, "expires_at": to_micros(now + lease)}
    link.execute(update(RESERVATION).where(_is(tenant, reservation)).values(**values))
    return None


def refuse(account: Account, worst: int) -> BudgetExceeded:
    """The error for an account that has less left than a call may take."""
    return BudgetExceeded(
        f"{account.name}: {amount_of(account.left)} {account.currency} of {amount_of(account.cap)} are left "
        f"and the call may take {amount_of(worst)}; raise the budget or wait for the next day"
    )


def note_in(link: Connection, spent: Spent, now: datetime) -> bool:
    """Record a try, once per id, and count it against its reservation, which stays as it is otherwise."""
    values = {name: getattr(spent, name) for name in Spent.__slots__} | {"called_at": to_micros(now)}
    made = link.execute(_insert(link)(CALL).values(**values).on_conflict_do_nothing())
    if made.rowcount != 1:
        return False
    if spent.reservation is not None and spent.micros:
        link.execute(
            update(RESERVATION)
            .where(_is(spent.tenant, spent.reservation))
            .values(spent=RESERVATION.c.spent + spent.micros)
        )
    return True


def settle_in(link: Connection, tenant: str, reservation: str) -> None:
    """Give back what was held and not spent; an expired reservation is set right."""
    row = link.execute(select(RESERVATION).where(_is(tenant, reservation)).with_for_update()).first()
    if row is None or row.state == State.SETTLED:
        return
    accounts = json.loads(row.accounts)
    if row.state == State.HELD:
        _move(link, accounts, held=-row.worst, spent=row.spent)
    else:
        _move(link, accounts, spent=row.spent - row.worst)
    link.execute(update(RESERVATION).where(_is(tenant, reservation)).values(state=State.SETTLED))


def late_in(link: Connection, spent: Spent) -> None:
    """Count a try that was noted after its reservation had been settled: it was paid for all the same."""
    if spent.reservation is None or not spent.micros:
        return
    row = link.execute(select(RESERVATION).where(_is(spent.tenant, spent.reservation))).first()
    if row is not None and row.state == State.SETTLED:
        _move(link, json.loads(row.accounts), spent=spent.micros)


def expire_in(link: Connection, now: datetime) -> int:
    """End leases that ran out; what they held counts as spent. Returns how many."""
    query = (
        select(RESERVATION)
        .where(RESERVATION.c.state == State.HELD, RESERVATION.c.expires_at <= to_micros(now))
        .order_by(RESERVATION.c.expires_at)
        .limit(SWEEP)
        .with_for_update(skip_locked=True)
    )
    rows = link.execute(query).all()
    for row in rows:
        counted = max(row.worst, row.spent)
        _move(link, json.loads(row.accounts), held=-row.worst, spent=counted)
        values = {"state": State.EXPIRED, "worst": counted}
        link.execute(update(RESERVATION).where(_is(row.tenant, row.id)).values(**values))
    return len(rows)


class Books:
    """Reservations as a process uses them, one durable transaction each."""

    def __init__(self, database: Database, clock: Callable[[], datetime], lease: timedelta = LEASE) -> None:
        """The clock ends leases."""
        self._database = database
        self._clock = clock
        self._lease = lease

    async def reserve(self, hold: Hold, accounts: Sequence[Account]) -> None:
        """Hold money against accounts, or learn that there is not enough; the same id again changes nothing.

        Raises:
            BudgetExceeded: an account has less left than the call may take.
        """
        short = await self._database.write(lambda link: self._try(link, hold, accounts))
        if short is not None:
            raise refuse(short, hold.worst)

    async def settle(self, tenant: str, reservation: str, spent: Sequence[Spent] = ()) -> None:
        """Record what was spent and give the rest back."""

        def work(link: Connection) -> None:
            now = self._clock()
            for one in spent:
                if note_in(link, one, now):
                    late_in(link, one)
            settle_in(link, tenant, reservation)

        await self._database.write(work)

    async def expire(self) -> int:
        """End leases that ran out."""
        return await self._database.write(lambda link: expire_in(link, self._clock()))

    async def accounts(self, accounts: Sequence[Account]) -> tuple[Account, ...]:
        """How accounts stand."""
        return await self._database.read(lambda link: _standing(link, accounts))

    def _try(self, link: Connection, hold: Hold, accounts: Sequence[Account]) -> Account | None:
        now = self._clock()
        known = link.execute(select(RESERVATION.c.id).where(_is(hold.tenant, hold.id))).first()
        if known is not None:
            return resume_in(link, hold.tenant, hold.id, now, self._lease)
        for account in opened_in(link, accounts, now):
            if account.left < hold.worst:
                return account
        reserve_in(link, hold, now, self._lease)
        return None


def tried_in(link: Connection, tenant: str, reservation: str) -> tuple[str, ...]:
    """Ids of the tries on record for a reservation."""
    query = select(CALL.c.id).where(CALL.c.reservation == reservation, CALL.c.tenant == tenant)
    return tuple(link.execute(query).scalars())


def _standing(link: Connection, accounts: Sequence[Account]) -> tuple[Account, ...]:
    names = [one.name for one in accounts]
    return _filled(accounts, link.execute(select(BUDGET).where(BUDGET.c.account.in_(names))).all())


def _filled(accounts: Sequence[Account], rows: Sequence[Row[Any]]) -> tuple[Account, ...]:
    found: dict[str, Row[Any]] = {row.account: row for row in rows}
    return tuple(
        one.model_copy(update={"held": found[one.name].held, "spent": found[one.name].spent})
        if one.name in found
        else one
        for one in accounts
    )


def _locked(names: Sequence[str]) -> Any:
    # Always in one order, so that no two transactions wait for each other.
    return select(BUDGET).where(BUDGET.c.account.in_(names)).order_by(BUDGET.c.account).with_for_update()


def _move(link: Connection, accounts: Iterable[str], held: int = 0, spent: int = 0) -> None:
    for account in sorted(accounts):
        link.execute(
            update(BUDGET)
            .where(BUDGET.c.account == account)
            .values(held=BUDGET.c.held + held, spent=BUDGET.c.spent + spent)
        )


def _is(tenant: str, reservation: str) -> Any:
    return (RESERVATION.c.tenant == tenant) & (RESERVATION.c.id == reservation)


def _insert(link: Connection) -> Any:
    return sqlite_insert if link.dialect.name == "sqlite" else pg_insert
