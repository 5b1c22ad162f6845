"""Thousands of messages to a waiting run: each is refused with its reason, and the one that counts counts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType as Temporal

from activities.services.requests import KEPT_REFUSALS, _needed
from models.gate import Kind
from models.ledger import Entry, EventType
from models.loop import Status
from models.policy import AgentPolicy, Policy
from models.settings import TemporalSettings
from temporal.client import Started, answer
from tests.conftest import Stack, a_key, note, serving, settings_for, stack_of
from tests.test_glass import AGENTS, LIMIT, Room, room_settings
from tests.test_signatures import make_key
from workers.compose import Parts

MANY = 300
WANTED = 4_096
"""Events that Temporal wants in one history at most."""
FEW_WANTED = 400
"""The same where no minute is to be spent on a flood."""


@pytest.fixture
async def stack(temporal: TemporalSettings, tmp_path: Path) -> AsyncIterator[Stack]:
    async with patient_stack(temporal, tmp_path) as made:
        yield made


@asynccontextmanager
async def patient_stack(temporal: TemporalSettings, data: Path) -> AsyncIterator[Stack]:
    """With the time for one task that the product has, since it is what a flood uses up."""
    patient = temporal.model_copy(update={"task_timeout": timedelta(seconds=10)})
    async with stack_of(settings_for(patient, data)) as made:
        yield made


def junk(number: int) -> dict[str, Any]:
    """By turns of the wrong shape and about another digest."""
    return {"digest": "0" * 64, "approver": f"eve{number}"} if number % 2 else {"digest": "junk"}


async def flood(run: Started, count: int) -> None:
    few = asyncio.Semaphore(40)

    async def one(number: int) -> None:
        async with few:
            await run.handle.signal(Kind.APPROVE.value, junk(number))

    await asyncio.gather(*(one(number) for number in range(count)))


async def approve(stack: Stack, run: Started, digest: str) -> None:
    message = {"digest": digest, "approver": "ann"}
    judged = await answer(stack.client, run.workflow_id, Kind.APPROVE, message, timedelta(minutes=5))
    assert (judged.counted, judged.state) == (True, "passed")


async def test_a_crowd_is_refused_one_by_one_in_few_steps_and_the_answer_behind_it_counts(
    stack: Stack,
) -> None:
    run = await stack.propose(a_key(), note())
    digest = await stack.digest(run)
    await flood(run, MANY)
    await approve(stack, run, digest)
    assert (await run.handle.result()).status is Status.EXECUTED
    events = await stack.events(run)
    refused = [event for event in events if event.type.value == "refusal"]
    assert len(refused) == MANY
    assert all(event.body["remedy"] and event.actor_ref == event.body["approver"] for event in refused)
    assert {event.actor_ref for event in refused} == {"unknown", *(f"eve{n}" for n in range(1, MANY, 2))}
    [verdict] = [event for event in events if event.type.value == "verdict"]
    assert (verdict.actor_ref, verdict.body["approver"]) == ("ann", "ann")
    history = await run.handle.fetch_history()
    kinds = Counter(event.event_type for event in history.events)
    assert kinds[Temporal.EVENT_TYPE_MARKER_RECORDED] < MANY // 3


@pytest.fixture
def wanted(large: bool) -> int:
    return WANTED if large else FEW_WANTED


@pytest.fixture
def temporal_alone(tmp_path: Path, wanted: int) -> Iterator[TemporalSettings]:
    limit = f"limit.historyCount.suggestContinueAsNew={wanted}"
    with serving(tmp_path, "--dynamic-config-value", limit) as settings:
        yield settings


@pytest.mark.large
async def test_a_run_that_is_flooded_goes_on_in_a_new_history_with_nothing_lost(
    temporal_alone: TemporalSettings, tmp_path: Path, wanted: int
) -> None:
    many = wanted + wanted // 20
    async with patient_stack(temporal_alone, tmp_path) as stack:
        run = await stack.propose(a_key(), note())
        digest = await stack.digest(run)
        first = (await run.handle.describe()).run_id
        await flood(run, many)
        await approve(stack, run, digest)
        handle = stack.client.get_workflow_handle(run.workflow_id)
        assert (await handle.result())["status"] == "executed"
        described = await handle.describe()
        assert described.run_id != first
        assert described.history_length < wanted // 4
        kinds = Counter(await stack.types(run))
        assert (kinds["refusal"], kinds["intent"], kinds["verdict"], kinds["receipt"]) == (many, 1, 1, 1)
        assert len(stack.notes()) == 1


@pytest.fixture
def temporal_short(tmp_path: Path) -> Iterator[TemporalSettings]:
    with serving(
        tmp_path, "--dynamic-config-value", "limit.historyCount.suggestContinueAsNew=60"
    ) as settings:
        yield settings


async def test_what_comes_one_by_one_ends_neither_a_run_that_waits_nor_a_review_by_its_length(
    temporal_short: TemporalSettings, tmp_path: Path
) -> None:
    keys = {name: make_key(tmp_path, name) for name in ("ann", "bob", "ines")}
    async with stack_of(room_settings(temporal_short, tmp_path, keys), Parts(agents=AGENTS)) as stack:
        room = Room(stack, keys)
        started, digest = await room.start()
        run = Started(started.workflow_id, stack.client.get_workflow_handle(started.workflow_id))
        await goes_on_anew(stack, run)
        await room.breaks(run, digest)
        await room.state(run, "reviewing")
        await goes_on_anew(stack, run, review=True)
        await room.state(run, "reviewing")
        reviewed = await room.says(run, "bob", Kind.APPROVE, digest=digest, review=True)
        assert (reviewed.counted, reviewed.state) == (True, "reviewed")
        assert (await started.handle.result()).status is Status.EXECUTED
        assert len(stack.notes()) == 1


async def test_nor_a_run_whose_time_has_not_come(temporal_short: TemporalSettings, tmp_path: Path) -> None:
    rules = Policy(agents={"later": AgentPolicy(connectors=("null",))})
    async with stack_of(settings_for(temporal_short, tmp_path, policy=rules), Parts(agents=AGENTS)) as stack:
        started = await stack.propose(a_key(), note(), agent="later")
        run = Started(started.workflow_id, stack.client.get_workflow_handle(started.workflow_id))
        await approve(stack, run, await stack.digest(run))
        await Room(stack, {}).state(run, "scheduled")
        await goes_on_anew(stack, run)
        await Room(stack, {}).state(run, "scheduled")
        await run.handle.cancel()
        assert (await started.handle.result()).status is Status.CANCELLED
        kinds = Counter(event.type.value for event in await stack.events(run))
        assert (kinds["intent"], kinds["verdict"], stack.notes()) == (1, 1, [])


async def goes_on_anew(stack: Stack, run: Started, **more: Any) -> None:
    first = (await run.handle.describe()).run_id
    async with asyncio.timeout(LIMIT):
        while (await run.handle.describe()).run_id == first:
            assert not (await stack.answer(run, Kind.APPROVE, "0" * 64, **more)).counted


def test_a_run_that_is_taken_up_again_is_given_of_refusals_only_the_last() -> None:
    kinds = [
        EventType.REQUEST,
        *[EventType.REFUSAL] * (KEPT_REFUSALS + 3),
        EventType.VERDICT,
        EventType.REFUSAL,
    ]
    entries = tuple(
        Entry(version=number, type=kind, body={}, recorded_at=datetime(2026, 5, 1, tzinfo=UTC))
        for number, kind in enumerate(kinds, 1)
    )
    kept = [entry.version for entry in _needed(entries)]
    assert kept == [1, *range(6, len(kinds) + 1)]
