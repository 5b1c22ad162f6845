"""What waits for a tier, as the router sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from activities.services.loads import FRESH, OLD, Line, Loads
from activities.tiers.scripted import Scripted
from models.inference import Needs
from models.routing import Measured, Snapshot, Telemetry, Wish, decide
from models.settings import TemporalSettings, TierSettings
from models.visibility import Role, infer_queue
from temporal.backlog import Backlog
from tests.conftest import settings_for, stack_of
from tests.shared import LIMIT
from tests.test_agents_content import copywriter, draft
from workers.compose import Parts

TIERS = tuple(
    TierSettings(name=name, kind="llama_cpp", url="http://127.0.0.1:9", concurrency=2)
    for name in ("edge", "large")
)


class Known:
    """Each tier was measured at a second a call."""

    async def of(self, task: str) -> Mapping[str, Telemetry]:
        return {tier.name: Telemetry(measured=Measured(calls=1, milliseconds=1000)) for tier in TIERS}

    def fell(self, tier: str, kind: str) -> None:
        self.last = (tier, kind)


class Queues:
    """Lines by queue; counts how often each was asked for."""

    def __init__(self, **lines: Line | None) -> None:
        self.lines = {f"infer-{name}": line for name, line in lines.items()}
        self.asked: list[str] = []
        self.now = 0.0

    async def count(self, queue: str) -> Line | None:
        self.asked.append(queue)
        return self.lines.get(queue)

    def loads(self) -> Loads:
        return Loads(Known(), TIERS, infer_queue, self.count, lambda: self.now)


async def looked(loads: Loads) -> Mapping[str, Telemetry]:
    """Look, let the counts come, and look again."""
    await loads.of("title")
    await loads.counted()
    return await loads.of("title")


async def test_a_line_is_counted_beside_the_route_and_known_to_the_next_one() -> None:
    queues = Queues(edge=Line(waiting=3, served_by=1), large=Line(waiting=0, served_by=1))
    loads = queues.loads()
    assert (await loads.of("title"))["edge"].busy is None
    await loads.counted()
    known = await loads.of("title")
    assert (known["edge"].busy, known["edge"].room) == (5, 2)
    assert (known["large"].busy, known["large"].room) == (None, None)
    assert known["large"].measured.milliseconds == 1000
    assert sorted(queues.asked) == ["infer-edge", "infer-large"]


async def test_more_processes_are_more_room() -> None:
    known = await looked(Queues(edge=Line(waiting=3, served_by=3)).loads())
    assert (known["edge"].busy, known["edge"].room) == (9, 6)


async def test_a_count_is_asked_for_again_when_it_is_not_fresh_and_forgotten_when_it_is_old() -> None:
    queues = Queues(edge=Line(waiting=3, served_by=1))
    loads = queues.loads()
    await looked(loads)
    queues.now, queues.lines = FRESH, {"infer-edge": Line(waiting=1, served_by=1)}
    assert (await loads.of("title"))["edge"].busy == 5
    await loads.counted()
    assert (await loads.of("title"))["edge"].busy == 3
    queues.now += OLD
    assert (await loads.of("title"))["edge"].busy is None
    await loads.close()


async def test_what_cannot_be_counted_stays_unknown_and_a_fall_is_passed_on() -> None:
    loads = Queues(edge=None).loads()
    assert (await looked(loads))["edge"].busy is None
    loads.fell("edge", "TierUnavailable")


async def test_somebody_who_waits_is_sent_past_a_line_and_refused_where_there_are_only_lines() -> None:
    needs = Needs(context_tokens=100, within_milliseconds=2500)
    wish = Wish(task="title", prefer="small", needs=needs)
    known = await looked(Queues(edge=Line(waiting=8, served_by=1), large=None).loads())
    decision = decide(wish, TIERS, Snapshot(tiers=dict(known)))
    assert decision.route.tiers == ("large",)
    lost = {one.tier: one.lost for one in decision.route.candidates}
    assert "would take 5500 ms and somebody waits 2500" in (lost["edge"] or "")
    everywhere = Line(waiting=8, served_by=1)
    known = await looked(Queues(edge=everywhere, large=everywhere).loads())
    assert decide(wish, TIERS, Snapshot(tiers=dict(known))).refused_as == "DeadlineMissed"


async def test_temporal_counts_what_waits_for_a_tier_that_nobody_serves(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    tier = TierSettings(name="unserved", kind="llama_cpp", url="http://127.0.0.1:9")
    settings = settings_for(temporal, tmp_path, tiers=(tier,), probe=False)
    parts = Parts(endpoints={"unserved": Scripted("unserved", copywriter)})
    async with stack_of(settings, parts, (Role.DECIDE, Role.REMEMBER, Role.ACT)) as stack:
        backlog = Backlog(stack.client)
        queue = infer_queue("unserved")
        assert await backlog.line(queue) in (None, Line(0, 0))
        run = await draft(stack)
        async with asyncio.timeout(LIMIT * 2):
            while (line := await backlog.line(queue)) is None or line.waiting == 0:
                await asyncio.sleep(0.05)
        assert line == Line(waiting=1, served_by=0)
        await run.handle.terminate()
