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
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, select, update

from activities.services.additions import Addition, Key
from activities.services.database import Database, to_micros
from activities.services.statements import Statement
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


# Given to the driver as they are: SQLAlchemy's own way of running them takes longer than the database does.
_NAMED = (RESERVATION.c.tenant == bindparam("of")) & (RESERVATION.c.id == bindparam("named"))
_FOUND = Statement(
    select(
        RESERVATION.c.state,
        RESERVATION.c.accounts,
        RESERVATION.c.currency,
        RESERVATION.c.worst,
        RESERVATION.c.spent,
    )
    .where(_NAMED)
    .with_for_update()
)
_PAID = Statement(update(RESERVATION).where(_NAMED).values(state=bindparam("to"), spent=bindparam("paid")))
_MOVE = Statement(
    update(BUDGET)
    .where(BUDGET.c.account == bindparam("named"))
    .values(held=BUDGET.c.held + bindparam("more"), spent=BUDGET.c.spent + bindparam("paid"))
)
_ACCOUNT = select(BUDGET.c.held, BUDGET.c.spent).where(BUDGET.c.account == bindparam("named"))
_STANDING = Statement(_ACCOUNT)
_LOCKED = Statement(_ACCOUNT.with_for_update())
_TRIED = Statement(
    select(CALL.c.id).where(CALL.c.reservation == bindparam("named"), CALL.c.tenant == bindparam("of"))
)
_NEW_ACCOUNTS = Addition(BUDGET)
_NEW_RESERVATIONS = Addition(RESERVATION)
_NEW_CALLS = Addition(CALL)


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


@dataclass(frozen=True, slots=True)
class Payment:
    """What tries took; with `settle` nobody will try again, and the rest is given back."""

    tenant: str
    reservation: str | None
    spent: Sequence[Spent] = ()
    settle: bool = True


_Move = tuple[Iterable[str], int, int]
"""Accounts, and what is added to each: held, spent."""


class _Found(NamedTuple):
    """A reservation as it stands, locked."""

    state: str
    accounts: str
    currency: str
    worst: int
    spent: int


def opened_in(link: Connection, accounts: Sequence[Account]) -> tuple[Account, ...]:
    """The accounts as they stand, locked until the transaction ends.

    Leases that ran out need not be ended first: what they hold counts as spent, so that no room comes of it.
    """
    found = _balances(link, _LOCKED, accounts)
    missing = [one.name for one in accounts if one.name not in found]
    if missing:
        # A row that is not there cannot be held, and two calls could each think they are the first.
        _NEW_ACCOUNTS.run(link, [{"account": name, "held": 0, "spent": 0} for name in missing])
        found = _balances(link, _LOCKED, accounts)
    return _filled(accounts, found)


def reserve_in(link: Connection, hold: Hold, now: datetime, lease: timedelta = LEASE) -> bool:
    """Hold the money, once per id; whether there is room was seen in this transaction, by `opened_in`.

    Returns whether this call did it; `False` when it is held, settled or expired already.
    """
    return reserve_all_in(link, [hold], now, lease) == 1


def reserve_all_in(link: Connection, holds: Sequence[Hold], now: datetime, lease: timedelta = LEASE) -> int:
    """The same for several, of one tenant or many, whose ids differ; returns how many were new."""
    ends = to_micros(now + lease)
    new = _NEW_RESERVATIONS.run(link, [_row(hold, ends) for hold in holds])
    made = [hold for hold in holds if (hold.tenant, hold.id) in new]
    _move_all(link, [(hold.accounts, hold.worst, 0) for hold in made])
    return len(made)


def _row(hold: Hold, ends: int) -> dict[str, Any]:
    return {
        "tenant": hold.tenant,
        "id": hold.id,
        "workflow_id": hold.workflow_id,
        "agent": hold.agent,
        "task": hold.task,
        "state": State.HELD.value,
        "accounts": json.dumps(dict(sorted(hold.accounts.items()))),
        "currency": hold.currency,
        "worst": hold.worst,
        "spent": 0,
        "expires_at": ends,
    }


def resume_in(
    link: Connection, tenant: str, reservation: str, needed: int, now: datetime, lease: timedelta = LEASE
) -> Account | None:
    """Make sure that a call that is tried once more has money for it, whatever became of what it had.

    Somebody may settle and die before saying so; tries may die until nothing is left of what was held.
    Returns the account that has no room, if there is one.
    """
    row = _found(link, tenant, reservation)
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
    pay_all_in(link, [Payment(tenant, reservation, spent, settle)], now)


def pay_all_in(link: Connection, payments: Sequence[Payment], now: datetime) -> None:
    """The same for several, in this order."""
    called_at = to_micros(now)
    new = _NEW_CALLS.run(link, [_call(one, called_at) for payment in payments for one in payment.spent])
    moves = [_paid(link, payment, new) for payment in payments]
    _move_all(link, [move for move in moves if move is not None])


def _paid(link: Connection, payment: Payment, new: set[Key]) -> _Move | None:
    """Put one payment on its reservation; returns what that does to its accounts."""
    fresh = [one for one in payment.spent if (one.id,) in new]
    # Who brings the same try twice pays once.
    new.difference_update((one.id,) for one in fresh)
    row = None if payment.reservation is None else _found(link, payment.tenant, payment.reservation)
    if row is None:
        return None
    paid = sum(one.micros or 0 for one in fresh)
    before, total = State(row.state), row.spent + paid
    after = State.SETTLED if payment.settle else before
    if paid or after is not before:
        values = {"of": payment.tenant, "named": payment.reservation, "to": after.value, "paid": total}
        _PAID.run(link, values)
    return json.loads(row.accounts), *_change(before, after, row.worst, row.spent, total)


def _change(before: State, after: State, worst: int, spent: int, total: int) -> tuple[int, int]:
    """What a payment does to the accounts: held, spent."""
    match before:
        case State.SETTLED:
            return 0, total - spent
        case State.HELD:
            return (-worst, total) if after is State.SETTLED else (0, 0)
        case State.EXPIRED:
            return (0, total - worst) if after is State.SETTLED else (0, 0)


def _call(spent: Spent, called_at: int) -> dict[str, Any]:
    return {name: getattr(spent, name) for name in Spent.__slots__} | {"called_at": called_at}


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
        row = _found(link, hold.tenant, hold.id)
        if row is None or row.state != State.SETTLED:
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
    return tuple(name for (name,) in _TRIED.rows(link, {"of": tenant, "named": reservation}))


def _found(link: Connection, of: str, named: str) -> _Found | None:
    rows = _FOUND.rows(link, {"of": of, "named": named})
    return _Found(*rows[0]) if rows else None


def _standing(link: Connection, accounts: Sequence[Account]) -> tuple[Account, ...]:
    return _filled(accounts, _balances(link, _STANDING, accounts))


def _balances(link: Connection, read: Statement, accounts: Sequence[Account]) -> dict[str, tuple[int, int]]:
    """Held and spent, by name; read in one order, so that no two transactions wait for each other."""
    found = dict[str, tuple[int, int]]()
    for name in sorted({one.name for one in accounts}):
        for row in read.rows(link, {"named": name}):
            found[name] = row
    return found


def _filled(accounts: Sequence[Account], found: Mapping[str, tuple[int, int]]) -> tuple[Account, ...]:
    return tuple(
        one.model_copy(update={"held": found[one.name][0], "spent": found[one.name][1]})
        if one.name in found
        else one
        for one in accounts
    )


def _move(link: Connection, accounts: Iterable[str], held: int = 0, spent: int = 0) -> None:
    _move_all(link, [(accounts, held, spent)])


def _move_all(link: Connection, moves: Iterable[_Move]) -> None:
    """Change accounts, each of them once."""
    more = dict[str, tuple[int, int]]()
    for accounts, held, spent in moves:
        for name in accounts:
            before = more.get(name, (0, 0))
            more[name] = before[0] + held, before[1] + spent
    for name in sorted(more):
        held, spent = more[name]
        if held or spent:
            _MOVE.run(link, {"named": name, "more": held, "paid": spent})


def _is(tenant: str, reservation: str) -> Any:
    return (RESERVATION.c.tenant == tenant) & (RESERVATION.c.id == reservation)
