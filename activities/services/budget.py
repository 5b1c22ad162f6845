"""Money for model calls: held before the call, settled after it, and counted as spent if nobody came back.

Functions ending in `_in` run inside a transaction that is under way, so that a reservation and the route that
needs it are one commit, as are a settlement and the answer that was paid for. What an expired reservation
took is unknown, and unknown is not nothing: it counts in full until a late settlement says better. So what is
spent and held together never exceeds the cap, whoever dies when.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, Table, bindparam, select, update

from activities.services.database import Database, insert_for, to_micros
from models.budget import Account, amount_of
from models.errors import BudgetExceeded
from models.tables import BudgetRow, ModelCall, ReservationRow, table

BUDGET = table(BudgetRow)
RESERVATION = table(ReservationRow)
CALL = table(ModelCall)
LEASE = timedelta(minutes=30)
"""Longer than all tiers of a chain may take."""
BEGUN = "/begun"
"""How the id of a row ends that is no try, but says that one had money."""
SWEEP = 100
"""Leases ended in one go; the next call ends the rest."""


# Built once: putting a statement together takes longer than running it.
_RESERVED = (
    select(RESERVATION)
    .where(RESERVATION.c.tenant == bindparam("of"), RESERVATION.c.id == bindparam("named"))
    .with_for_update()
)
_CHANGE = update(RESERVATION).where(
    RESERVATION.c.tenant == bindparam("of"), RESERVATION.c.id == bindparam("named")
)
_PAID = _CHANGE.values(state=bindparam("to"), spent=bindparam("paid"))
_MOVE = (
    update(BUDGET)
    .where(BUDGET.c.account == bindparam("named"))
    .values(held=BUDGET.c.held + bindparam("more"), spent=BUDGET.c.spent + bindparam("paid"))
)
# Always in one order, so that no two transactions wait for each other.
_ACCOUNTS = (
    select(BUDGET).where(BUDGET.c.account.in_(bindparam("names", expanding=True))).order_by(BUDGET.c.account)
)
_LOCKED = _ACCOUNTS.with_for_update()
_TRIED = select(CALL.c.id).where(CALL.c.reservation == bindparam("named"), CALL.c.tenant == bindparam("of"))


@functools.cache
def _once(table: Table, dialect: str) -> Any:
    """An insert that leaves what stands there alone."""
    insert = insert_for(dialect)
    return insert(table).on_conflict_do_nothing()


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


def opened_in(link: Connection, accounts: Sequence[Account]) -> tuple[Account, ...]:
    """The accounts as they stand, locked until the transaction ends.

    Leases that ran out need not be ended first: what they hold counts as spent, so that no room comes of it.
    """
    if not accounts:
        return ()
    names = [one.name for one in accounts]
    rows = link.execute(_LOCKED, {"names": names}).all()
    if len(rows) < len(accounts):
        # A row that is not there cannot be held, and two calls could each think they are the first.
        new = [{"account": name, "held": 0, "spent": 0} for name in names]
        link.execute(_once(BUDGET, link.dialect.name), new)
        rows = link.execute(_LOCKED, {"names": names}).all()
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
    made = link.execute(_once(RESERVATION, link.dialect.name), row)
    if made.rowcount != 1:
        return False
    _move(link, hold.accounts, held=hold.worst)
    return True


def resume_in(
    link: Connection, tenant: str, reservation: str, needed: int, now: datetime, lease: timedelta = LEASE
) -> Account | None:
    """Make sure that a call that is tried once more has money for it, whatever became of what it had.

    Somebody may settle and die before saying so; tries may die until nothing is left of what was held.
    Returns the account that has no room, if there is one.
    """
    row = link.execute(_RESERVED, {"of": tenant, "named": reservation}).first()
    if row is None:
        return None
    settled = row.state == State.SETTLED
    more = max(0, needed - (0 if settled else row.worst - row.spent))
    if not more:
        return None
    caps: dict[str, int] = json.loads(row.accounts)
    accounts = [Account(name=name, currency=row.currency, cap=cap) for name, cap in caps.items()]
    for account in opened_in(link, accounts):
        if account.left < more:
            return account
    if settled:
        _move(link, caps, held=row.spent + more, spent=-row.spent)
    elif row.state == State.HELD:
        _move(link, caps, held=more)
    else:
        _move(link, caps, spent=more)
    link.execute(
        update(RESERVATION)
        .where(_is(tenant, reservation))
        .values(
            state=State.HELD if settled else row.state,
            worst=(row.spent if settled else row.worst) + more,
            expires_at=to_micros(now + lease),
        )
    )
    return None


def refuse(account: Account, worst: int) -> BudgetExceeded:
    """The error for an account that has less left than a call may take."""
    return BudgetExceeded(
        f"{account.name}: {amount_of(account.left)} {account.currency} of {amount_of(account.cap)} are left "
        f"and the call may take {amount_of(worst)}; raise the budget or wait for the next day"
    )


def pay_in(
    link: Connection,
    tenant: str,
    reservation: str | None,
    spent: Sequence[Spent],
    now: datetime,
    settle: bool,
) -> None:
    """Record tries, once per id, and count them; with `settle` what was held and not spent is given back.

    A try that comes after the settlement was paid for all the same, and an expired reservation is set right.
    """
    new = [one for one in spent if _noted(link, one, now)]
    if reservation is None:
        return
    row = link.execute(_RESERVED, {"of": tenant, "named": reservation}).first()
    if row is None:
        return
    paid = sum(one.micros or 0 for one in new)
    total = row.spent + paid
    state = State.SETTLED if settle else State(row.state)
    held, counted = _change(State(row.state), state, row.worst, row.spent, total)
    if held or counted:
        _move(link, json.loads(row.accounts), held=held, spent=counted)
    if paid or state != row.state:
        link.execute(_PAID, {"of": tenant, "named": reservation, "to": state, "paid": total})


def _change(before: State, after: State, worst: int, spent: int, total: int) -> tuple[int, int]:
    """What a payment does to the accounts: held, spent."""
    match before:
        case State.SETTLED:
            return 0, total - spent
        case State.HELD:
            return (-worst, total) if after is State.SETTLED else (0, 0)
        case State.EXPIRED:
            return (0, total - worst) if after is State.SETTLED else (0, 0)


def _noted(link: Connection, spent: Spent, now: datetime) -> bool:
    values = {name: getattr(spent, name) for name in Spent.__slots__} | {"called_at": to_micros(now)}
    return link.execute(_once(CALL, link.dialect.name), values).rowcount == 1


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
            pay_in(link, tenant, reservation, spent, self._clock(), settle=True)

        await self._database.write(work)

    async def expire(self) -> int:
        """End leases that ran out."""
        return await self._database.write(lambda link: expire_in(link, self._clock()))

    async def accounts(self, accounts: Sequence[Account]) -> tuple[Account, ...]:
        """How accounts stand."""
        return await self._database.read(lambda link: _standing(link, accounts))

    def _again(self, link: Connection, hold: Hold, now: datetime) -> Account | None:
        row = link.execute(_RESERVED, {"of": hold.tenant, "named": hold.id}).one()
        if row.state != State.SETTLED:
            return None
        return resume_in(link, hold.tenant, hold.id, hold.worst, now, self._lease)

    def _try(self, link: Connection, hold: Hold, accounts: Sequence[Account]) -> Account | None:
        now = self._clock()
        known = link.execute(select(RESERVATION.c.id).where(_is(hold.tenant, hold.id))).first()
        if known is not None:
            return self._again(link, hold, now)
        expire_in(link, now)
        for account in opened_in(link, accounts):
            if account.left < hold.worst:
                return account
        reserve_in(link, hold, now, self._lease)
        return None


def tried_in(link: Connection, tenant: str, reservation: str) -> tuple[str, ...]:
    """Ids of the tries on record for a reservation."""
    return tuple(link.execute(_TRIED, {"of": tenant, "named": reservation}).scalars())


def _standing(link: Connection, accounts: Sequence[Account]) -> tuple[Account, ...]:
    names = [one.name for one in accounts]
    return _filled(accounts, link.execute(_ACCOUNTS, {"names": names}).all())


def _filled(accounts: Sequence[Account], rows: Sequence[Row[Any]]) -> tuple[Account, ...]:
    found: dict[str, Row[Any]] = {row.account: row for row in rows}
    return tuple(
        one.model_copy(update={"held": found[one.name].held, "spent": found[one.name].spent})
        if one.name in found
        else one
        for one in accounts
    )


def _move(link: Connection, accounts: Iterable[str], held: int = 0, spent: int = 0) -> None:
    for account in sorted(accounts):
        link.execute(_MOVE, {"named": account, "more": held, "paid": spent})


def _is(tenant: str, reservation: str) -> Any:
    return (RESERVATION.c.tenant == tenant) & (RESERVATION.c.id == reservation)
