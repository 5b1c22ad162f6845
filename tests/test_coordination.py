"""Coordination: one owner per subject, mail handled once and in order, leases that fence."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from temporalio.client import WorkflowExecutionStatus

from activities.services.beliefs import Beliefs, belief_stream
from activities.services.database import Database
from activities.services.leases import Leases, check_in, seize_in
from activities.services.ledger_store import entries_in
from models.beliefs import Delivery, Mail, Ownership, Owning, owner_id
from models.errors import LedgerConflict
from temporal.beliefs import settle, tell
from tests.conftest import Stack, a_key

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def price(event: str, value: str, **more) -> Mail:
    return Mail(agent="pricing", event=event, sets={"price": value}, **more)


async def test_mail_from_two_agents_is_handled_in_one_order_that_can_be_seen(stack: Stack) -> None:
    sku = f"sku-{a_key()}"
    first = await settle(stack.client, "default", sku, price("e1", "10"))
    words = Mail(agent="content", event="e2", sets={"description": "warm"})
    second = await settle(stack.client, "default", sku, words)
    third = await settle(stack.client, "default", sku, price("e3", "12", expected=first.version))
    assert [one.won for one in (first, second, third)] == [True, True, True]
    late = await settle(stack.client, "default", sku, price("e4", "9", expected=first.version))
    assert not late.won and late.version == 2 and "version 1" in late.reason
    order = await stack.client.get_workflow_handle(owner_id("default", sku)).query("order")
    assert [one["event"] for one in order["answers"]] == ["e1", "e2", "e3", "e4"]
    beliefs = Beliefs(stack.database, lambda: NOW)
    assert (await beliefs.now("default", "pricing", sku)).value("price") == "12"
    assert (await beliefs.now("default", "content", sku)).value("description") == "warm"


async def test_mail_that_is_sent_again_and_at_once_is_handled_once(stack: Stack) -> None:
    sku = f"sku-{a_key()}"
    mails = [price(f"e{number % 40}", str(number % 40)) for number in range(120)]
    await asyncio.gather(*(tell(stack.client, "default", sku, mail) for mail in mails))
    answers = await asyncio.gather(*(settle(stack.client, "default", sku, mail) for mail in mails[:10]))
    assert all(one.won for one in answers)
    await settle(stack.client, "default", sku, price("last", "0"))
    history = await Beliefs(stack.database, lambda: NOW).history("default", "pricing", sku)
    events = [one.reason for one in history]
    assert len(events) == len(set(events)) == 41


async def test_an_owner_that_is_terminated_is_followed_by_one_that_knows_what_was_handled(
    stack: Stack,
) -> None:
    sku = f"sku-{a_key()}"
    await settle(stack.client, "default", sku, price("e1", "10"))
    handle = stack.client.get_workflow_handle(owner_id("default", sku))
    await handle.terminate("test")
    again = await settle(stack.client, "default", sku, price("e1", "99"))
    assert (again.known, again.won, again.version) == (True, True, 1)
    assert (await settle(stack.client, "default", sku, price("e2", "11"))).version == 2
    assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING


async def test_owners_hand_over_by_continuing_as_new_and_nothing_is_lost_or_done_twice(stack: Stack) -> None:
    sku = f"sku-{a_key()}"
    start = Ownership(tenant="default", subject=sku, hand_over_after=20)
    handle = await stack.client.start_workflow(
        "belief", start, id=owner_id("default", sku), task_queue="decide"
    )
    mails = [price(f"e{number}", str(number)) for number in range(90)]
    sending = [tell(stack.client, "default", sku, mail) for mail in mails]
    asking = [settle(stack.client, "default", sku, mail) for mail in mails[::3]]
    answers = await asyncio.gather(*asking, *sending)
    assert sum(one.won for one in answers[: len(asking)]) == len(asking)
    assert (await settle(stack.client, "default", sku, price("last", "0"))).version == 91
    order = await stack.client.get_workflow_handle(owner_id("default", sku)).query("order")
    assert order["handled"] == 91 == len({one["event"] for one in order["answers"]})
    described = await stack.client.get_workflow_handle(owner_id("default", sku)).describe()
    assert described.run_id != handle.first_execution_run_id


async def test_an_owner_that_a_late_step_of_an_earlier_run_has_fenced_off_takes_its_subject_anew(
    stack: Stack,
) -> None:
    sku = f"sku-{a_key()}"
    await settle(stack.client, "default", sku, price("e1", "10"))
    beliefs = Beliefs(stack.database, lambda: NOW)
    assert await beliefs.own(Owning(tenant="default", subject=sku, holder="an earlier run")) == 2
    assert (await settle(stack.client, "default", sku, price("e2", "11"))).won
    run = (await stack.client.get_workflow_handle(owner_id("default", sku)).describe()).run_id
    stream = belief_stream("default", "pricing", sku)
    entries = await stack.database.read(lambda link: entries_in(link, "default", stream))
    assert [(one.body["owner"], one.body["epoch"]) for one in entries] == [(run, 1), (run, 3)]


async def test_two_agents_may_call_their_events_the_same(stack: Stack) -> None:
    sku = f"sku-{a_key()}"
    mails = (price("e1", "10"), Mail(agent="content", event="e1", sets={"description": "warm"}))
    answers = await asyncio.gather(*(settle(stack.client, "default", sku, mail) for mail in mails))
    assert [(one.agent, one.won, one.version) for one in answers] == [
        ("pricing", True, 1),
        ("content", True, 1),
    ]


async def test_what_is_no_mail_harms_nobody(stack: Stack) -> None:
    sku = f"sku-{a_key()}"
    await settle(stack.client, "default", sku, price("e1", "10"))
    handle = stack.client.get_workflow_handle(owner_id("default", sku))
    for junk in (
        [],
        ["text"],
        [{"agent": "pricing"}],
        [{"agent": "Pricing", "event": "e", "sets": {}}],
        [1, 2],
    ):
        await handle.signal("tell", args=junk)
    assert (await settle(stack.client, "default", sku, price("e2", "11"))).won
    assert (await handle.query("order"))["refused"] == 5


async def test_a_former_owner_can_handle_nothing_more(database: Database) -> None:
    beliefs = Beliefs(database, lambda: NOW)
    first = await beliefs.own(Owning(tenant="default", subject="sku-1", holder="run-1"))
    assert await beliefs.own(Owning(tenant="default", subject="sku-1", holder="run-1")) == first
    second = await beliefs.own(Owning(tenant="default", subject="sku-1", holder="run-2"))
    mail = (price("e1", "10"),)
    with pytest.raises(LedgerConflict, match="epoch"):
        await beliefs.deliver(Delivery(tenant="default", subject="sku-1", epoch=first, mails=mail))
    done = await beliefs.deliver(Delivery(tenant="default", subject="sku-1", epoch=second, mails=mail))
    assert done.handled[0].won


@pytest.mark.large
async def test_thousands_of_events_delivered_twice_are_handled_once_each(
    database: Database, large: bool
) -> None:
    count = 10_000 if large else 1_000
    beliefs = Beliefs(database, lambda: NOW)
    epoch = await beliefs.own(Owning(tenant="default", subject="sku-1", holder="run-1"))
    won, known = 0, 0
    for start in range(0, count, 100):
        mails = tuple(price(f"e{number}", str(number)) for number in range(start, start + 100))
        delivery = Delivery(tenant="default", subject="sku-1", epoch=epoch, mails=mails)
        for delivered in await asyncio.gather(beliefs.deliver(delivery), beliefs.deliver(delivery)):
            won += sum(one.won and not one.known for one in delivered.handled)
            known += sum(one.known for one in delivered.handled)
    assert (won, known) == (count, count)
    assert (await beliefs.now("default", "pricing", "sku-1")).version == count


async def test_a_lease_has_one_holder_at_any_time_and_each_gets_the_next_epoch(database: Database) -> None:
    now = [NOW]
    one, two = (Leases(database, name, lambda: now[0]) for name in ("one", "two"))
    lasting = timedelta(seconds=10)
    epoch = await one.take("sweeper", lasting)
    assert epoch == 1 and await two.take("sweeper", lasting) is None
    now[0] += timedelta(seconds=5)
    assert await one.take("sweeper", lasting) == 1
    now[0] += timedelta(seconds=11)
    assert await two.take("sweeper", lasting) == 2
    with pytest.raises(LedgerConflict, match="sweeper"):
        await database.write(lambda link: check_in(link, "sweeper", 1))
    await database.write(lambda link: check_in(link, "sweeper", 2))
    await two.give_back("sweeper", 2)
    assert await one.take("sweeper", lasting) == 3
    now[0] += timedelta(seconds=11)
    assert await one.take("sweeper", lasting) == 4
    assert await database.write(lambda link: seize_in(link, "sweeper", "three", now[0])) == 5


async def test_of_many_who_want_a_lease_at_once_one_gets_it(database: Database) -> None:
    holders = [Leases(database, f"h{number}", lambda: NOW) for number in range(16)]
    epochs = await asyncio.gather(*(one.take("sweeper", timedelta(seconds=10)) for one in holders))
    assert sorted(epoch for epoch in epochs if epoch is not None) == [1]
