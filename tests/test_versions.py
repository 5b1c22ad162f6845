"""Workers of two versions side by side: what the older one cannot read yet is lost to nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from temporalio import activity
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType as Temporal
from temporalio.converter import ActivitySerializationContext, PayloadCodec
from temporalio.worker import Worker

from activities.actions import Actions
from activities.connectors.null import Null
from activities.services.actor import Actor
from activities.services.content import ContentStore
from models.canonical import canonical
from models.errors import ConnectorUnavailable, InvalidInput
from models.loop import Request, Status
from models.orders import Effect, Effected, EffectOrder
from models.settings import TemporalSettings
from models.visibility import Queue, Role
from scripts.chaos.bound import TENANT, World
from temporal.client import Started, connect
from temporal.converter import NotYetUnderstood, data_converter
from tests.conftest import a_key, note
from tests.shared import Shared, shared_stack
from workers.compose import role, utc_now

NEWER = b',"since_today":1}'


class Newer(PayloadCodec):
    """Stands for a version that knows the new field."""

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return list(payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [Payload(metadata=one.metadata, data=one.data.replace(NEWER, b"}")) for one in payloads]


def acting(shared: Shared) -> list[Any]:
    """The act role of a newer version: it does what it did, and says more about it."""
    settings = shared.settings
    null = Null(settings.data / "notes", utc_now)
    actor = Actor(shared.database, {"null": null}, settings.policy, settings.pace.attempt, utc_now)
    actions = Actions(actor, utc_now)

    @activity.defn(name="apply")
    async def apply(order: EffectOrder) -> dict[str, Any]:
        effect: Effect = await actions.apply(order)
        return effect.model_dump(mode="json") | {"since_today": 1}

    return [actions.plan, apply, actions.verify, actions.settle, actions.undo]


async def failed_task(shared: Shared, run: Started) -> None:
    while True:
        assert "outcome" not in await shared.types(run)
        history = await run.handle.fetch_history()
        if any(one.event_type == Temporal.EVENT_TYPE_WORKFLOW_TASK_FAILED for one in history.events):
            return
        await asyncio.sleep(0.05)


async def test_a_run_waits_for_a_worker_that_knows_what_a_newer_one_said_of_an_effect(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    async with shared_stack(temporal, tmp_path, roles=()) as shared:
        act = Worker(shared.client, task_queue=Queue.ACT, activities=acting(shared))
        async with act, asyncio.timeout(60):
            async with role(shared.client, shared.settings, Role.DECIDE):
                run = await shared.propose(a_key(), note("newer"))
                await shared.approve(run)
                await failed_task(shared, run)
            newer = await connect(shared.settings.temporal, Newer())
            async with role(newer, shared.settings, Role.DECIDE):
                assert (await shared.outcome(run)).status is Status.EXECUTED
        assert shared.standing("newer") == 1


def test_only_what_goes_from_worker_to_worker_waits_and_what_comes_from_outside_is_refused() -> None:
    plain = data_converter().payload_converter
    given = plain.to_payloads([{"agent": "external", "key": "k", "body": "b", "since_today": 1}])
    with pytest.raises(InvalidInput, match="since_today"):
        plain.from_payloads(given, [Request])
    inside = plain.with_context(
        ActivitySerializationContext(
            namespace="default",
            workflow_id="run",
            workflow_type="external",
            activity_id="1",
            activity_type="admit",
            activity_task_queue="decide",
            is_local=True,
        )
    )
    with pytest.raises(NotYetUnderstood, match="^Request: InvalidInput"):
        inside.from_payloads(given, [Request])
    with pytest.raises(InvalidInput):
        plain.from_payloads(given, [Request])


async def test_an_intent_of_a_newer_version_is_neither_acted_on_nor_refused_for_good(tmp_path: Path) -> None:
    world = World(tmp_path, seed=1)
    bound = await world.bind("newer")

    async def put(more: dict[str, Any]) -> EffectOrder:
        plain = bound.intent.model_dump(mode="json") | more
        ref = await ContentStore(world.database).put(TENANT, canonical(plain), "application/json")
        return bound.order.model_copy(update={"digest": ref.digest})

    for step in ("apply", "settle"):
        act = getattr(world.actor(bound.around), step)
        with pytest.raises(ConnectorUnavailable, match="newer version"):
            await act(await put({"since_today": 1}))
    refused = await world.actor(bound.around).apply(await put({"since_today": 1, "number": 0}))
    assert (refused.what, world.effects()) == (Effected.REFUSED, 0)
    assert await world.act(bound) == "applied"
    world.database.close()
