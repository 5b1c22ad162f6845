from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from activities.connectors.base import Applied, Work
from activities.connectors.gate_policy import GatePolicy
from activities.services.amendments import Rules
from activities.services.checkpoints import Checkpoints, load_key
from activities.services.content import put_model
from activities.services.ledger_export import of_database, of_lines, to_lines
from activities.services.ledger_store import entries_in
from activities.services.reservations import Claimant, reserve
from activities.services.signatures import fingerprint
from activities.services.verifier import Verifier
from models.amendments import Amendment, Autonomy, base_of
from models.answers import Answer, Identity, recorded
from models.errors import ConnectorRejected, ConnectorUnavailable, PolicyDenied
from models.gate import Judged, Kind
from models.ledger import Draft, Entry, EventType, policy_stream
from models.loop import Assurance, GateRule, Intent, Outcome, Ref, Status, action_key
from models.people import Key, Person
from models.policy import GATE_POLICY, POLICY_AGENT, AgentPolicy, Policy
from models.settings import Settings, TemporalSettings
from scripts import verify_ledger
from scripts.commands.answer import signed
from scripts.commands.autonomy import force_of
from scripts.commands.findings import Health
from scripts.commands.policy import Wanted, earned_by, look_at_policy, proposed
from scripts.exits import Exit
from temporal.client import Started
from tests.conftest import Stack, a_key, note, settings_for, stack_of
from tests.test_cli import command, offline, run
from tests.test_signatures import make_key
from workers.compose import utc_now

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
    # All tests share one Temporal, in which the content names the run.
    begun = await proposed(stack.settings, sent | {"why": a_key()}, requester)
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
    record = json.loads((await command(stack, "autonomy", "--earned", "500", "--json")).stdout)
    assert {one["action"]["connector"]: one["suggestion"] for one in record} == {
        "null": "ask",
        GATE_POLICY: "ask",
    }
    rules = json.loads((await command(stack, "policy", "show", "external", "--json")).stdout)
    assert (rules[0]["source"], rules[0]["autonomy"]["grants"]) == ("narrowed", [])
    assert await verified(stack) == ("sound", 0)


async def a_change(stack: Stack, key: Path, **more: Any) -> None:
    """Notes may pass alone from now on, since people agreed to it."""
    sent = {"agent": "external", "autonomy": {"automatic": True} | more}
    assert (await changes(stack, sent, key)).status is Status.EXECUTED


def rules_of(stack: Stack, settings: Settings | None = None, agent: str = "external") -> Rules:
    force = force_of(settings or stack.settings)
    return stack.database.read_now(lambda link: force.rules(link, "default", agent))


async def test_what_waited_under_the_policy_before_is_bound_anew_and_counts_as_nothing_gone_wrong(
    stack: Stack, key: Path
) -> None:
    run = await stack.propose(a_key(), note())
    digest = await stack.digest(run)
    await a_change(stack, key, automatic_up_to="read_only")
    assert (await stack.answer(run, Kind.APPROVE, digest)).counted
    assert (await stack.approve(run, 2)).counted
    assert (await run.handle.result()).status is Status.EXECUTED
    types = await stack.types(run)
    assert (types.count("intent"), types.count("drift")) == (2, 1)
    assert rules_of(stack).source == "changed"
    record = json.loads((await command(stack, "autonomy", "--json")).stdout)
    note_ = next(one for one in record if one["action"]["connector"] == "null")
    assert (note_["record"]["unchanged"], note_["record"]["undone"]) == (1, 0)


async def test_a_change_counts_for_as_long_as_its_proof_and_its_file_do(stack: Stack, key: Path) -> None:
    await a_change(stack, key)
    assert rules_of(stack).policy.gate.automatic
    settings = stack.settings
    edited = settings.policy.agents | {"stub": AgentPolicy(connectors=())}
    others = {
        "revoked": settings.model_copy(update={"people": people(key, revoked=True)}),
        "another owner": settings.model_copy(update={"people": (Person(name="cy", roles=("owner",)),)}),
        "edited": settings.model_copy(update={"policy": Policy(agents=edited)}),
        "switched off": settings.model_copy(
            update={"policy": Policy(agents={"external": settings.policy.agents["external"]})}
        ),
    }
    found = {name: rules_of(stack, one) for name, one in others.items()}
    assert {name: one.policy.gate.automatic for name, one in found.items()} == dict.fromkeys(others, False)
    assert [one.source for one in found.values()] == ["lapsed"] * 3 + ["file"]
    looked = await look_at_policy(others["edited"])
    assert [(one.name, one.health) for one in looked] == [("policy external", Health.ABSENT)]
    assert [one.health for one in await look_at_policy(settings)] == [Health.OK]


async def test_a_change_that_nobody_agreed_to_is_believed_by_nobody_and_found_by_both_verifiers(
    stack: Stack, key: Path
) -> None:
    await a_change(stack, key, automatic_up_to="read_only")
    run = await proposal_of(stack, {"agent": "external", "autonomy": {"automatic": True}})
    digest = await stack.digest(run)
    assert await verified(stack) == ("sound", 0)
    await forge_change(stack, run.workflow_id, digest)
    rules = rules_of(stack)
    assert (rules.source, rules.policy.gate.automatic) == ("lapsed", False)
    assert "waiting" in rules.why
    assert await verified(stack) == ("tampered", 1)


async def test_a_change_bound_under_a_gate_of_its_own_is_believed_by_nobody(
    stack: Stack, tmp_path: Path
) -> None:
    """Whoever writes the database, and is known here in some role, still changes nothing."""
    run = await proposal_of(stack, {"agent": "external", "autonomy": {"automatic": True}})
    intent = Intent.model_validate_json(
        await stack.content.get("default", Ref(digest=await stack.digest(run), size=0))
    )
    lax = intent.gate.model_copy(update={"roles": ("reader",)})
    key = make_key(tmp_path)
    public = key.with_suffix(".pub").read_text().strip()
    eve = Person(name="eve", roles=("reader",), keys=(Key(public=public),))
    known = stack.settings.model_copy(update={"people": (*stack.settings.people, eve)})
    for gate, said in ((lax, "another rule for changes"), (intent.gate, "the gate says waiting")):
        made = intent.model_copy(update={"gate": gate, "workflow_id": f"forged-{gate.roles[0]}"})
        digest = await stack.database.write(lambda link, made=made: put_model(link, "default", made).digest)
        message = {"digest": digest, "approver": "eve", "role": "reader"}
        answer = Answer.model_validate(await signed("default", Kind.APPROVE, message, key))
        person = Identity(assurance=Assurance.SIGNED, roles=("reader",), key=fingerprint(public))
        verdict = recorded(Kind.APPROVE, answer, person)
        await forge(stack, made.workflow_id, EventType.INTENT, {"digest": digest, "number": 1})
        await forge(stack, made.workflow_id, EventType.VERDICT, verdict.model_dump(mode="json"))
        await forge_change(stack, made.workflow_id, digest)
        rules = rules_of(stack, known)
        assert (rules.source, rules.policy.gate.automatic) == ("lapsed", False)
        assert said in rules.why


async def forge_change(stack: Stack, run: str, digest: str) -> None:
    body = {"agent": "external", "key": action_key(digest, 0), "digest": digest, "run": run}
    base = {"base": base_of(stack.settings.policy)}
    await forge(stack, run, EventType.POLICY_CHANGED, body | base, stream=policy_stream("external"))


async def forge(stack: Stack, run: str, kind: EventType, body: dict[str, Any], stream: str = "") -> None:
    draft = Draft(
        event_id=a_key(),
        stream=stream or run,
        type=kind,
        actor_kind="worker",
        actor_ref="act",
        correlation_id=run,
        body=body,
    )
    await stack.ledger.add("default", draft)


async def verified(stack: Stack) -> tuple[str, int]:
    """What our verifier and the one-file verifier say of the log as it is now."""
    checkpoints = Checkpoints(stack.database, load_key(stack.settings.data), "countersign")
    written = await checkpoints.write("default")
    assert written is not None
    origin, key = "countersign/default", checkpoints.key("default")
    lines = stack.database.read_now(lambda link: tuple(to_lines(of_database(link, "default", origin))))
    ours = Verifier([key], [written.note]).check(of_lines(lines))
    export = stack.settings.data / "export"
    export.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    theirs = verify_ledger.check_export(str(export), [verify_ledger.Key(str(key))], [written.note])
    return ours.status, theirs[0]


async def test_without_an_attempt_of_the_tenant_nothing_changes_and_one_key_changes_it_once(
    stack: Stack, key: Path
) -> None:
    wanted = Amendment(
        agent="external", base=base_of(stack.settings.policy), autonomy=Autonomy(automatic=True)
    )
    target = GatePolicy(stack.database, force_of(stack.settings), utc_now)
    work = Work("amend", wanted.model_dump(mode="json"), "default")
    dry = await target.plan(work)
    with pytest.raises(PolicyDenied, match="no attempt of this tenant"):
        await target.apply("a" * 64 + ".0", work, dry.version, utc_now())
    await a_change(stack, key, automatic_up_to="read_only")
    told = await changes_of(stack)
    assert len(told) == 1
    done = await target.apply(str(told[0].body["key"]), work, "whatever", utc_now())
    assert (await target.verify(work, done)).reference == told[0].body["key"]
    assert rules_of(stack).version == 1


async def test_taking_a_change_back_puts_back_what_was_in_force_before(stack: Stack, key: Path) -> None:
    await a_change(stack, key)
    await a_change(stack, key, automatic_up_to="read_only")
    target = GatePolicy(stack.database, force_of(stack.settings), utc_now)
    first, second = await changes_of(stack)
    for entry in (first, second):
        undo = str(entry.body["key"]) + ".undo"
        who = Claimant(
            tenant="default",
            workflow_id=str(entry.body["run"]),
            key=undo,
            digest=str(entry.body["digest"]),
            action=0,
            guarantee=target.guarantee,
            attempt=timedelta(minutes=5),
            settle=target.settle,
            event=EventType.COMPENSATION,
        )
        await stack.database.write(lambda link, who=who: reserve(link, who, utc_now()))
    wanted = Amendment(agent="external", base=base_of(stack.settings.policy), autonomy=Autonomy())
    work = Work("amend", wanted.model_dump(mode="json"), "default")
    until = utc_now() + timedelta(minutes=5)
    with pytest.raises(ConnectorRejected, match="another change of external came after it"):
        await target.undo(f"{first.body['key']}.undo", work, applied_as(first), until)
    assert rules_of(stack).policy.gate.automatic_up_to == "read_only"
    with pytest.raises(ConnectorUnavailable, match="deadline has passed"):
        await target.undo(f"{second.body['key']}.undo", work, applied_as(second), utc_now())
    for _ in range(2):
        done = await target.undo(f"{second.body['key']}.undo", work, applied_as(second), until)
        assert done.detail == "withdrawn"
    assert rules_of(stack).policy.gate.automatic_up_to == "reversible"
    assert len(await changes_of(stack)) == 3


async def changes_of(stack: Stack) -> tuple[Entry, ...]:
    return await stack.database.read(lambda link: entries_in(link, "default", policy_stream("external")))


def applied_as(entry: Entry) -> Applied:
    return Applied(str(entry.body["key"]), str(entry.body["after"]))


async def test_of_two_changes_planned_against_one_policy_the_second_is_asked_again(
    stack: Stack, key: Path
) -> None:
    first = await proposal_of(stack, {"agent": "external", "autonomy": {"automatic": True}})
    second = await proposal_of(
        stack, {"agent": "external", "autonomy": {"automatic": True, "automatic_up_to": "read_only"}}
    )
    before = await stack.digest(second)
    assert (await agrees(stack, first, key)).counted
    assert (await first.handle.result()).status is Status.EXECUTED
    assert (await agrees(stack, second, key)).counted
    assert await stack.digest(second, 2) != before
    assert rules_of(stack).policy.gate.automatic_up_to == "reversible"
    assert (await agrees(stack, second, key)).counted
    assert (await second.handle.result()).status is Status.EXECUTED
    assert rules_of(stack).policy.gate.automatic_up_to == "read_only"


PROPOSALS = [
    ('agent = "external"\nautomatic = true', ("--as", "bob"), "", Exit.DONE),
    (
        'agent = "external"\nautomatic = "yes please"',
        ("--as", "bob"),
        "automatic: 'yes please'",
        Exit.REFUSED,
    ),
    ('agent = "external"\nroles = ["x"]', ("--as", "bob"), "roles", Exit.REFUSED),
    ('agent = "nobody"\nautomatic = true', ("--as", "bob"), "'nobody' has no policy", Exit.REFUSED),
    ("automatic = true", ("--as", "bob"), "agent", Exit.REFUSED),
    ("agent = ", ("--as", "bob"), "correct the TOML", Exit.REFUSED),
    ('agent = "external"\nautomatic = true', (), "--as: None", Exit.REFUSED),
    ('agent = "external"\nautomatic = true', ("--as", "eve"), "--as: 'eve'", Exit.REFUSED),
    (None, ("--as", "bob"), "give a FILE, or --from-suggestion", Exit.REFUSED),
    (None, ("--as", "bob", "--from-suggestion", "external/null.note"), "nothing is suggested", Exit.REFUSED),
]


async def test_a_proposal_on_the_command_line_is_started_or_refused_by_its_field(stack: Stack) -> None:
    for toml, options, said, code in PROPOSALS:
        given = () if toml is None else ("-",)
        shown = await command(
            stack,
            "policy",
            "propose",
            *given,
            *options,
            "--json",
            stdin=f'why = "{a_key()}"\n{toml}'.encode(),
        )
        assert (shown.exit_code, said in shown.stderr) == (code, True), (toml, shown.output)
    shown = await command(stack, "policy", "show")
    assert "external: as in the file" in shown.stdout
    assert "Nothing was changed" in (await command(stack, "policy", "history")).stdout


def test_where_the_file_names_nobody_for_it_nothing_can_be_proposed(tmp_path: Path) -> None:
    toml = b'agent = "external"\nautomatic = true'
    shown = run(offline(tmp_path), "policy", "propose", "-", "--as", "bob", stdin=toml)
    assert (shown.exit_code, "names nobody who may agree" in shown.stderr) == (Exit.REFUSED, True)


def test_a_rule_for_changes_whose_role_nobody_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="policy wants the role owner to agree, and nobody has it"):
        offline(tmp_path, policy=Policy(agents={POLICY_AGENT: CHANGES}))
