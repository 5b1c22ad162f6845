"""A worker whose clock is off does nothing, since deadlines of attempts are everybody's."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from temporalio.testing import ActivityEnvironment

from activities.actions import AHEAD, BEHIND, Actions
from models.errors import ConnectorUnavailable
from models.orders import Effect, Effected, EffectOrder

NOW = datetime(2026, 5, 1, tzinfo=UTC)
HOUR, TICK = timedelta(hours=1), timedelta(microseconds=1)
ORDER = EffectOrder(tenant="default", workflow_id="run", digest="0" * 64, action=0)


class Engine:
    def __init__(self) -> None:
        self.asked = 0

    async def apply(self, order: EffectOrder) -> Effect:
        self.asked += 1
        return Effect(what=Effected.ABSENT)

    settle = undo = apply


def at_server(now: datetime) -> ActivityEnvironment:
    environment = ActivityEnvironment()
    environment.info = replace(environment.info, started_time=now)
    return environment


@pytest.mark.parametrize("step", ["apply", "settle", "undo"])
async def test_a_worker_whose_clock_is_off_does_nothing_and_is_asked_again(step: str) -> None:
    engine = Engine()
    for off in (-HOUR, -BEHIND - TICK, AHEAD + TICK, HOUR):
        act = getattr(Actions(engine, lambda off=off: NOW + off), step)
        with pytest.raises(ConnectorUnavailable, match="clock"):
            await at_server(NOW).run(act, ORDER)
    assert engine.asked == 0
    for off in (-BEHIND, timedelta(0), AHEAD):
        act = getattr(Actions(engine, lambda off=off: NOW + off), step)
        assert (await at_server(NOW).run(act, ORDER)).what is Effected.ABSENT
    assert engine.asked == 3
