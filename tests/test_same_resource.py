"""Two agents that want the same SKU: the first effect goes through, the other is asked again on top of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import pytest

from activities.connectors.base import Applied, Work
from activities.connectors.null import Null
from models.canonical import sha256
from models.gate import Kind
from models.ledger import EventType
from models.loop import Intent, Ref, Status
from models.settings import TemporalSettings
from temporal.client import Started
from tests.conftest import Stack, a_key, note, settings_for, stack_of
from tests.shared import policies
from tests.variants import AGENTS
from workers.compose import Parts, utc_now


class Shelf(Null):
    """The null target, where a note changes what it is about, as a price or a description does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, utc_now)
        self._skus = folder / "targets"
        self._one_at_a_time = asyncio.Lock()

    async def apply(self, key: str, work: Work, expected: str, deadline: datetime) -> Applied:
        async with self._one_at_a_time:
            applied = await super().apply(key, work, expected, deadline)
            with (self._skus / str(work.arguments["target"])).open("a") as sku:
                sku.write(f"{work.arguments['text']}\n")
        return applied


@pytest.fixture
async def stack(temporal: TemporalSettings, tmp_path: Path) -> AsyncIterator[Stack]:
    shelf = Shelf(tmp_path / "notes")
    parts = Parts(agents=AGENTS, connectors=lambda known: {**known, "null": shelf})
    async with stack_of(settings_for(temporal, tmp_path, policy=policies()), parts) as made:
        yield made


async def both(stack: Stack, sku: str) -> tuple[Started, Started]:
    """Both planned against the same SKU, both waiting for people."""
    price = await stack.propose(a_key(), note("price: 12", target=sku))
    words = await stack.propose(a_key(), note("words: warm", target=sku), agent="keep")
    return price, words


async def planned_against(stack: Stack, run: Started) -> list[str]:
    """The version of the SKU that each intent of a run was made against."""
    intents = [event for event in await stack.events(run) if event.type is EventType.INTENT]
    refs = [Ref(digest=event.body["digest"], size=0) for event in intents]
    read = [Intent.model_validate_json(await stack.content.get("default", ref)) for ref in refs]
    return [intent.plans[0].target_version for intent in read]


async def of_type(stack: Stack, run: Started, kind: EventType) -> list[int]:
    return [event.seq for event in await stack.events(run) if event.type is kind]


async def test_of_two_agents_with_one_sku_the_second_is_asked_again_on_what_the_first_made(
    stack: Stack,
) -> None:
    sku = f"sku-{a_key()}"
    price, words = await both(stack, sku)
    late = await stack.digest(words)
    await stack.approve(price)
    assert (await price.handle.result()).status is Status.EXECUTED
    assert (await stack.answer(words, Kind.APPROVE, late)).counted
    again = await stack.digest(words, number=2)
    text = (stack.settings.data / "notes" / "targets" / sku).read_bytes()
    assert text == b"price: 12\n"
    assert await planned_against(stack, words) == ["absent", sha256(text)]
    assert (await stack.answer(words, Kind.APPROVE, late)).field == "digest"
    await stack.answer(words, Kind.APPROVE, again)
    assert (await words.handle.result()).status is Status.EXECUTED
    assert (stack.settings.data / "notes" / "targets" / sku).read_text() == "price: 12\nwords: warm\n"


async def test_when_both_are_approved_at_once_one_order_stands_in_the_ledger_and_on_the_target(
    stack: Stack,
) -> None:
    sku = f"sku-{a_key()}"
    runs = await both(stack, sku)
    digests = [await stack.digest(run) for run in runs]
    await asyncio.gather(
        *(stack.answer(run, Kind.APPROVE, digest) for run, digest in zip(runs, digests, strict=True))
    )
    async with asyncio.timeout(60):
        while not (drifted := [run for run in runs if await of_type(stack, run, EventType.DRIFT)]):
            await asyncio.sleep(0.01)
        (second,) = drifted
        (first,) = (run for run in runs if run is not second)
        assert (await first.handle.result()).status is Status.EXECUTED
        await stack.answer(second, Kind.APPROVE, await stack.digest(second, number=2))
        assert (await second.handle.result()).status is Status.EXECUTED
    lines = (stack.settings.data / "notes" / "targets" / sku).read_text().splitlines()
    wrote = {runs[0].workflow_id: "price: 12", runs[1].workflow_id: "words: warm"}
    assert lines == [wrote[first.workflow_id], wrote[second.workflow_id]]
    (receipt,) = await of_type(stack, first, EventType.RECEIPT)
    (later,) = await of_type(stack, second, EventType.RECEIPT)
    replanned = (await of_type(stack, second, EventType.INTENT))[1]
    assert receipt < later and replanned < later
    assert await of_type(stack, first, EventType.DRIFT) == []
