"""Attempts at one action that overlap: one that was stopped, found out about or replaced, and wakes again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from activities.connectors.base import Applied, Work
from activities.connectors.null import Null
from activities.services.actor import Actor
from activities.services.beliefs import Beliefs
from activities.services.database import Database
from activities.services.ledger_store import entries_in
from models.beliefs import Change
from models.errors import ConnectorUnavailable, PreconditionLost
from models.ledger import act_stream
from models.loop import Guarantee
from models.orders import Effect, Effected
from scripts.chaos.bound import AGENT, NOW, TENANT, World

ATTEMPT = timedelta(minutes=1)
Step = Callable[[], Awaitable[object]]


class Slow(Null):
    """A target at which something else happens before it answers."""

    def __init__(self, folder: Path, guarantee: Guarantee) -> None:
        super().__init__(folder, lambda: NOW)
        self.guarantee = guarantee
        self.sent = 0
        self.after_apply: Step | None = None
        self.before_find: Step | None = None
        self.before_apply: Step | None = None

    async def find(self, key: str, work: Work) -> Applied | None:
        found = await super().find(key, work)
        if (step := self.before_find) is not None:
            self.before_find = None
            await step()
        return found

    async def apply(self, key: str, work: Work, expected: str, deadline: datetime) -> Applied:
        if (step := self.before_apply) is not None:
            self.before_apply = None
            await step()
        self.sent += 1
        applied = await super().apply(key, work, expected, deadline)
        if (step := self.after_apply) is not None:
            self.after_apply = None
            await step()
        return applied


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, seed=1)
    yield made
    made.database.close()


def actor(world: World, target: Slow, clock: Clock) -> Actor:
    return Actor(world.database, {"null": target}, world.around.policy, ATTEMPT, clock)


async def fails() -> None:
    raise ConnectorUnavailable("no answer")


@pytest.mark.parametrize("guarantee", [Guarantee.KEYED, Guarantee.ASKED])
async def test_an_action_is_not_called_absent_while_an_attempt_that_woke_meanwhile_does_it(
    world: World, guarantee: Guarantee
) -> None:
    clock, target = Clock(), Slow(world.folder, guarantee)
    first, second = actor(world, target, clock), actor(world, target, clock)
    bound = await world.bind("overlap")
    target.before_apply = fails
    with pytest.raises(ConnectorUnavailable, match="no answer"):
        await first.apply(bound.order)
    clock.now = NOW + 2 * ATTEMPT
    reserved, go_on = asyncio.Event(), asyncio.Event()
    waking = list[asyncio.Task[Effect]]()

    async def sending() -> None:
        reserved.set()
        await go_on.wait()

    async def wakes() -> None:
        target.before_apply = sending
        waking.append(asyncio.create_task(second.apply(bound.order)))
        await reserved.wait()

    # Whoever settles has looked and found nothing; before that is written down the other one wakes.
    target.before_find = wakes
    with pytest.raises(ConnectorUnavailable, match="other hands"):
        await first.settle(bound.order)
    go_on.set()
    assert (await waking[0]).what is Effected.APPLIED
    settled = await first.settle(bound.order)
    assert (settled.what, world.effects()) == (Effected.APPLIED, 1)


async def test_an_attempt_that_finds_its_target_changed_does_not_close_what_another_one_is_doing(
    world: World,
) -> None:
    clock, target = Clock(), Slow(world.folder, Guarantee.KEYED)
    first, second = actor(world, target, clock), actor(world, target, clock)
    bound = await world.bind("drift")

    async def replaced() -> None:
        target.before_apply = fails
        with pytest.raises(ConnectorUnavailable, match="no answer"):
            await second.apply(bound.order)
        raise PreconditionLost("the target has changed")

    target.before_apply = replaced
    with pytest.raises(ConnectorUnavailable, match="other hands"):
        await first.apply(bound.order)
    # The one that took over is still at it, and what it does counts.
    done = await second.apply(bound.order)
    assert (done.what, world.effects()) == (Effected.APPLIED, 1)


async def test_asked_again_an_action_whose_grounds_have_changed_is_to_be_thought_of_again(
    world: World,
) -> None:
    clock, target = Clock(), Slow(world.folder, Guarantee.KEYED)
    bound = await world.bind("grounds")
    change = Change(
        tenant=TENANT, agent=AGENT, subject=bound.subject, event="grounds-2", sets={"price": "other"}
    )
    await Beliefs(world.database, clock).change(change)
    heard = [await actor(world, target, clock).apply(bound.order) for _ in range(2)]
    assert [(one.what, one.rethink) for one in heard] == [(Effected.DRIFTED, True)] * 2


@pytest.mark.parametrize("step", ["apply", "settle"])
async def test_an_effect_that_a_restored_database_knows_nothing_of_is_found_and_not_done_again(
    world: World, step: str
) -> None:
    clock, target = Clock(), Slow(world.folder, Guarantee.ASKED)
    bound = await world.bind("restored")
    older = world.folder.parent / "older.db"
    await world.database.read(lambda link: _driver(link).execute("VACUUM INTO ?", (str(older),)) and None)
    target.after_apply = fails
    with pytest.raises(ConnectorUnavailable, match="no answer"):
        await actor(world, target, clock).apply(bound.order)
    await asyncio.to_thread(world.database.close)
    world.database = Database(f"sqlite:///{older}")
    again = actor(world, target, clock)
    effect = await (again.apply if step == "apply" else again.settle)(bound.order)
    assert (effect.what, target.sent, world.effects()) == (Effected.APPLIED, 1, 1)
    assert await acted(world, bound.order.workflow_id) == ["apply", "receipt"]


@pytest.mark.parametrize("guarantee", list(Guarantee))
async def test_a_receipt_is_kept_where_the_database_lost_the_reservation_meanwhile(
    world: World, guarantee: Guarantee
) -> None:
    clock, target = Clock(), Slow(world.folder, guarantee)
    bound = await world.bind("lost")

    async def lose() -> None:
        await world.run("DELETE FROM effect")

    target.after_apply = lose
    effect = await actor(world, target, clock).apply(bound.order)
    assert (effect.what, target.sent, world.effects()) == (Effected.APPLIED, 1, 1)
    assert (await actor(world, target, clock).apply(bound.order)).what is Effected.APPLIED
    assert (target.sent, await acted(world, bound.order.workflow_id)) == (1, ["apply", "receipt"])


async def acted(world: World, run: str) -> list[str]:
    found = await world.database.read(lambda link: entries_in(link, TENANT, act_stream(run)))
    return [entry.type.value for entry in found]


def _driver(link: Connection) -> Any:
    """The driver's connection, outside any transaction."""
    return link.connection.driver_connection
