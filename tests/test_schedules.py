from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import ScheduleBackfill, ScheduleOverlapPolicy

from models.errors import InvalidInput, UnknownName
from models.ledger import Event, EventType
from models.loop import Request, keyed
from models.settings import ScheduleSettings, TemporalSettings
from temporal.schedules import Change, Schedules, Standing, schedule_id
from tests.conftest import Stack, note, policy, settings_for, stack_of

AGENTS = ("external", "content")


def schedule(name: str = "weekly", **changes: Any) -> ScheduleSettings:
    body = {"title": f"Do {name}", "actions": [note(name)]}
    return ScheduleSettings(
        **({"name": name, "agent": "external", "cron": "0 8 * * 1", "body": body} | changes)
    )


@pytest.fixture
async def stack(temporal: TemporalSettings, tmp_path: Path) -> AsyncIterator[Stack]:
    settings = settings_for(
        temporal, tmp_path, policy=policy(automatic=True, remind_seconds=None), tenant=f"t{uuid.uuid4().hex}"
    )
    async with stack_of(settings) as made:
        yield made
        await schedules_of(made).apply((), AGENTS)


def schedules_of(stack: Stack) -> Schedules:
    return Schedules(stack.client, stack.settings.tenant, stack.settings.temporal)


async def until(happened: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await happened():
            await asyncio.sleep(0.02)


async def apply(schedules: Schedules, wanted: tuple[ScheduleSettings, ...]) -> list[Any]:
    """Apply, and wait until Temporal's own list, which lags behind, says the same."""
    changed = await schedules.apply(wanted, AGENTS)

    async def listed() -> bool:
        return {one.name for one in await schedules.listed(())} == {one.name for one in wanted}

    await until(listed)
    return list(changed)


async def outcomes(stack: Stack) -> list[Event]:
    events = await stack.ledger.tail(stack.settings.tenant, 10_000)
    return [event for event in events if event.type is EventType.OUTCOME]


def changes(changed: list[Any]) -> dict[str, Change]:
    return {one.name: one.change for one in changed}


async def test_applying_twice_changes_nothing_the_second_time(stack: Stack) -> None:
    schedules, wanted = schedules_of(stack), (schedule("weekly"), schedule("daily", cron="0 6 * * *"))
    assert changes(await apply(schedules, wanted)) == {"weekly": "created", "daily": "created"}
    assert changes(await apply(schedules, wanted)) == {"weekly": "unchanged", "daily": "unchanged"}


async def test_what_differs_is_changed_and_what_is_gone_is_deleted(stack: Stack) -> None:
    schedules = schedules_of(stack)
    await apply(schedules, (schedule("weekly"), schedule("daily")))
    changed = await apply(schedules, (schedule("weekly", cron="0 9 * * 1"),))
    assert changes(changed) == {"weekly": "updated", "daily": "deleted"}
    described = await schedules.handle("weekly").describe()
    assert {time.hour for time in described.info.next_action_times} == {9}
    assert described.schedule.policy.overlap is ScheduleOverlapPolicy.SKIP
    assert described.schedule.policy.pause_on_failure


async def test_schedules_of_another_tenant_are_left_alone(stack: Stack) -> None:
    other = Schedules(stack.client, f"{stack.settings.tenant}x", stack.settings.temporal)
    await apply(other, (schedule(),))
    assert changes(await apply(schedules_of(stack), ())) == {}
    assert changes(await apply(other, ())) == {"weekly": "deleted"}


async def test_each_scheduled_time_is_one_request_however_often_it_is_delivered(stack: Stack) -> None:
    schedules = schedules_of(stack)
    await apply(schedules, (schedule(paused=True, cron="0 8 * * *"),))
    two_days = ScheduleBackfill(
        start_at=datetime(2026, 1, 5, tzinfo=UTC),
        end_at=datetime(2026, 1, 7, tzinfo=UTC),
        overlap=ScheduleOverlapPolicy.ALLOW_ALL,
    )
    handle = schedules.handle("weekly")
    await handle.backfill(two_days)
    await until(lambda: _count(outcomes(stack), 2))
    times = [f"{schedule_id(stack.settings.tenant, 'weekly')}-2026-01-0{day}T08:00:00Z" for day in (5, 6)]
    assert sorted(event.stream for event in await outcomes(stack)) == times
    assert len(stack.notes()) == 2

    # A start that Temporal sends again has the same id and the same request.
    for time in times:
        started = await handle.describe()
        request = await _request(stack, started)
        await stack.client.get_workflow_handle(time).result()
        again = await stack.client.start_workflow("external", request, id=time, task_queue="decide")
        assert (await again.result())["status"] == "executed"
    assert len(await outcomes(stack)) == 2
    assert len(stack.notes()) == 2


async def test_a_trigger_by_hand_starts_a_run(stack: Stack) -> None:
    schedules = schedules_of(stack)
    await apply(schedules, (schedule(),))
    await schedules.handle("weekly").trigger()
    await until(lambda: _count(outcomes(stack), 1))
    assert (await outcomes(stack))[0].body["status"] == "executed"
    await until(lambda: _count(_runs(schedules), 1))


async def test_a_schedule_paused_by_hand_stays_paused_until_it_is_resumed(stack: Stack) -> None:
    schedules = schedules_of(stack)
    await apply(schedules, (schedule(),))
    await schedules.pause("weekly", "paused by ann")
    assert changes(await apply(schedules, (schedule(cron="0 9 * * 1"),))) == {"weekly": "updated"}
    [listed] = await schedules.listed((schedule(cron="0 9 * * 1"),))
    assert listed.paused
    assert listed.note == "paused by ann"
    await schedules.resume("weekly", "resumed by ann")
    assert not (await schedules.listed((schedule(),)))[0].paused


async def test_a_changed_pause_in_the_settings_holds(stack: Stack) -> None:
    schedules = schedules_of(stack)
    await apply(schedules, (schedule(paused=True),))
    await apply(schedules, (schedule(paused=False),))
    assert not (await schedules.listed((schedule(),)))[0].paused


async def test_the_list_says_what_is_missing_different_and_surplus(stack: Stack) -> None:
    schedules = schedules_of(stack)
    await apply(schedules, (schedule("a"), schedule("b"), schedule("d")))
    wanted = (schedule("b", cron="1 1 * * 1"), schedule("c"), schedule("d"))
    standing = {one.name: one.standing for one in await schedules.listed(wanted)}
    assert standing == {
        "a": Standing.SURPLUS,
        "b": Standing.DIFFERENT,
        "c": Standing.MISSING,
        "d": Standing.APPLIED,
    }


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ((schedule(agent="nobody"),), "schedules.weekly.agent: 'nobody'"),
        ((schedule(cron="every monday"),), "schedules.weekly.cron: 'every monday'"),
        ((schedule(), schedule()), "two schedules have that name"),
        ((schedule(body={"text": "x" * 70_000}),), "schedules.weekly.body"),
    ],
)
async def test_a_wrong_schedule_is_refused_with_its_remedy(
    stack: Stack, wanted: tuple[ScheduleSettings, ...], said: str
) -> None:
    with pytest.raises(InvalidInput, match=said):
        await apply(schedules_of(stack), wanted)


async def test_pausing_an_unknown_schedule_names_the_known_ones(stack: Stack) -> None:
    with pytest.raises(UnknownName, match="schedules apply"):
        await schedules_of(stack).pause("nothing", "")


def test_only_a_scheduled_request_takes_its_key_from_the_workflow_id() -> None:
    plain = Request(agent="external", key="k", body="{}")
    assert keyed(plain, "run") == plain
    assert keyed(plain.model_copy(update={"key_from_workflow_id": True}), "run").key == "run"


async def _request(stack: Stack, described: Any) -> Request:
    found = await stack.client.data_converter.decode(described.schedule.action.args, [Request])
    return found[0]


async def _count(found: Any, wanted: int) -> bool:
    return len(await found) >= wanted


async def _runs(schedules: Schedules) -> tuple[str, ...]:
    return (await schedules.listed((schedule(),)))[0].runs


async def test_a_run_of_a_schedule_is_for_who_the_settings_say(stack: Stack) -> None:
    schedules = schedules_of(stack)
    await apply(schedules, (schedule(),))
    changed = await apply(schedules, (schedule(requester="ann"),))
    assert changes(changed) == {"weekly": "updated"}
    handle = stack.client.get_schedule_handle(schedule_id(stack.settings.tenant, "weekly"))
    await handle.trigger()

    async def ended() -> bool:
        return bool(await outcomes(stack))

    await until(ended)
    events = await stack.ledger.tail(stack.settings.tenant, 10_000)
    [request] = [event for event in events if event.type is EventType.REQUEST]
    assert request.body["requester"] == "ann"
