import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError
from sqlalchemy import select

from activities.services.budget import LEASE, RESERVATION, Books, Hold, Spent, State
from models.budget import Account, Budget, accounts_of, amount_of, lacking, micros
from models.errors import BudgetExceeded
from models.settings import Settings
from scripts.bench.budget import sound, trial

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
EUR = Budget(amount="1.00", currency="EUR")


class Clock:
    def __init__(self):
        self.now = NOON

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def books(database, clock):
    return Books(database, clock)


ACCOUNTS = accounts_of([EUR], "acme", "content", NOON)


def hold(name="one", worst=400_000, accounts=ACCOUNTS):
    caps = {account.name: account.cap for account in accounts}
    return Hold("acme", name, "run", "content", "draft", caps, "EUR", worst)


def spent(reservation="one", amount=100_000, name="try"):
    return Spent(name, "acme", "edge", "draft", "m", 5, 10, 20, True, reservation, amount, "EUR")


async def standing(books, accounts=ACCOUNTS):
    return [(account.held, account.spent) for account in await books.accounts(accounts)]


async def states(database):
    query = select(RESERVATION.c.id, RESERVATION.c.state)
    return dict(await database.read(lambda link: link.execute(query).all()))


def test_amounts_become_whole_millionths_rounded_up():
    assert [micros(amount) for amount in ("1", "0.00000001", "0.0000015")] == [1_000_000, 1, 2]
    assert amount_of(1_500_001) == "1.500001"


def test_a_call_draws_on_every_budget_that_covers_it():
    budgets = [
        EUR,
        Budget(amount="2", currency="EUR", agent="content"),
        Budget(amount="3", currency="EUR", agent="security"),
    ]
    names = [account.name for account in accounts_of(budgets, "acme", "content", NOON)]
    assert names == ["acme/*/EUR/2026-05-04", "acme/content/EUR/2026-05-04"]


def test_a_budget_of_one_tenant_covers_no_other():
    assert accounts_of([Budget(amount="1", currency="EUR", tenant="acme")], "other", "content", NOON) == ()


def test_the_day_is_the_day_in_utc():
    late = datetime(2026, 5, 4, 23, 30, tzinfo=UTC).astimezone()
    assert accounts_of([EUR], "acme", "content", late)[0].name.endswith("2026-05-04")


def test_an_unknown_price_under_a_budget_is_refused_and_never_nothing():
    assert "price is unknown" in (lacking(ACCOUNTS, None, None) or "")
    assert "in USD" in (lacking(ACCOUNTS, 1, "USD") or "")
    assert lacking((), None, None) is None


def test_two_budgets_for_the_same_money_are_refused_in_the_settings():
    with pytest.raises(ValidationError, match="same tenant"):
        Settings(budgets=(EUR, Budget(amount="2", currency="EUR", tenant="acme")))


async def test_a_reservation_takes_room_and_settlement_gives_back_what_was_not_spent(books):
    await books.reserve(hold(), ACCOUNTS)
    assert await standing(books) == [(400_000, 0)]
    await books.settle("acme", "one", [spent()])
    assert await standing(books) == [(0, 100_000)]


async def test_the_same_reservation_again_changes_nothing(books):
    for _ in range(3):
        await books.reserve(hold(), ACCOUNTS)
    for _ in range(3):
        await books.settle("acme", "one", [spent()])
    assert await standing(books) == [(0, 100_000)]


async def test_what_does_not_fit_is_refused_with_names_and_figures_and_holds_nothing(books):
    await books.reserve(hold("one", 700_000), ACCOUNTS)
    with pytest.raises(BudgetExceeded, match=r"acme/\*/EUR/2026-05-04: 0.300000 EUR of 1.000000") as caught:
        await books.reserve(hold("two", 300_001), ACCOUNTS)
    assert caught.value.non_retryable
    assert await standing(books) == [(700_000, 0)]


async def test_of_two_budgets_the_tighter_one_decides_and_neither_is_touched(books):
    both = (*ACCOUNTS, Account(name="acme/content/EUR/2026-05-04", currency="EUR", cap=100))
    with pytest.raises(BudgetExceeded, match="acme/content"):
        await books.reserve(hold(accounts=both, worst=101), both)
    assert await standing(books, both) == [(0, 0), (0, 0)]


async def test_many_at_once_never_hold_more_than_the_cap(books):
    calls = [books.reserve(hold(str(number), 30_000), ACCOUNTS) for number in range(100)]
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(result is None for result in done) == 33
    assert all(result is None or isinstance(result, BudgetExceeded) for result in done)
    assert await standing(books) == [(990_000, 0)]


async def test_an_ended_lease_counts_in_full_since_nobody_knows_better(books, clock, database):
    await books.reserve(hold(), ACCOUNTS)
    clock.now += LEASE + timedelta(seconds=1)
    assert await books.expire() == 1
    assert await books.expire() == 0
    assert await standing(books) == [(0, 400_000)]
    assert await states(database) == {"one": State.EXPIRED}


async def test_the_next_call_ends_leases_by_itself(books, clock, database):
    await books.reserve(hold(), ACCOUNTS)
    clock.now += LEASE + timedelta(seconds=1)
    await books.reserve(hold("two"), ACCOUNTS)
    assert await states(database) == {"one": State.EXPIRED, "two": State.HELD}


async def test_a_late_settlement_sets_an_expired_reservation_right(books, clock):
    await books.reserve(hold(), ACCOUNTS)
    clock.now += LEASE + timedelta(seconds=1)
    await books.expire()
    await books.settle("acme", "one", [spent()])
    assert await standing(books) == [(0, 100_000)]


async def test_a_try_that_is_noted_after_the_settlement_is_paid_all_the_same(books):
    await books.reserve(hold(), ACCOUNTS)
    await books.settle("acme", "one")
    await books.settle("acme", "one", [spent()])
    assert await standing(books) == [(0, 100_000)]


async def test_a_settled_call_that_is_tried_again_needs_room_again(books):
    await books.reserve(hold("one", 600_000), ACCOUNTS)
    await books.settle("acme", "one", [spent()])
    await books.reserve(hold("one", 600_000), ACCOUNTS)
    assert await standing(books) == [(700_000, 0)]
    await books.settle("acme", "one", [spent(name="again", amount=50_000)])
    assert await standing(books) == [(0, 150_000)]
    await books.reserve(hold("two", 800_000), ACCOUNTS)
    with pytest.raises(BudgetExceeded):
        await books.reserve(hold("one", 600_000), ACCOUNTS)


def test_killed_workers_overspend_nothing_and_leave_nothing_open(tmp_path):
    report = trial(tmp_path, calls=60, shares=2, deaths=1, cap="0.20")
    assert report["kills"]
    assert sound(report), report
