"""An answer whose task Temporal loses: it is sent again, and one that counted is not called refused."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import pytest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from models.gate import Judged, Kind
from scripts.commands.session import Session
from temporal.answering import counted
from temporal.client import answer
from tests.conftest import Stack, a_key, note

COUNTED = Judged(counted=True, state="passed")
MESSAGE = {"digest": "0" * 64, "approver": "ann@example.test"}
HOUR = timedelta(hours=1)


class Losing:
    """A client and its handle: loses updates as told, then answers."""

    def __init__(self, errors: Sequence[RPCStatusCode]) -> None:
        self.errors = list(errors)
        self.sent: list[str] = []

    def get_workflow_handle(self, run: str) -> Losing:
        return self

    async def execute_update(self, name: str, message: Any, *, id: str, **more: Any) -> Judged:
        self.sent.append(id)
        if self.errors:
            raise RPCError("the task that carried it failed", self.errors.pop(0), b"")
        return COUNTED


async def answered(client: Losing, patience: timedelta) -> Judged:
    return await answer(cast(Client, client), "run", Kind.APPROVE, MESSAGE, patience)


async def test_an_answer_that_was_lost_with_its_task_is_sent_again_as_the_same_one() -> None:
    client = Losing([RPCStatusCode.FAILED_PRECONDITION] * 2)
    assert await answered(client, HOUR) == COUNTED
    assert len(client.sent) == 3 and len(set(client.sent)) == 1


@pytest.mark.parametrize(
    ("status", "patience"),
    [
        (RPCStatusCode.NOT_FOUND, HOUR),
        (RPCStatusCode.UNAVAILABLE, HOUR),
        (RPCStatusCode.FAILED_PRECONDITION, timedelta(seconds=-1)),
    ],
)
async def test_any_other_error_is_said_at_once_and_patience_ends(
    status: RPCStatusCode, patience: timedelta
) -> None:
    client = Losing([status])
    with pytest.raises(RPCError):
        await answered(client, patience)
    assert len(client.sent) == 1


async def test_an_answer_that_a_lost_task_had_counted_is_found_in_the_ledger(stack: Stack) -> None:
    run = await stack.propose(a_key(), note())
    digest = await stack.digest(run)
    runs, before = Session(stack.settings, stack.database).runs, await stack.events(run)
    assert (await stack.answer(run, Kind.REJECT, digest)).counted
    await run.handle.result()
    mine = {"digest": digest, "approver": "ann@example.test"}
    found = await counted(runs, run.workflow_id, Kind.REJECT, mine, before)
    assert found is not None and (found.counted, found.state) == (True, "rejected")
    for kind, message in ((Kind.APPROVE, mine), (Kind.REJECT, mine | {"approver": "bob@example.test"})):
        assert await counted(runs, run.workflow_id, kind, message, before) is None
    assert await counted(runs, run.workflow_id, Kind.REJECT, mine, await stack.events(run)) is None
