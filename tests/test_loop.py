from __future__ import annotations

from models.loop import Status
from tests.conftest import Stack, a_key, note


async def test_an_approved_intent_is_carried_out_once_and_recorded(stack: Stack) -> None:
    run = await stack.propose(a_key(), note())
    judged = await stack.approve(run)
    assert judged.counted
    outcome = await run.handle.result()
    assert outcome.status is Status.EXECUTED
    assert len(stack.notes()) == 1
    assert await stack.types(run) == [
        "request", "proposal", "plan", "intent", "delivery", "verdict", "apply", "receipt", "outcome"
    ]  # fmt: skip
