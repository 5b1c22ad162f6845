"""A task of a flooded run that was lost after it had logged: what it logged stands once."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

from models.gate import Kind
from models.ledger import EventType
from models.loop import Status
from models.settings import TemporalSettings
from models.visibility import Role
from temporal.client import answer
from tests.conftest import a_key, note
from tests.shared import shared_stack
from workers.compose import role


def about_another(number: int) -> dict[str, Any]:
    return {"digest": "0" * 64, "approver": f"eve{number}"}


async def test_what_a_lost_task_of_a_crowd_had_logged_is_not_logged_again_whoever_comes_first(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    # The first messages of a crowd are judged one by one, behind the line of the others.
    logged = range(1, 31)
    async with shared_stack(temporal, tmp_path, roles=(Role.ACT,)) as shared:
        async with role(shared.client, shared.settings, Role.DECIDE):
            run = await shared.propose(a_key(), note())
            digest = await shared.digest(run)
            await run.handle.signal(Kind.APPROVE.value, about_another(0))
            (first,) = await shared.until(run, "refusal")
        # Nobody works on the run: all of the crowd comes in one task, and another one of them was lost.
        for number in range(1, 120):
            await run.handle.signal(Kind.APPROVE.value, about_another(number))
        bodies = [first.body | {"approver": f"eve{number}"} for number in logged]
        await shared.lose(run, *[(EventType.REFUSAL, body) for body in bodies])
        async with role(shared.client, shared.settings, Role.DECIDE):
            message = {"digest": digest, "approver": "ann"}
            judged = await answer(shared.client, run.workflow_id, Kind.APPROVE, message, timedelta(minutes=1))
            assert judged.counted
            assert (await run.handle.result()).status is Status.EXECUTED
        said = Counter(one.body["approver"] for one in await shared.until(run, "refusal"))
    assert said == Counter(f"eve{number}" for number in range(120))
