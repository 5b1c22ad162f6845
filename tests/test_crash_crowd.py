"""Workers that fall while a crowd of messages stands in line: each is refused once, and the answer counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from models.gate import Kind
from scripts.chaos.cases import Case
from scripts.chaos.hooks import How
from scripts.chaos.judge import judge
from tests.test_crash import chaos_in

CROWD = 60
FALLS = tuple(f"record.refusal.commit.{point}" for point in ("before", "inside", "after"))


@pytest.mark.large
async def test_a_crowd_is_refused_once_each_whoever_falls_meanwhile(tmp_path: Path, large: bool) -> None:
    async with chaos_in(tmp_path) as (chaos, server):
        cases = [Case(f"crowd-{how}", "", how=how) for how in (How if large else (How.KILL,))]
        cases += [Case("crowd-engine", "")] * large
        answer = chaos.answer

        async def crowd(run: str, kind: Kind, digest: str) -> None:
            handle, case = chaos.client.get_workflow_handle(run), chaos.cases[run]
            for number in range(CROWD):
                await handle.signal(kind.value, {"digest": "0" * 64, "approver": f"eve{number}"})
                if number == CROWD // 2:
                    for boundary in FALLS if "engine" not in case.key else ():
                        chaos.arms.arm(run, boundary, case.how)
            if "engine" in case.key:
                server.kill()
                await server.start()
            await answer(run, kind, digest)

        chaos.answer = crowd  # type: ignore[method-assign]
        outcomes = await chaos.run(cases)
        assert await judge(chaos.settings, chaos.database, cases, outcomes) == []
        hits = {(hit.run, hit.boundary) for hit in chaos.arms.hits()}
        assert hits == {
            (case.workflow_id, fall) for case in cases if "engine" not in case.key for fall in FALLS
        }
        for case in cases:
            events = await chaos.ledger.of_run(chaos.settings.tenant, case.workflow_id)
            said = Counter(one.body["approver"] for one in events if one.type.value == "refusal")
            assert said == Counter(f"eve{number}" for number in range(CROWD)), case.key
