import asyncio
from datetime import UTC, datetime

import pytest
from sqlalchemy import func, select

from activities.services.budget import CALL, Books, Hold, Payment, Spent, pay_all_in, reserve_all_in
from activities.services.ledger_store import LedgerStore, add_all_in
from activities.services.together import Reading, together
from models.budget import Budget, accounts_of
from models.ledger import Draft, EventType

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
ACCOUNTS = accounts_of([Budget(amount="1.00", currency="EUR")], "acme", "content", NOON)
CAPS = {account.name: account.cap for account in ACCOUNTS}


def hold(name, tenant="acme"):
    return Hold(tenant, name, "run", "content", "draft", CAPS, "EUR", 100_000)


def spent(name, reservation):
    return Spent(name, "acme", "edge", "draft", "m", 5, 10, 20, True, reservation, 30_000, "EUR")


def draft(name, stream="s"):
    return Draft(
        event_id=name,
        stream=stream,
        type=EventType.ROUTE,
        actor_kind="system",
        actor_ref="router",
        correlation_id="run",
    )


async def test_kinds_that_wait_at_once_are_each_done_in_one_go_and_everybody_gets_their_own(database):
    calls = []

    def doubled(link, items):
        calls.append(("doubled", len(items)))
        return [item * 2 for item in items]

    def negated(link, items):
        calls.append(("negated", len(items)))
        return [-item for item in items]

    kinds = [doubled, negated] * 3
    got = await asyncio.gather(*(database.write(together(kind, n)) for n, kind in enumerate(kinds)))
    assert got == [0, -1, 4, -3, 8, -5]
    assert sum(count for _, count in calls) == 6


async def test_one_that_fails_leaves_the_others_of_its_kind_alone(database):
    def checked(link, items):
        if "bad" in items:
            raise ValueError("bad")
        return list(items)

    wishes = (database.write(together(checked, one)) for one in ("a", "bad", "b"))
    got = await asyncio.gather(*wishes, return_exceptions=True)
    assert got[0] == "a" and got[2] == "b"
    assert isinstance(got[1], ValueError)


async def test_reads_that_come_together_fail_each_for_itself(database):
    def one(link, key):
        if key == 2:
            raise KeyError(key)
        return link.exec_driver_sql("SELECT ?", (key,)).scalar_one()

    reading = Reading(database, one)
    got = await asyncio.gather(*map(reading.get, (1, 2, 3)), return_exceptions=True)
    assert (got[0], got[2]) == (1, 3)
    assert isinstance(got[1], KeyError)
    assert await reading.get(4) == 4


async def test_a_reader_that_is_cancelled_takes_nobody_along(database):
    reading = Reading(database, lambda link, key: key)
    gone = asyncio.create_task(reading.get("gone"))
    stays = asyncio.create_task(reading.get("stays"))
    await asyncio.sleep(0)
    gone.cancel()
    assert await stays == "stays"


async def test_a_database_that_is_away_fails_those_who_wait_and_not_those_who_come_later(database):
    class Away:
        def __init__(self):
            self.up = False

        async def read(self, work):
            if not self.up:
                raise OSError("away")
            return await database.read(work)

    away = Away()
    reading = Reading(away, lambda link, key: key)
    with pytest.raises(OSError, match="away"):
        await reading.get("one")
    away.up = True
    assert await reading.get("one") == "one"


async def test_a_store_of_texts_may_be_read_in_one_event_loop_after_another(database):
    reading = Reading(database, lambda link, key: key)

    def elsewhere():
        return asyncio.run(reading.get("there"))

    assert await reading.get("here") == "here"
    assert await asyncio.to_thread(elsewhere) == "there"
    assert await reading.get("here") == "here"


async def test_holds_of_one_transaction_move_an_account_by_their_sum_and_once_each(database):
    books = Books(database, lambda: NOON)
    await books.reserve(hold("first"), ACCOUNTS)
    holds = [hold("first"), hold("second"), hold("second", tenant="other")]
    assert await database.write(lambda link: reserve_all_in(link, holds, NOON)) == 2
    assert [one.held for one in await books.accounts(ACCOUNTS)] == [300_000]


async def test_a_try_that_comes_twice_in_one_transaction_is_paid_once(database):
    books = Books(database, lambda: NOON)
    for name in ("one", "two"):
        await books.reserve(hold(name), ACCOUNTS)
    payments = [
        Payment("acme", "one", [spent("a", "one")], settle=False),
        Payment("acme", "one", [spent("a", "one"), spent("b", "one")]),
        Payment("acme", "two", [spent("c", "two")]),
        Payment("acme", None, [spent("d", None)]),
    ]
    await database.write(lambda link: pay_all_in(link, payments, NOON))
    assert [(one.held, one.spent) for one in await books.accounts(ACCOUNTS)] == [(0, 90_000)]
    count = select(func.count()).select_from(CALL)
    assert await database.read(lambda link: link.execute(count).scalar_one()) == 4


async def test_events_of_several_logs_go_to_the_ends_of_their_streams_once_per_id(database):
    ledger = LedgerStore(database, lambda: NOON)
    await ledger.add("acme", draft("a"))
    drafts = [
        ("acme", draft("a")),
        ("acme", draft("b")),
        ("beta", draft("b")),
        ("acme", draft("b", stream="elsewhere")),
        ("acme", draft("c", stream="t")),
        ("acme", draft("d")),
    ]
    await database.write(lambda link: add_all_in(link, drafts, NOON))
    acme = await ledger.tail("acme", 10)
    assert [(one.event_id, one.stream, one.version) for one in acme] == [
        ("a", "s", 1),
        ("b", "s", 2),
        ("c", "t", 1),
        ("d", "s", 3),
    ]
    assert [one.version for one in await ledger.tail("beta", 10)] == [1]
