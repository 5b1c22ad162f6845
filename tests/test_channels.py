from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from pydantic import SecretStr
from temporalio.api.common.v1 import Payload, Payloads, WorkflowExecution
from temporalio.api.workflowservice.v1 import SignalWorkflowExecutionRequest
from temporalio.service import RPCError, RPCStatusCode

from activities.services.identities import statement_of
from models.channels import DeskSettings
from models.gate import Answer, Kind
from models.loop import GateRule, Request, Status
from models.people import Key, Person
from models.policy import AgentPolicy, Policy
from models.settings import TemporalSettings
from models.visibility import Role
from scripts.commands.answer import _answer, signed
from temporal.client import Started, answer, submit
from tests.conftest import ROLES, Stack, a_key, free_port, note, settings_for, stack_of
from tests.test_people import public
from tests.test_signatures import make_key, sign

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = ("ann", "bob", "carl", "dora", "eve", "ines", "external")
PATIENCE = timedelta(seconds=30)
TOKEN = "a-token-of-the-desk-0123456789"
Message = dict[str, Any]


@dataclass
class Room:
    """A stack whose gate wants two signatures, and everybody's keys."""

    stack: Stack
    keys: dict[str, Path]
    http: httpx.AsyncClient
    """Of the desk."""

    async def start(self) -> Started:
        body = json.dumps({"title": "t", "actions": [note(a_key())]})
        request = Request(agent="external", key=a_key(), body=body, requester="ines")
        return await submit(self.stack.client, request, self.stack.settings.temporal)

    async def says(self, run: Started, name: str, kind: Kind = Kind.APPROVE, **more: Any) -> Message:
        key = more.pop("key", name)
        message = {"digest": await self.stack.digest(run), "approver": name} | more
        return await signed("default", kind, message, self.keys[key])

    async def counts(self, run: Started, name: str, kind: Kind = Kind.APPROVE, **more: Any) -> Message:
        message = await self.says(run, name, kind, **more)
        assert (await self.stack.answer(run, kind, **message)).counted
        return message

    async def refusals(self, run: Started, count: int) -> list[dict[str, Any]]:
        while True:
            events = await self.stack.events(run)
            found = [event.body for event in events if event.type.value == "refusal"]
            if len(found) >= count:
                return found
            await asyncio.sleep(0.01)


# The ways in.


async def by_signal(room: Room, run: Started, kind: Kind, message: Message) -> None:
    await run.handle.signal(kind.value, message)


async def by_update(room: Room, run: Started, kind: Kind, message: Message) -> None:
    assert not (await answer(room.stack.client, run.workflow_id, kind, message, PATIENCE)).counted


async def by_command(room: Room, run: Started, kind: Kind, message: Message) -> None:
    judged = await _answer(room.stack.settings, kind, run.workflow_id, message, True, None)
    assert not judged.counted


async def by_any_program(room: Room, run: Started, kind: Kind, message: Message) -> None:
    payload = Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(message).encode())
    await room.stack.client.workflow_service.signal_workflow_execution(
        SignalWorkflowExecutionRequest(
            namespace=room.stack.client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=run.workflow_id),
            signal_name=kind.value,
            input=Payloads(payloads=[payload]),
        )
    )


async def by_webhook(room: Room, run: Started, kind: Kind, message: Message) -> None:
    """Posted to the desk."""
    got = await room.http.post(f"/runs/{run.workflow_id}/{kind.value}", json=message)
    assert (got.status_code, got.json()["counted"]) == (409, False)


CHANNELS = (by_signal, by_update, by_command, by_any_program, by_webhook)


# What is wrong.


async def replayed(room: Room, run: Started) -> Message:
    return await room.counts(run, "ann")


async def expired(room: Room, run: Started) -> Message:
    past = datetime.now(UTC) - timedelta(hours=2)
    times = {"issued_at": past.isoformat(), "expires_at": (past + timedelta(minutes=5)).isoformat()}
    return resigned(room, "ann", await room.says(run, "ann") | times)


async def of_another_digest(room: Room, run: Started) -> Message:
    return await room.says(run, "ann", digest="0" * 64)


async def by_the_proposer(room: Room, run: Started) -> Message:
    return await room.says(run, "external")


async def by_the_requester(room: Room, run: Started) -> Message:
    return await room.says(run, "ines")


async def by_an_unknown_key(room: Room, run: Started) -> Message:
    return await room.says(run, "ann", key="stranger")


async def by_a_revoked_key(room: Room, run: Started) -> Message:
    return await room.says(run, "ann", key="old")


async def by_somebody_unknown(room: Room, run: Started) -> Message:
    return await room.says(run, "mallory", key="stranger")


async def in_a_wrong_namespace(room: Room, run: Started) -> Message:
    message = await room.says(run, "ann")
    return resigned(room, "ann", message, "git")


async def over_other_bytes(room: Room, run: Started) -> Message:
    return await room.says(run, "ann") | {"signature": sign(room.keys["ann"], b"other bytes")}


async def not_signed(room: Room, run: Started) -> Message:
    return {"digest": await room.stack.digest(run), "approver": "ann"}


async def twice_by_one_person(room: Room, run: Started) -> Message:
    await room.counts(run, "ann")
    return await room.says(run, "ann")


async def by_a_delegate_whose_time_is_up(room: Room, run: Started) -> Message:
    until = datetime.now(UTC) + timedelta(seconds=2)
    await room.counts(run, "ann", Kind.DELEGATE, to="bob", until=until.isoformat())
    message = await room.says(run, "bob")
    # Nothing happens at that moment that could be awaited; it merely passes.
    await asyncio.sleep((until - datetime.now(UTC)).total_seconds() + 0.1)
    return message


async def while_somebody_else_was_asked(room: Room, run: Started) -> Message:
    await room.counts(run, "ann", Kind.DELEGATE, to="carl")
    return await room.says(run, "bob")


async def in_a_role_they_do_not_have(room: Room, run: Started) -> Message:
    return await room.says(run, "ann", role="legal")


def resigned(room: Room, name: str, message: Message, namespace: str | None = None) -> Message:
    statement = statement_of("default", Kind.APPROVE, Answer.model_validate(message))
    assert statement is not None
    extra = () if namespace is None else (namespace,)
    return message | {"signature": sign(room.keys[name], statement.bytes(), *extra)}


WRONG: dict[Callable[[Room, Started], Awaitable[Message]], tuple[str, str]] = {
    replayed: ("nonce", "counted already"),
    expired: ("expires_at", "not valid now"),
    of_another_digest: ("digest", "not what is waiting"),
    by_the_proposer: ("approver", "asked for it"),
    by_the_requester: ("approver", "asked for it"),
    by_an_unknown_key: ("signature", "not one of ann's"),
    by_a_revoked_key: ("signature", "revoked"),
    by_somebody_unknown: ("approver", "nobody of that name"),
    in_a_wrong_namespace: ("signature", "another purpose"),
    over_other_bytes: ("signature", "does not fit"),
    not_signed: ("signature", "--sign"),
    twice_by_one_person: ("approver", "approved already"),
    by_a_delegate_whose_time_is_up: ("approver", "delegation to you ended"),
    while_somebody_else_was_asked: ("approver", "delegated to carl"),
    in_a_role_they_do_not_have: ("role", "roles editor"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def room(temporal: TemporalSettings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Room]:
    folder = tmp_path_factory.mktemp("channels")
    keys = {name: make_key(folder, name) for name in (*NAMES, "old", "stranger")}
    old = Key(public=public(keys["old"]), revoked=True)
    people = tuple(
        Person(
            name=name,
            roles=("legal",) if name == "eve" else ("editor",),
            keys=(Key(public=public(keys[name])), *((old,) if name == "ann" else ())),
        )
        for name in NAMES
    )
    rule = GateRule(assurance="signed", approvals=2, veto_roles=("legal",), remind_seconds=None)
    policy = Policy(agents={"external": AgentPolicy(connectors=("null",), gate=rule)})
    desk = DeskSettings(port=free_port(), token=SecretStr(TOKEN))
    settings = settings_for(temporal, folder / "data", policy=policy, people=people, desk=desk)
    settings.data.mkdir()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        stack_of(settings, roles=(*ROLES, Role.DESK)) as stack,
        httpx.AsyncClient(base_url=desk.found_at, headers=headers, trust_env=False, timeout=60) as http,
    ):
        yield Room(stack, keys, http)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
async def test_what_is_wrong_gets_one_reason_whichever_way_it_comes_and_the_run_goes_on(
    room: Room, wrong: Callable[[Room, Started], Awaitable[Message]]
) -> None:
    run = await room.start()
    message = await wrong(room, run)
    before = len(room.stack.notes())
    for number, send in enumerate(CHANNELS, start=1):
        await send(room, run, Kind.APPROVE, message)
        await room.refusals(run, number)
    refusals = await room.refusals(run, len(CHANNELS))
    field, words = WRONG[wrong]
    assert len(refusals) == len(CHANNELS)
    assert all(body == refusals[0] for body in refusals)
    assert refusals[0]["field"] == field
    assert words in refusals[0]["remedy"]
    assert refusals[0]["approver"] == message["approver"]
    assert len(room.stack.notes()) == before
    digest = await room.stack.digest(run)
    for name in ("carl", "dora"):
        if (await room.stack.answer(run, Kind.APPROVE, **await room.says(run, name))).state == "passed":
            break
    outcome = await run.handle.result()
    assert (outcome.status, outcome.digest) == (Status.EXECUTED, digest)
    assert len(room.stack.notes()) == before + 1


async def test_after_a_veto_there_is_nothing_left_to_answer_whichever_way_it_comes(room: Room) -> None:
    run = await room.start()
    before = len(room.stack.notes())
    message = await room.says(run, "carl")
    await room.counts(run, "ann", Kind.DELEGATE, to="bob")
    await room.counts(run, "eve", Kind.REJECT, role="legal")
    assert (await run.handle.result()).status is Status.REJECTED
    for send in (by_signal, by_update, by_any_program):
        with pytest.raises(RPCError) as caught:
            await send(room, run, Kind.APPROVE, message)
        assert caught.value.status is RPCStatusCode.NOT_FOUND
    for send in (by_command, by_webhook):
        await send(room, run, Kind.APPROVE, message)
    [refusal] = await room.refusals(run, 1)
    assert "ended as rejected" in refusal["remedy"]
    assert len(room.stack.notes()) == before
