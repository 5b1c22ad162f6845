from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from models.gate import Judged, Kind
from models.loop import GateRule, Outcome, Status
from models.people import Key, Person
from models.policy import GATE_POLICY, POLICY_AGENT, AgentPolicy, Policy
from models.settings import Settings, TemporalSettings
from scripts.commands.answer import signed
from scripts.commands.policy import Wanted, earned_by, proposed
from temporal.client import Started
from tests.conftest import Stack, a_key, note, settings_for, stack_of
from tests.test_cli import command
from tests.test_signatures import make_key

ANN = "ann@example.test"
CHANGES = AgentPolicy(
    connectors=(GATE_POLICY,), gate=GateRule(roles=("owner",), assurance="signed", remind_seconds=None)
)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("keys"))


def people(key: Path, **more: Any) -> tuple[Person, ...]:
    public = Key(public=key.with_suffix(".pub").read_text().strip(), **more)
    return (Person(name=ANN, roles=("owner",), keys=(public,)), Person(name="bob"))


def settings_with(temporal: TemporalSettings, data: Path, key: Path, **gate: Any) -> Settings:
    rule = AgentPolicy(connectors=("null",), gate=GateRule(remind_seconds=None, **gate))
    policy = Policy(agents={"external": rule, POLICY_AGENT: CHANGES})
    return settings_for(temporal, data, policy=policy, people=people(key))


@pytest.fixture
async def stack(temporal: TemporalSettings, tmp_path: Path, key: Path) -> AsyncIterator[Stack]:
    async with stack_of(settings_with(temporal, tmp_path, key)) as made:
        yield made


async def proposal_of(stack: Stack, sent: dict[str, Any], requester: str = "bob") -> Started:
    begun = await proposed(stack.settings, sent, requester)
    assert begun["was"] == "started"
    run = begun["workflow_id"]
    return Started(run, stack.client.get_workflow_handle(run, result_type=Outcome))


async def agrees(stack: Stack, run: Started, key: Path, **more: Any) -> Judged:
    message = {"digest": await stack.digest(run), "approver": ANN, "role": "owner"} | more
    return await stack.answer(run, Kind.APPROVE, **await signed("default", Kind.APPROVE, message, key))


async def carried_out(stack: Stack, *, by_people: bool, actions: Any = None) -> Outcome:
    run = await stack.propose(a_key(), *(actions or [note()]))
    if by_people:
        assert (await stack.approve(run)).counted
    outcome = await run.handle.result()
    types = await stack.types(run)
    assert ("verdict" in types) is by_people
    return outcome


async def changes(stack: Stack, sent: dict[str, Any], key: Path) -> Outcome:
    run = await proposal_of(stack, sent)
    assert (await agrees(stack, run, key)).counted
    return await run.handle.result()


async def test_what_people_approved_again_and_again_may_pass_alone_until_one_is_taken_back(
    stack: Stack, key: Path
) -> None:
    for _ in range(6):
        assert (await carried_out(stack, by_people=True)).status is Status.EXECUTED
    sent = await earned_by(stack.settings, "external/null.note", Wanted(["null:*"], 20, 30), 500)
    run = await proposal_of(stack, sent)
    digest = await stack.digest(run)
    by_asker = await stack.answer(run, Kind.APPROVE, digest, approver="bob", role="owner")
    assert not by_asker.counted
    assert not (await stack.answer(run, Kind.APPROVE, digest, approver=ANN, role="owner")).counted
    shown = await command(stack, "show", run.workflow_id)
    assert '+grants.earned-1-note.operations = ["note"]' in shown.stdout
    assert "6 of 6 approved unchanged" in shown.stdout
    assert (await agrees(stack, run, key)).counted
    assert (await run.handle.result()).status is Status.EXECUTED
    assert "policy.changed" in await stack.types(run)

    assert (await carried_out(stack, by_people=False)).status is Status.EXECUTED
    undone = await carried_out(stack, by_people=False, actions=[note(), note(fail="rejected")])
    assert undone.status is Status.COMPENSATED
    assert (await carried_out(stack, by_people=True)).status is Status.EXECUTED

    told = json.loads((await command(stack, "policy", "history", "--json")).stdout)
    assert [one["event"] for one in told] == ["policy.changed", "policy.narrowed"]
    assert told[1]["body"]["why"] == "rollback"
    rules = json.loads((await command(stack, "policy", "show", "external", "--json")).stdout)
    assert (rules[0]["source"], rules[0]["autonomy"]["grants"]) == ("narrowed", [])
