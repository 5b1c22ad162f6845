"""Attempts at one action that overlap: one that was stopped, found out about or replaced, and wakes again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from activities.connectors.base import Applied, Work
from activities.connectors.null import Null
from activities.services.actor import Actor
from activities.services.beliefs import Beliefs
from models.beliefs import Change
from models.errors import ConnectorUnavailable, PreconditionLost
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
        return await super().apply(key, work, expected, deadline)


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
