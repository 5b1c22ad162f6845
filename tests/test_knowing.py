"""What is known about a subject: never stale, had ready by name and by habit, counted, and erased."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import Connection, insert, update
from temporalio.client import WorkflowFailureError

from activities.services.beliefs import Beliefs
from activities.services.content import put_blob
from activities.services.database import Database, to_micros
from activities.services.erasure import Erasure
from activities.services.keeping import take
from activities.services.knowing import HOT, USE, Knowing, keep_known, use_of
from activities.services.short_term import Rate, ShortTerm, metered
from activities.services.vectors import MEMORY
from models.beliefs import Change, Look
from models.knowledge import PrewarmSettings, Warm, Warmed, look_about
from models.loop import Request
from models.memory import Cause, Memo
from models.settings import ScheduleSettings, Settings, TemporalSettings
from temporal.schedules import Change as ScheduleChange
from temporal.schedules import Schedules
from tests.conftest import Stack, a_key, settings_for, stack_of
from workers.registry import scheduled

NOW = datetime(2026, 5, 1, tzinfo=UTC)
SKU = Look(tenant="default", agent="pricing", subject="sku-1")


class Clock:
    now = NOW

    def __call__(self) -> datetime:
        return self.now


class Shop:
    """A database and a process that knows."""

    def __init__(self, database: Database, named: tuple[Look, ...] = ()) -> None:
        self.database = database
        self.clock = Clock()
        self.reader = InMemoryMetricReader()
        meter = MeterProvider(metric_readers=[self.reader]).get_meter("test")
        self.short = ShortTerm(10, timedelta(minutes=5), self.clock, metered(meter))
        self.knowing = Knowing(database, self.short, self.clock, named)

    async def believe(self, event: str, **sets: Any) -> None:
        change = Change(tenant="default", agent="pricing", subject="sku-1", event=event, sets=sets)
        await Beliefs(self.database, self.clock).change(change)

    async def remember(self, title: str, **more: Any) -> str:
        def kept(link: Connection) -> str:
            ref = put_blob(link, "default", title.encode(), "text/plain")
            memo = Memo(tenant="default", kind="fact", title=title, text=ref, source="s", **more)
            return take(link, memo, self.clock(), Cause()).record_id

        return await self.database.write(kept)

    def counted(self) -> dict[str, int]:
        data = self.reader.get_metrics_data()
        points = data.resource_metrics[0].scope_metrics[0].metrics[0].data.data_points if data else ()
        return {str(one.attributes["use"]): one.value for one in points}


@pytest.fixture
def shop(database: Database) -> Shop:
    return Shop(database)


async def test_what_is_known_is_never_older_than_the_belief(shop: Shop) -> None:
    assert (await shop.knowing.about(SKU)).belief.version == 0
    await shop.believe("e1", price="10")
    first = await shop.knowing.about(SKU)
    assert [one.reference for one in first.evidence()] == ["belief:sku-1"]
    assert await shop.knowing.about(SKU) is first
    await shop.believe("e2", price="12")
    assert (await shop.knowing.about(SKU)).belief.value("price") == "12"
    assert shop.short.rate == Rate(hits=1, misses=3, warmed=0)
    assert shop.counted() == {"hit": 1, "miss": 3}


async def test_a_record_that_comes_goes_or_runs_out_changes_what_is_known(shop: Shop) -> None:
    one = await shop.remember("Weighs 2 kg", subject="sku-1")
    await shop.remember("Is red", subject="sku-2")
    await shop.remember("Sold by others", subject="sku-1", agent="content")
    assert [record.record_id for record in (await shop.knowing.about(SKU)).records] == [one]
    soon = await shop.remember("On sale", subject="sku-1", expires_at=NOW + timedelta(hours=1))
    assert [record.record_id for record in (await shop.knowing.about(SKU)).records] == [soon, one]
    shop.clock.now = NOW + timedelta(hours=1)
    assert [record.record_id for record in (await shop.knowing.about(SKU)).records] == [one]
    forgotten = update(MEMORY).where(MEMORY.c.record_id == one).values(forgotten_at=to_micros(NOW))
    await shop.database.write(lambda link: link.execute(forgotten))
    known = await shop.knowing.about(SKU)
    assert (known.records, known.evidence()) == ((), ())


async def test_what_is_named_and_what_was_asked_for_is_ready_before_anybody_asks(database: Database) -> None:
    shop = Shop(database, named=(SKU,))
    assert await shop.knowing.warm() == Warmed(subjects=1, made=1)
    await shop.knowing.about(SKU)
    other = Look(tenant="default", agent="pricing", subject="sku-2")
    await shop.knowing.about(other)
    await shop.believe("e1", price="10")
    assert await shop.knowing.warm() == Warmed(subjects=2, made=1)
    assert (await shop.knowing.about(SKU)).belief.version == 1
    assert shop.short.rate == Rate(hits=2, misses=1, warmed=2)


async def test_only_so_many_subjects_are_kept_ready(shop: Shop) -> None:
    for number in range(HOT + 5):
        await shop.knowing.about(Look(tenant="default", agent="pricing", subject=f"sku-{number}"))
    assert (await shop.knowing.warm()).subjects == HOT
    assert len(shop.short) == 10


async def test_what_was_erased_is_gone_from_the_process_that_did_not_erase_it(shop: Shop) -> None:
    await shop.believe("e1", price="10")
    await shop.remember("Weighs 2 kg", subject="sku-1")
    await shop.knowing.about(SKU)
    await Erasure(shop.database, shop.clock).forget("default", "sku-1", "ann@example.test")
    assert shop.short.holds("default", "sku-1") == 1
    assert await shop.knowing.sweep() == 1
    assert shop.short.holds("default", "sku-1") == 0
    known = await shop.knowing.about(SKU)
    assert (known.belief.version, known.records) == (0, ())


async def test_the_hit_rate_of_all_processes_is_counted_by_day(database: Database) -> None:
    one, two = Shop(database), Shop(database)
    for shop in (one, one, two):
        await shop.knowing.about(SKU)
        await shop.knowing.write_use()
        await shop.knowing.write_use()
    use = await database.read(lambda link: use_of(link, NOW))
    assert (use, use.permille) == (Rate(hits=1, misses=2, warmed=0), 333)
    old = dict(day=NOW.date().toordinal() - 30, hits=9, misses=9, warmed=9)
    await database.write(lambda link: link.execute(insert(USE).values(**old)))
    assert await database.read(lambda link: use_of(link, NOW)) == use


async def test_a_process_warms_at_start_and_writes_its_counts_at_the_end(database: Database) -> None:
    shop, stop = Shop(database, named=(SKU,)), asyncio.Event()
    keeping = asyncio.create_task(keep_known(shop.knowing, stop))
    async with asyncio.timeout(60):
        while shop.short.rate.warmed == 0:
            await asyncio.sleep(0.01)
    await shop.knowing.about(SKU)
    stop.set()
    await keeping
    assert await database.read(lambda link: use_of(link, NOW)) == Rate(hits=1, misses=0, warmed=1)


def test_only_what_a_belief_could_be_about_is_looked_up() -> None:
    assert look_about("default", "pricing", "sku-1") == SKU
    assert [look_about("default", "pricing", odd) for odd in (None, "", "two words", "a#b")] == [None] * 4


PREWARM = (PrewarmSettings(subject="sku-1", agents=("pricing", "content")),)


@pytest.fixture
async def stack(temporal: TemporalSettings, tmp_path: Path) -> AsyncIterator[Stack]:
    settings: Settings = settings_for(temporal, tmp_path, tenant=f"t{a_key()}", prewarm=PREWARM)
    async with stack_of(settings) as made:
        yield made
        await Schedules(made.client, settings.tenant, settings.temporal).apply((), scheduled())


async def test_a_schedule_has_ready_what_settings_name(stack: Stack) -> None:
    schedules = Schedules(stack.client, stack.settings.tenant, stack.settings.temporal)
    every = ScheduleSettings(name="prewarm", agent="upkeep", cron="*/15 * * * *")
    changed = await schedules.apply((every,), scheduled())
    assert [one.change for one in changed] == [ScheduleChange.CREATED]
    handle = schedules.handle("prewarm")
    await handle.trigger()
    async with asyncio.timeout(60):
        while not (runs := (await handle.describe()).info.recent_actions):
            await asyncio.sleep(0.02)
    run = runs[0].action
    started = stack.client.get_workflow_handle(run.workflow_id, run_id=run.first_execution_run_id)
    assert Warmed.model_validate(await started.result()).subjects == 2


async def test_upkeep_refuses_what_is_no_request(stack: Stack) -> None:
    for odd in ([], [1, 2], ["text"]):
        with pytest.raises(WorkflowFailureError) as failure:
            await stack.client.execute_workflow("upkeep", args=odd, id=a_key(), task_queue="decide")
        assert "send one Request" in str(failure.value.cause)
    request = Request(tenant=stack.settings.tenant, agent="upkeep", key=a_key(), body=json.dumps({}))
    done = await stack.client.execute_workflow("upkeep", request, id=a_key(), task_queue="decide")
    assert Warmed.model_validate(done).subjects == 2
    for body in ('{"calibarte": true}', "calibrate"):
        odd = request.model_copy(update={"body": body})
        with pytest.raises(WorkflowFailureError) as failure:
            await stack.client.execute_workflow("upkeep", odd, id=a_key(), task_queue="decide")
        assert '{"calibrate": true}' in str(failure.value.cause)
    assert Warm(tenant="default").tenant == "default"
