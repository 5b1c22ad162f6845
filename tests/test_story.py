"""A subject's story: what was believed, remembered, asked and done about it, in order and in plain words."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from activities.services.beliefs import Beliefs
from activities.services.content import put_blob
from activities.services.keeping import take
from models.beliefs import Change, evidence
from models.errors import UnknownName
from models.gate import Kind
from models.ledger import Event, EventType
from models.loop import Request
from models.memory import Cause, Memo
from scripts.commands.session import Session
from scripts.commands.story import Moment, collect
from scripts.commands.telling import is_minor, told
from temporal.client import submit
from tests.conftest import Stack, a_key, note
from workers.compose import utc_now


async def believe(stack: Stack, subject: str, event: str, price: str) -> Any:
    change = Change(tenant="default", agent="external", subject=subject, event=event, sets={"price": price})
    return (await Beliefs(stack.database, utc_now).change(change)).belief


async def told_of(stack: Stack, subject: str) -> list[Moment]:
    return await collect(Session(stack.settings, stack.database), subject)


def plain(moments: list[Moment]) -> list[str]:
    """What a person reads, without the ends of run ids."""
    main = [one for one in moments if not one.minor]
    return [one.what.split(" ", 1)[1] if one.source == "ledger" else one.what for one in main]


async def test_a_run_that_rests_on_a_belief_stands_in_the_story_with_what_changed_and_who_said_so(
    stack: Stack,
) -> None:
    sku = f"sku-{a_key()}"
    belief = await believe(stack, sku, "order-77", "10")
    run = await stack.propose("reprice", note(), evidence=[evidence(belief, "price").model_dump()])
    first = await stack.digest(run)
    await believe(stack, sku, "order-78", "12")
    await stack.answer(run, Kind.APPROVE, first)
    second = await stack.digest(run, number=2)
    await stack.answer(run, Kind.APPROVE, second, comment="as the market does")
    await run.handle.result()
    moments = await told_of(stack, sku)
    lines = plain(moments)
    assert lines == [
        "external believes, version 1: price: nothing -> 10",
        "external is asked (request reprice)",
        "proposed: Do reprice (note on null)",
        f"put to the gate as intent 1 ({first[:12]})",
        "external believes, version 2: price: 10 -> 12",
        f"ann@example.test: approve {first[:12]}",
        f"not carried out as it was approved: belief about {sku} changed since version 1: price: 10 -> 12",
        "proposed: Do reprice (note on null)",
        f"put to the gate as intent 2 ({second[:12]})",
        f'ann@example.test: approve {second[:12]}, "as the market does"',
        "action 1 begins",
        lines[11],
        "ended: executed",
    ]
    assert lines[11].startswith("action 1 is done: ")
    kinds = [event.type for event in await stack.events(run)]
    assert len(moments) == len(kinds) + 2
    assert all(one.reference and one.place for one in moments)


async def test_a_run_that_was_asked_about_the_subject_and_what_is_remembered_of_it_are_told_too(
    stack: Stack,
) -> None:
    customer = f"customer-{a_key()}"
    body = await stack.content.put(
        "default",
        json.dumps({"title": "Answer", "actions": [note()]}).encode(),
        "application/json",
        customer,
        plainly=True,
    )
    request = Request(agent="external", key=a_key(), body=body, subject=customer)
    run = await submit(stack.client, request, stack.settings.temporal)
    await stack.answer(run, Kind.REJECT, await stack.digest(run), comment="too curt")
    await run.handle.result()
    text = "Prefers letters"

    def kept(link: Any) -> None:
        ref = put_blob(link, "default", text.encode(), "text/plain")
        memo = Memo(
            tenant="default", kind="preference", title=text, text=ref, source="call", subject=customer
        )
        take(link, memo, utc_now(), Cause())

    await stack.database.write(kept)
    lines = plain(await told_of(stack, customer))
    assert "proposed: Answer (note on null)" in lines
    assert lines[-2].startswith("ended: rejected")
    assert lines[-1] == f"preference, active: {text}"
    with pytest.raises(UnknownName, match="nobody"):
        await told_of(stack, "nobody")


def test_an_event_of_another_version_is_told_by_its_fields() -> None:
    event = Event(
        event_id="e1",
        stream="run",
        type=EventType.RECEIPT,
        actor_kind="agent",
        actor_ref="external",
        correlation_id="run",
        body={"reason": "said otherwise"},
        log_id="default",
        seq=1,
        version=1,
        recorded_at=datetime(2026, 5, 1, tzinfo=UTC),
        leaf_hash="0" * 64,
    )
    assert told(event, {}) == "receipt reason=said otherwise"
    absent = event.model_copy(
        update={"type": EventType.ABSENT, "body": {"action": 0, "reason": "the target refused"}}
    )
    assert told(absent, {}) == "action 1 did not happen: the target refused" and not is_minor(absent)
