from __future__ import annotations

import asyncio
import gc
import json
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import pytest_asyncio
from temporalio.api.common.v1 import Payload
from temporalio.client import WorkflowFailureError
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError

from models.errors import InvalidInput
from models.gate import Kind
from models.loop import Outcome, Request, Status, workflow_id
from models.settings import TemporalSettings
from models.visibility import Queue
from temporal import dev_server
from temporal.client import Started, submit
from tests.conftest import a_key, free_port, note
from tests.shared import Shared, shared_stack

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # The SDK has made its coroutine already when a constructor refuses, and drops it.
    pytest.mark.filterwarnings("ignore:coroutine '_WorkflowInstanceImpl:RuntimeWarning"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(
    temporal: TemporalSettings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared]:
    async with shared_stack(temporal, tmp_path_factory.mktemp("requests")) as made:
        yield made


@pytest.fixture
def dropped() -> Iterator[None]:
    """Coroutines that the SDK drops are collected here, and not in somebody else's test."""
    yield
    gc.collect()


def body(text: str) -> str:
    return json.dumps({"title": text, "actions": [note(text)]})


def a_request(key: str, text: str, **more: Any) -> Request:
    return Request(agent="external", key=key, body=body(text), **more)


async def start(shared: Shared, kind: str, *payloads: Any, id: str | None = None) -> Started:
    """As any program with a Temporal SDK could."""
    handle = await shared.client.start_workflow(
        kind, args=payloads, id=id or a_key(), task_queue=Queue.DECIDE, result_type=Outcome
    )
    return Started(handle.id, handle)


async def failure(run: Started) -> ApplicationError:
    with pytest.raises(WorkflowFailureError) as caught:
        await run.handle.result()
    assert isinstance(caught.value.cause, ApplicationError)
    return caught.value.cause


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def forgetful(
    shared: Shared, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Callable[[], AbstractAsyncContextManager[Shared]]]:
    """Another Temporal server, which knows no history, beside the same database and targets."""
    settings = shared.settings.temporal.model_copy(
        update={"address": f"127.0.0.1:{free_port()}", "ui_port": free_port()}
    )
    data = tmp_path_factory.mktemp("forgetful")
    with open(data / "log", "wb") as log:
        process = subprocess.Popen(
            dev_server.argv(dev_server.binary(), settings, data), stdout=log, stderr=log
        )
    try:
        await dev_server.wait_ready(settings)
        yield lambda: shared_stack(settings, shared.settings.data)
    finally:
        process.terminate()
        process.wait()


async def test_the_same_request_twice_is_one_run(shared: Shared) -> None:
    key = a_key()
    one, two = await asyncio.gather(
        submit(shared.client, a_request(key, "twice"), shared.settings.temporal),
        submit(shared.client, a_request(key, "twice"), shared.settings.temporal),
    )
    assert one.workflow_id == two.workflow_id
    await shared.approve(one)
    assert await shared.outcome(one) == await shared.outcome(two)
    assert shared.standing("twice") == 1


async def test_an_answered_request_is_answered_again_without_acting(shared: Shared) -> None:
    key = a_key()
    run = await submit(shared.client, a_request(key, "answered"), shared.settings.temporal)
    await shared.approve(run)
    first = await shared.outcome(run)
    again = await submit(shared.client, a_request(key, "answered"), shared.settings.temporal)
    assert await shared.outcome(again) == first
    assert shared.standing("answered") == 1


async def test_the_same_request_after_its_history_is_gone_acts_once(
    shared: Shared, forgetful: Callable[[], AbstractAsyncContextManager[Shared]]
) -> None:
    key = a_key()
    run = await submit(shared.client, a_request(key, "gone"), shared.settings.temporal)
    digest = await shared.digest(run)
    await shared.answer(run, Kind.APPROVE, digest)
    first = await shared.outcome(run)
    async with forgetful() as other:
        again = await submit(other.client, a_request(key, "gone"), other.settings.temporal)
        assert await other.outcome(again) == first
        assert (await other.types(again)).count("request") == 1
    assert shared.standing("gone") == 1


async def test_a_history_lost_while_waiting_loses_no_verdict(
    shared: Shared, forgetful: Callable[[], AbstractAsyncContextManager[Shared]]
) -> None:
    key = a_key()
    run = await shared.propose(key, note("lost"), agent="pair")
    digest = await shared.digest(run)
    assert (await shared.answer(run, Kind.APPROVE, digest)).counted
    await run.handle.terminate()
    async with forgetful() as other:
        again = await other.propose(key, note("lost"), agent="pair")
        assert await other.digest(again) == digest
        assert (await other.answer(again, Kind.APPROVE, digest)).field == "approver"
        assert (await other.answer(again, Kind.APPROVE, digest, approver="bob")).counted
        assert (await other.outcome(again)).status is Status.EXECUTED
    assert shared.standing("lost") == 1


async def test_the_same_key_with_another_body_is_refused_while_the_run_is_open(shared: Shared) -> None:
    key = a_key()
    run = await submit(shared.client, a_request(key, "first"), shared.settings.temporal)
    with pytest.raises(InvalidInput, match=f"key: '{key}' is not accepted; {run.workflow_id}"):
        await submit(shared.client, a_request(key, "second"), shared.settings.temporal)
    stored = await shared.content.put("default", body("first").encode())
    same = Request(agent="external", key=key, body=stored)
    assert (await submit(shared.client, same, shared.settings.temporal)).workflow_id == run.workflow_id
    await shared.approve(run)
    await shared.outcome(run)


async def test_the_same_key_with_another_body_is_refused_after_the_end(shared: Shared) -> None:
    key = a_key()
    run = await submit(shared.client, a_request(key, "first of two"), shared.settings.temporal)
    await shared.approve(run)
    await shared.outcome(run)
    again = await submit(shared.client, a_request(key, "second of two"), shared.settings.temporal)
    error = await failure(again)
    assert error.type == "InvalidInput"
    assert error.message.startswith(f"key: '{key}' was used for other content")
    assert (shared.standing("first of two"), shared.standing("second of two")) == (1, 0)


async def test_a_second_workflow_id_for_a_request_does_not_make_a_second_effect(shared: Shared) -> None:
    key = a_key()
    request = a_request(key, "by hand")
    run = await submit(shared.client, request, shared.settings.temporal)
    await shared.digest(run)
    other = await start(shared, "external", request)
    assert run.workflow_id in (await failure(other)).message
    await shared.approve(run)
    first = await shared.outcome(run)
    third = await start(shared, "external", request)
    assert await third.handle.result() == first
    assert shared.standing("by hand") == 1


async def test_a_workflow_id_that_was_another_request_s_is_refused(shared: Shared) -> None:
    taken = f"chosen-{a_key()}"
    first = await start(shared, "external", a_request(a_key(), "chosen"), id=taken)
    await shared.approve(first)
    await shared.outcome(first)
    second = await start(shared, "external", a_request(a_key(), "other"), id=taken)
    assert "was used by another request" in (await failure(second)).message
    assert shared.standing("other") == 0
    assert (await shared.types(first)).count("outcome") == 1


async def test_messages_to_a_run_that_was_not_admitted_do_not_hold_it(shared: Shared) -> None:
    key = a_key()
    run = await submit(shared.client, a_request(key, "held"), shared.settings.temporal)
    handle = await shared.client.start_workflow(
        "external",
        a_request(key, "not held"),
        id=a_key(),
        task_queue=Queue.DECIDE,
        start_signal="approve",
        start_signal_args=["rubbish"],
    )
    error = await failure(Started(handle.id, handle))
    assert "other content" in error.message
    await shared.answer(run, Kind.REJECT, await shared.digest(run))
    await shared.outcome(run)


@pytest.mark.parametrize(
    ("agent", "text", "says"),
    [
        ("external", "not json", "Invalid JSON"),
        ("external", "{}", "title"),
        ("external", '{"title": "x", "actions": []}', "actions"),
        ("external", json.dumps({"title": "x", "actions": [note() | {"connector": "nope"}]}), "not allowed"),
        (
            "external",
            json.dumps({"title": "x", "actions": [note() | {"connector": "site"}]}),
            "not configured",
        ),
        ("external", json.dumps({"title": "x", "actions": [note() | {"operation": "erase"}]}), "operation"),
        ("external", json.dumps({"title": "x", "actions": [note("")]}), "text"),
        ("external", json.dumps({"title": "x", "actions": [note(target="../up")]}), "target"),
    ],
)
async def test_a_body_that_is_no_proposal_fails_with_field_and_remedy(
    shared: Shared, agent: str, text: str, says: str
) -> None:
    before = shared.notes()
    run = await submit(shared.client, Request(agent=agent, key=a_key(), body=text), shared.settings.temporal)
    with pytest.raises(WorkflowFailureError) as caught:
        await run.handle.result()
    assert isinstance(caught.value.cause, ApplicationError)
    assert says in caught.value.cause.message
    events = await shared.events(run)
    assert events[-1].type.value == "outcome"
    assert events[-1].body["status"] == "failed"
    assert shared.notes() == before


def raw(data: bytes, encoding: str) -> RawValue:
    return RawValue(Payload(metadata={"encoding": encoding.encode()}, data=data))


@pytest.mark.parametrize(
    "payloads",
    [
        [],
        [None],
        ["text"],
        [7],
        [[]],
        [{}],
        [{"agent": "external", "key": "k"}],
        [{"agent": "external", "key": "", "body": "x"}],
        [{"agent": "../up", "key": "k", "body": "x"}],
        [{"agent": "external", "key": "k", "body": ""}],
        [{"agent": "external", "key": "k", "body": 5}],
        [{"agent": "external", "key": "k", "body": "x" * 65537}],
        [{"agent": "external", "key": "k", "body": "x", "surplus": 1}],
        [{"agent": "external", "key": "k", "body": {"digest": "x", "size": 1}}],
        [{"agent": "external", "key": "k", "body": "x"}, {"agent": "external", "key": "k", "body": "x"}],
        [b"\x00\xff"],
        [raw(b"\xff\xfe", "binary/rubbish")],
        [raw(b'{"agent":', "json/plain")],
        [raw(b"[" * 10_000, "json/plain")],
    ],
    ids=lambda payloads: repr(payloads)[:40],
)
async def test_an_input_that_is_no_request_fails_the_run_instead_of_trying_for_ever(
    shared: Shared, payloads: list[Any], dropped: None
) -> None:
    error = await failure(await start(shared, "external", *payloads))
    assert error.type == "InvalidInput"
    assert "is not accepted; " in error.message
    assert len(error.message) < 400


async def test_a_body_that_nobody_stored_is_named(shared: Shared) -> None:
    missing = Request.model_validate(
        {"agent": "external", "key": a_key(), "body": {"digest": "0" * 64, "size": 1}}
    )
    run = await submit(shared.client, missing, shared.settings.temporal)
    with pytest.raises(WorkflowFailureError) as caught:
        await run.handle.result()
    assert "no such content is stored" in str(caught.value.cause)
    assert await shared.events(run) == ()


async def test_an_agent_that_does_not_exist_is_refused_by_name(shared: Shared) -> None:
    request = Request(agent="nobody", key=a_key(), body="x")
    error = await failure(await submit(shared.client, request, shared.settings.temporal))
    assert (error.type, "'nobody'" in error.message) == ("UnknownName", True)
    error = await failure(await start(shared, "nobody at all"))
    assert error.type == "UnknownName"


async def test_the_wrong_agent_s_name_in_a_request_is_refused(shared: Shared, dropped: None) -> None:
    run = await start(shared, "external", Request(agent="pair", key=a_key(), body=body("mixed")))
    error = await failure(run)
    assert (error.type, "agent" in error.message) == ("InvalidInput", True)
    assert await shared.events(run) == ()


async def test_the_derived_id_is_what_submit_uses(shared: Shared) -> None:
    key = a_key()
    run = await submit(shared.client, a_request(key, "derived"), shared.settings.temporal)
    assert run.workflow_id == workflow_id("default", "external", key)
    await run.handle.terminate()
