from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import ValidationError
from temporalio.client import WorkflowFailureError

from models.gate import Kind
from models.ledger import EventType
from models.loop import GateRule, Outcome, Request, Status
from models.people import People, Person, unfit
from models.policy import AgentPolicy, Policy
from models.settings import Settings, TemporalSettings
from scripts.exits import Exit
from temporal.client import Started, submit
from tests.conftest import Stack, a_key, note, settings_for, stack_of
from tests.test_cli import command, offline, proposal, run

pytestmark = pytest.mark.asyncio(loop_scope="module")

PEOPLE = (
    Person(name="ann", roles=("editor",)),
    Person(name="bob", roles=("editor", "chief")),
    Person(name="eve", roles=("reader",)),
)


def roles_policy(**more: Any) -> Policy:
    one = AgentPolicy(
        connectors=("null",),
        gate=GateRule(remind_seconds=None),
        start_roles=("editor",),
        cancel_roles=("chief",),
        **more,
    )
    return Policy(agents={"external": one})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def named(temporal: TemporalSettings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Everybody has a name, starting takes an editor and cancelling the chief."""
    folder = tmp_path_factory.mktemp("starting")
    async with stack_of(settings_for(temporal, folder, policy=roles_policy(), people=PEOPLE)) as made:
        yield made


async def asked(stack: Stack, requester: str | None, key: str, text: str = "x") -> Started:
    body = json.dumps({"title": "t", "actions": [note(text)]})
    request = Request(agent="external", key=key, body=body, requester=requester)
    return await submit(stack.client, request, stack.settings.temporal)


async def begun(stack: Stack, who: str, *more: str) -> dict[str, Any]:
    words = ("start", "external", "-", "--key", a_key(), "--as", who, "--json", *more)
    result = await command(stack, *words, stdin=proposal(a_key()))
    assert result.exit_code == Exit.DONE, result.stderr
    return json.loads(result.stdout)


def handle_of(stack: Stack, run_id: str) -> Started:
    return Started(run_id, stack.client.get_workflow_handle(run_id, result_type=Outcome))


@pytest.mark.parametrize(
    ("people", "roles", "name", "why"),
    [
        ((), (), None, None),
        ((), (), "anybody", None),
        ((), ("editor",), "anybody", "nobody of that name"),
        (PEOPLE, (), None, None),
        (PEOPLE, (), "mallory", "nobody of that name"),
        (PEOPLE, ("editor",), None, "say who asks"),
        (PEOPLE, ("editor",), "eve", "they have reader"),
        (PEOPLE, ("owner", "editor"), "ann", None),
    ],
)
async def test_who_may_do_what_takes_a_role(
    people: tuple[Person, ...], roles: tuple[str, ...], name: str | None, why: str | None
) -> None:
    said = unfit(People(people=people), roles, name)
    assert said is None if why is None else why in str(said)


async def test_a_role_that_nobody_has_is_refused_when_settings_are_read() -> None:
    with pytest.raises(
        ValidationError, match="role chief to start, cancel or break the glass, and nobody has it"
    ):
        Settings(policy=roles_policy(), people=PEOPLE[:1])
    with pytest.raises(ValidationError, match="nobody has it"):
        Settings(policy=roles_policy())


async def test_a_requester_is_no_name_with_spaces(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        Request(agent="external", key="k", body="b", requester="ann ")
    result = run(offline(tmp_path), "start", "external", "-", "--as", "a b", stdin=proposal())
    assert result.exit_code == Exit.REFUSED
    assert "--as: 'a b' is not accepted" in result.stderr


@pytest.mark.parametrize(("who", "why"), [("eve", "they have reader"), ("mallory", "nobody of that name")])
async def test_the_command_starts_nothing_for_who_may_not(tmp_path: Path, who: str, why: str) -> None:
    settings = offline(tmp_path, policy=roles_policy(), people=PEOPLE)
    result = run(settings, "start", "external", "-", "--as", who, stdin=proposal())
    assert result.exit_code == Exit.REFUSED
    assert why in result.stderr
    nameless = run(settings, "start", "external", "-", stdin=proposal())
    assert "say who asks for it" in nameless.stderr


async def test_whoever_started_it_cannot_approve_it_whichever_way_they_try(named: Stack) -> None:
    found = await begun(named, "ann")
    assert (found["was"], found["requester"]) == ("started", "ann")
    run_ = handle_of(named, found["workflow_id"])
    digest = await named.digest(run_)
    words = ("approve", run_.workflow_id, "--digest", digest)
    refused = await command(named, *words, "--as", "ann")
    assert refused.exit_code == Exit.GATE
    assert "asked for it" in refused.stderr
    assert (await named.answer(run_, Kind.APPROVE, digest, approver="ann")).field == "approver"
    await run_.handle.signal("approve", {"digest": digest, "approver": "ann"})
    assert (await command(named, *words, "--as", "bob")).exit_code == Exit.DONE
    assert (await run_.handle.result()).status is Status.EXECUTED
    events = await named.events(run_)
    assert events[0].body["requester"] == "ann"
    assert [event.actor_ref for event in events if event.type is EventType.REFUSAL] == ["ann"] * 3


async def test_settings_name_who_asks_where_the_command_does_not(named: Stack) -> None:
    settings = named.settings.model_copy(update={"approver": "ann"})
    by_ann = Stack(named.client, settings, named.database)
    words = ("start", "external", "-", "--key", a_key())
    said = await command(by_ann, *words, stdin=proposal(a_key()))
    assert "for      ann, who may approve it only where policy says so" in said.stdout


@pytest.mark.parametrize(("who", "why"), [("eve", "they have reader"), (None, "say who asks for it")])
async def test_a_run_that_any_program_started_for_who_may_not_is_not_admitted_and_its_key_stays_free(
    named: Stack, who: str | None, why: str
) -> None:
    key = a_key()
    run_ = await asked(named, who, key)
    with pytest.raises(WorkflowFailureError) as caught:
        await run_.handle.result()
    assert why in str(caught.value.cause)
    assert await named.events(run_) == ()
    again = await asked(named, "ann", key)
    assert (await named.answer(again, Kind.APPROVE, await named.digest(again), approver="bob")).counted
    assert (await again.handle.result()).status is Status.EXECUTED


async def test_who_takes_a_run_up_again_does_not_become_the_one_who_asked(named: Stack) -> None:
    key = a_key()
    first = await asked(named, "ann", key)
    await named.digest(first)
    await first.handle.terminate()
    second = await asked(named, "bob", key)
    digest = await named.digest(second)
    assert not (await named.answer(second, Kind.APPROVE, digest, approver="ann")).counted
    revised = await named.answer(second, Kind.REVISE, digest, approver="ann", comment="again")
    assert revised.counted
    later = await named.digest(second, 2)
    assert (await named.answer(second, Kind.APPROVE, later, approver="ann")).field == "approver"
    assert (await named.answer(second, Kind.APPROVE, later, approver="bob")).counted
    assert (await second.handle.result()).status is Status.EXECUTED


async def test_cancelling_takes_its_role_and_stands_in_the_ledger(named: Stack) -> None:
    before = len(named.notes())
    run_ = await asked(named, "ann", a_key())
    await named.digest(run_)
    refused = await command(named, "cancel", run_.workflow_id, "--as", "ann")
    assert refused.exit_code == Exit.GATE
    assert "one of the roles chief" in refused.stderr
    words = ("cancel", run_.workflow_id, "--as", "bob", "--comment", "not needed", "--json")
    done = await command(named, *words)
    assert done.exit_code == Exit.DONE, done.stderr
    assert (await run_.handle.result()).status is Status.CANCELLED
    assert len(named.notes()) == before
    told = {event.type: event for event in await named.events(run_)}
    assert told[EventType.REFUSAL].body["approver"] == "ann"
    assert told[EventType.CANCEL].actor_ref == "bob"
    assert "not needed" not in json.dumps(told[EventType.CANCEL].body)
    late = await command(named, *words)
    assert late.exit_code == Exit.GATE
    assert "has ended as cancelled" in late.stderr


async def test_cancelling_a_run_that_is_not_there_says_so(named: Stack) -> None:
    gone = await command(named, "cancel", "external-nothing", "--as", "bob")
    assert gone.exit_code == Exit.REFUSED
    assert "no such run is recorded" in gone.stderr


async def test_a_run_that_temporal_lost_is_not_said_to_be_cancelled(named: Stack) -> None:
    run_ = await asked(named, "ann", a_key())
    await named.digest(run_)
    await run_.handle.terminate()
    lost = await command(named, "cancel", run_.workflow_id, "--as", "bob")
    assert lost.exit_code == Exit.GATE
    assert "no open run" in lost.stderr
