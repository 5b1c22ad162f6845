from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from models.gate import Kind
from scripts.chaos.cases import (
    APPLYING,
    ASKED,
    BLIND,
    BOOKKEEPING,
    DOUBTFUL,
    INDEXING,
    PLANNING,
    SITE,
    SWAPPED,
    THINKING,
    UNDOING,
    VERDICT,
    Case,
    Row,
    Story,
)
from scripts.chaos.hooks import BACKGROUND, How
from scripts.chaos.judge import judge, look
from scripts.chaos.supervisor import Chaos, Server, free_port, settings_for, stack, temporal_at

IN_FLIGHT = tuple(
    f"apply.0.{point}" for point in ("reserve.after", "send.before", "sent", "send.after", "confirm.after")
)
WOKEN = ("apply.0.send.before", "apply.0.send.after")
OPPOSED = ("record.verdict.commit.before", "record.verdict.commit.inside", "record.verdict.commit.after")


def rows() -> Iterator[Row]:
    """Every boundary that a role owns, once; the full product is `python -m scripts.chaos`."""
    yield Row(sparse(BOOKKEEPING))
    yield Row(sparse(VERDICT))
    yield Row(OPPOSED, opposite=True)
    yield Row(OPPOSED, answer=Kind.REJECT, opposite=True)
    yield Row(("conclude.commit.after",), answer=Kind.REJECT, opposite=True)
    yield Row((*sparse(PLANNING), *APPLYING))
    yield Row((*APPLYING, *SWAPPED), connector=SITE)
    yield Row(sparse(UNDOING), Story.UNDONE)
    yield Row(sparse(THINKING), Story.WHOLE)
    yield Row(IN_FLIGHT, connector=ASKED)
    yield Row(sorted(DOUBTFUL), connector=BLIND)


def stops() -> Iterator[Row]:
    for connector in ("null", SITE, ASKED, BLIND):
        yield Row(WOKEN, connector=connector, how=How.STOP)
    yield Row(SWAPPED, connector=SITE, how=How.STOP)
    yield Row((OPPOSED[0], OPPOSED[2]), how=How.STOP, opposite=True)


def sparse(boundaries: Sequence[str]) -> list[str]:
    """Without the first and last line of an activity, where nothing stands between them and a side effect."""
    return [one for one in boundaries if not one.endswith((".start", ".end"))]


def cases_of(some: Iterator[Row]) -> list[Case]:
    return [case for number, row in enumerate(some) for case in row.cases(f"r{number}-")]


@asynccontextmanager
async def chaos_in(folder: Path) -> AsyncIterator[tuple[Chaos, Server]]:
    settings = settings_for(temporal_at(free_port(), free_port()), folder, free_port())
    server = Server(settings.temporal, folder)
    await server.start()
    try:
        async with stack(settings) as chaos:
            yield chaos, server
    finally:
        server.kill()


async def faults_of(chaos: Chaos, cases: list[Case]) -> list[str]:
    outcomes = await chaos.run_all(cases)
    assert chaos.missed() == []
    return await judge(chaos.settings, chaos.database, list(chaos.cases.values()), outcomes)


async def test_a_kill_at_any_boundary_of_any_role_leaves_one_effect_and_one_outcome(tmp_path: Path) -> None:
    async with chaos_in(tmp_path) as (chaos, _):
        for boundary in INDEXING:
            chaos.arms.arm(BACKGROUND, boundary, How.KILL)
        cases = cases_of(rows())
        assert await faults_of(chaos, cases) == []
        assert {case.boundary for case in cases} <= {hit.boundary for hit in chaos.arms.hits()}
        whole = [case.workflow_id for case in chaos.cases.values() if case.story is Story.WHOLE]
        while await chaos.indexed() != sorted(whole):
            await asyncio.sleep(0.05)
        assert {*INDEXING} <= {hit.boundary for hit in chaos.arms.hits()}


async def test_a_process_woken_after_its_deadline_changes_nothing_any_more(tmp_path: Path) -> None:
    async with chaos_in(tmp_path) as (chaos, _):
        assert await faults_of(chaos, cases_of(stops())) == []
        assert {hit.how for hit in chaos.arms.hits()} == {How.STOP}
        assert chaos.woken


async def test_nothing_is_lost_when_the_engine_itself_is_killed(tmp_path: Path) -> None:
    async with chaos_in(tmp_path) as (chaos, server):
        plain = [Case(f"plain-{number}", "", connector=("null", SITE)[number % 2]) for number in range(8)]
        waiting = asyncio.create_task(chaos.run(plain))
        while not look(chaos.settings).effects:
            await asyncio.sleep(0.01)
        server.kill()
        await server.start()
        assert await judge(chaos.settings, chaos.database, plain, await waiting) == []


async def test_a_counted_update_that_the_engine_forgot_stands_against_its_opposite(tmp_path: Path) -> None:
    async with chaos_in(tmp_path) as (chaos, server):

        async def forget() -> None:
            chaos.forget_updates()
            server.kill()
            await server.start()

        chaos.by_update, chaos.between = True, forget
        assert await faults_of(chaos, [Case("forgotten", "record.verdict.commit.after", opposite=True)]) == []
        types = [event.type.value for event in await chaos.ledger.tail("default", 1000)]
        assert types.count("verdict") == types.count("refusal") == 1
