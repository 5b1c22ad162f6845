from __future__ import annotations

import asyncio
import re
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from activities.services.database import Database
from activities.services.grants import give_back, take_use
from models.canonical import digest_of
from models.errors import InvalidInput
from models.gate import (
    Answer,
    Identity,
    Kind,
    Refusal,
    Standing,
    Verdict,
    assignee,
    closes_at,
    is_automatic,
    judge,
    may_act,
    standing,
)
from models.ledger import Entry, EventType
from models.loop import Cost, Exemption, GateRule, Intent, Request, Reversibility, Status, Use
from models.policy import AgentPolicy, Policy, covers, is_current, policy_digest
from models.settings import Settings, TemporalSettings
from scripts import verify_ledger
from temporal.client import submit
from tests.conftest import a_key, note, settings_for, stack_of
from tests.databases import migrated
from tests.intents import DAY, START, a_stream, a_verdict, an_intent
from workers import config

HOUR = timedelta(hours=1)


def judged(
    intent: Intent,
    kind: Kind,
    approver: str,
    *before: Verdict,
    now: datetime = START,
    identity: Identity | None = None,
    **more: Any,
) -> Verdict | Refusal:
    digest = digest_of(intent)
    answer = Answer(digest=digest, approver=approver, **more)
    closing = START + 7 * DAY
    return judge(kind, answer, intent, digest, before, closing, now, identity or Identity())


def refused(ruling: Verdict | Refusal) -> str:
    assert isinstance(ruling, Refusal), ruling
    return ruling.field


def costing(*costs: Cost, gate: GateRule) -> Intent:
    made = an_intent(gate, (Reversibility.REVERSIBLE,) * len(costs))
    plans = [plan.model_copy(update={"cost": cost}) for plan, cost in zip(made.plans, costs, strict=True)]
    return made.model_copy(update={"plans": tuple(plans)})


def a_grant(**more: Any) -> Exemption:
    fields: dict[str, Any] = {
        "name": "notes",
        "connector": "null",
        "operations": ("note",),
        "targets": ("null:n*",),
        "max_uses": 2,
        "valid_until": START + 2 * HOUR,
    }
    return Exemption(**(fields | more))


def test_whoever_asked_for_it_can_reject_but_neither_approve_nor_choose_who_does() -> None:
    intent = an_intent(requester="Ann")
    assert refused(judged(intent, Kind.APPROVE, "ann")) == "approver"
    assert refused(judged(intent, Kind.DELEGATE, "ANN", to="bob")) == "approver"
    assert refused(judged(intent, Kind.DELEGATE, "bob", to="ann")) == "to"
    assert isinstance(judged(intent, Kind.REJECT, "ann"), Verdict)
    assert isinstance(judged(intent, Kind.APPROVE, "bob"), Verdict)


def test_with_self_approval_the_requester_may_approve_and_the_agent_still_may_not() -> None:
    intent = an_intent(GateRule(self_approval=True), requester="ann")
    assert isinstance(judged(intent, Kind.APPROVE, "ann"), Verdict)
    assert refused(judged(intent, Kind.APPROVE, intent.proposer)) == "approver"


@pytest.mark.parametrize("who", ["ann", "external"])
def test_the_worker_does_not_count_an_approval_by_whoever_wants_it(who: str) -> None:
    intent = an_intent(requester="ann")
    digest = digest_of(intent)
    assert standing(intent, [a_verdict(Kind.APPROVE, digest, who)]) is Standing.WAITING
    entries = a_stream(
        (EventType.INTENT, {"digest": digest}),
        (EventType.VERDICT, a_verdict(Kind.APPROVE, digest, who).model_dump(mode="json")),
    )
    assert "waiting" in str(may_act(entries, intent, digest, START))


def test_a_veto_counts_though_somebody_else_was_asked() -> None:
    intent = an_intent(GateRule(veto_roles=("legal",)))
    handed = a_verdict(Kind.DELEGATE, digest_of(intent), "ann", to="bob")
    assert refused(judged(intent, Kind.REJECT, "eve", handed)) == "approver"
    assert refused(judged(intent, Kind.APPROVE, "eve", handed, role="legal")) == "approver"
    known = Identity(roles=("reader",))
    assert refused(judged(intent, Kind.REJECT, "eve", handed, role="legal", identity=known)) == "role"
    veto = judged(intent, Kind.REJECT, "eve", handed, role="legal")
    assert isinstance(veto, Verdict)
    assert standing(intent, [handed, veto]) is Standing.REJECTED
    assert refused(judged(intent, Kind.APPROVE, "bob", handed, veto)) == "digest"


def test_a_delegation_ends_and_whoever_had_it_may_not_answer_any_more() -> None:
    intent = an_intent()
    handed = a_verdict(Kind.DELEGATE, digest_of(intent), "ann", to="bob", until=START + HOUR)
    assert isinstance(judged(intent, Kind.APPROVE, "bob", handed, now=START + HOUR), Verdict)
    later = START + HOUR + timedelta(seconds=1)
    assert refused(judged(intent, Kind.APPROVE, "BOB", handed, now=later)) == "approver"
    assert isinstance(judged(intent, Kind.APPROVE, "ann", handed, now=later), Verdict)
    again = a_verdict(Kind.DELEGATE, digest_of(intent), "ann", to="bob")
    assert isinstance(judged(intent, Kind.APPROVE, "bob", handed, again, now=later), Verdict)
    assert (assignee([handed], START), assignee([handed], later)) == ("bob", None)


def test_a_delegation_cannot_end_before_it_begins() -> None:
    assert refused(judged(an_intent(), Kind.DELEGATE, "ann", to="bob", until=START)) == "until"


def test_the_worker_refuses_what_a_delegate_said_after_their_time() -> None:
    intent = an_intent()
    digest = digest_of(intent)
    handed = a_verdict(Kind.DELEGATE, digest, "ann", to="bob", until=START + HOUR)
    said = a_verdict(Kind.APPROVE, digest, "bob")
    bodies = [
        (EventType.INTENT, {"digest": digest}),
        *((EventType.VERDICT, verdict.model_dump(mode="json")) for verdict in (handed, said)),
    ]

    def stream(at: datetime) -> list[Entry]:
        first = a_stream(*bodies[:2])
        return [*first, Entry(version=3, type=bodies[2][0], body=bodies[2][1], recorded_at=at)]

    assert may_act(stream(START + HOUR), intent, digest, START + HOUR) is None
    assert "had ended" in str(may_act(stream(START + 2 * HOUR), intent, digest, START + 2 * HOUR))


def test_a_signed_answer_is_used_once() -> None:
    intent = an_intent(GateRule(approvals=2))
    used = a_verdict(Kind.DELEGATE, digest_of(intent), "ann", to="bob", nonce="a" * 32)
    done = a_verdict(Kind.APPROVE, digest_of(intent), "bob")
    assert refused(judged(intent, Kind.DELEGATE, "ann", used, done, to="bob", nonce="a" * 32)) == "nonce"


@pytest.mark.parametrize(
    ("costs", "passes"),
    [
        ((Cost(amount="10", currency="EUR"),), True),
        ((Cost(amount="4.5", currency="EUR"), Cost(amount="5.5", currency="EUR")), True),
        ((Cost(amount="10.01", currency="EUR"),), False),
        ((Cost(amount="6", currency="EUR"), Cost(amount="6", currency="EUR")), False),
        ((Cost(amount="1", currency="USD"),), False),
        ((Cost(amount="1", currency="EUR"), Cost(amount="1", currency="USD")), False),
        ((Cost(),), False),
        ((Cost(amount="1", currency="EUR"), Cost()), False),
        ((Cost(amount="0.00000000", currency="EUR"),) * 2, True),
        ((Cost(amount="0.00000004", currency="EUR"),) * 3, True),
        ((Cost(amount="999999999999", currency="EUR"),) * 3, False),
    ],
)
def test_automatic_up_to_an_amount_never_takes_an_unknown_cost(costs: tuple[Cost, ...], passes: bool) -> None:
    gate = GateRule(automatic=True, automatic_amount="10", automatic_currency="EUR")
    assert is_automatic(costing(*costs, gate=gate)) is passes


def test_automatic_may_be_narrowed_to_reading_and_never_widened_beyond_undoing() -> None:
    gate = GateRule(automatic=True, automatic_up_to="read_only")
    assert is_automatic(an_intent(gate, (Reversibility.READ_ONLY,)))
    assert not is_automatic(an_intent(gate, (Reversibility.REVERSIBLE,)))
    with pytest.raises(ValidationError):
        GateRule(automatic_up_to="correctable")
    with pytest.raises(ValidationError):
        GateRule(automatic_amount="10")


@pytest.mark.parametrize(
    "changed",
    [
        {"connector": "site"},
        {"operations": ("publish",)},
        {"targets": ("null:x*", "NULL:notes")},
        {"up_to": Reversibility.READ_ONLY},
        {"valid_until": START - HOUR},
    ],
)
def test_a_grant_covers_nothing_beyond_its_words(changed: dict[str, Any]) -> None:
    plans = an_intent().plans
    assert covers(a_grant(), plans, START)
    assert not covers(a_grant(**changed), plans, START)


def test_a_grant_covers_all_of_an_intent_or_none_of_it_and_never_the_irreversible() -> None:
    mixed = an_intent(kinds=(Reversibility.REVERSIBLE, Reversibility.CORRECTABLE)).plans
    assert not covers(a_grant(), mixed, START)
    assert covers(a_grant(up_to="correctable"), mixed, START)
    assert not covers(a_grant(), (), START)
    with pytest.raises(ValidationError):
        a_grant(up_to="irreversible")
    with pytest.raises(ValidationError):
        AgentPolicy(connectors=("null",), grants=(a_grant(), a_grant(max_uses=9)))


def test_a_bound_use_passes_while_it_is_one_that_its_grant_allows() -> None:
    grant = a_grant()
    assert is_automatic(an_intent(use=Use(grant=grant, number=2)))
    assert not is_automatic(an_intent(use=Use(grant=grant, number=3)))
    assert not is_automatic(an_intent(use=Use(grant=grant, number=1), created_at=START + 3 * HOUR))


def test_the_worker_holds_gate_and_grant_against_the_policy_of_now() -> None:
    policy = AgentPolicy(connectors=("null",), grants=(a_grant(),))
    bound = {"use": Use(grant=a_grant(), number=1), "policy_digest": policy_digest(policy)}
    assert is_current(policy, an_intent(**bound), START)
    assert not is_current(policy, an_intent(**bound), START + 3 * HOUR)
    wider = bound | {"use": Use(grant=a_grant(max_uses=9), number=9)}
    assert not is_current(policy, an_intent(**wider), START)
    assert not is_current(policy, an_intent(GateRule(automatic=True), **bound), START)
    assert not is_current(policy, an_intent(**bound | {"policy_digest": "1" * 64}), START)


def test_expiry_goes_by_the_gravest_class() -> None:
    gate = GateRule(expire_by_class={"irreversible": 3600})
    both = (Reversibility.REVERSIBLE, Reversibility.IRREVERSIBLE)
    assert closes_at(an_intent(gate, both), START) == START + HOUR
    assert closes_at(an_intent(gate), START) == START + 7 * DAY


async def test_no_two_intents_take_one_use_and_what_does_not_stand_gives_it_back(tmp_path: Path) -> None:
    url = migrated(f"sqlite:///{tmp_path / 'x.db'}")
    one, other = Database(url), Database(url)
    try:
        grant = a_grant(max_uses=5)
        taken = await asyncio.gather(
            *(
                database.write(lambda link: take_use(link, "default", "external", grant))
                for database in (one, other) * 4
            )
        )
        assert sorted(use.number for use in taken if use) == [1, 2, 3, 4, 5]
        last = next(use for use in taken if use)
        await one.write(lambda link: give_back(link, "default", "external", last))
        again = await other.write(lambda link: take_use(link, "default", "external", grant))
        assert again is not None
        assert again.number == 5
    finally:
        one.close()
        other.close()


def granting(**grant: Any) -> Policy:
    soon = {"valid_until": datetime.now(UTC) + HOUR}
    one = AgentPolicy(
        connectors=("null",), gate=GateRule(remind_seconds=None), grants=(a_grant(**(soon | grant)),)
    )
    return Policy(agents={"external": one})


async def test_a_grant_lets_two_intents_pass_and_asks_a_person_for_the_third(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    async with stack_of(settings_for(temporal, tmp_path, policy=granting())) as stack:
        for number in (1, 2):
            run = await stack.propose(a_key(), note(str(number)))
            assert (await run.handle.result()).status is Status.EXECUTED
            assert "verdict" not in await stack.types(run)
        run = await stack.propose(a_key(), note("three"))
        await stack.approve(run)
        assert (await run.handle.result()).status is Status.EXECUTED
        assert len(stack.notes()) == 3


async def test_a_requester_is_bound_into_the_intent_and_cannot_approve_it(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    async with stack_of(settings_for(temporal, tmp_path)) as stack:
        body = '{"title": "t", "actions": [{"connector": "null", "operation": "note", "title": "n", '
        body += '"arguments": {"text": "x"}}]}'
        request = Request(agent="external", key=a_key(), body=body, requester="ann@example.test")
        run = await submit(stack.client, request, stack.settings.temporal)
        judged = await stack.approve(run)
        assert (judged.counted, judged.field) == (False, "approver")
        assert stack.notes() == []
        assert (await stack.answer(run, Kind.APPROVE, await stack.digest(run), approver="bob")).counted
        assert (await run.handle.result()).status is Status.EXECUTED


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        base[key] = merged(base[key], value) if isinstance(value, dict) and key in base else value
    return base


def test_the_settings_that_the_page_about_the_gate_shows_are_settings_with_a_digest() -> None:
    page = (Path(__file__).parent.parent / "docs" / "gate.md").read_text()
    tree: dict[str, Any] = {}
    for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL):
        merged(tree, tomllib.loads(block))
    tree["channels"][1]["token"] = "0123456789abcdef"
    one = Settings.model_validate(tree).policy.of("pricing")
    assert (one.gate.approvals, one.grants[0].max_uses, one.gate.ladder[0].after) == (2, 20, 2)
    assert policy_digest(one) == policy_digest(AgentPolicy.model_validate(one.model_dump(mode="json")))


STREAMS = st.lists(
    st.tuples(
        st.sampled_from(list(Kind)),
        st.sampled_from(("ann", "BOB", "bob", "eve", "external")),
        st.sampled_from(("bob", "eve")),
        st.one_of(st.none(), st.integers(0, 6)),
    ),
    max_size=5,
)


@given(STREAMS, st.booleans(), st.integers(1, 2), st.one_of(st.none(), st.integers(1, 3)))
def test_the_one_file_verifier_lets_pass_exactly_what_the_worker_does(
    said: list[tuple[Kind, str, str, int | None]], own: bool, approvals: int, use: int | None
) -> None:
    gate = GateRule(self_approval=own, approvals=approvals)
    taken = None if use is None else Use(grant=a_grant(), number=use)
    intent = an_intent(gate, requester="ann", use=taken)
    digest = digest_of(intent)
    entries = list(a_stream((EventType.INTENT, {"digest": digest})))
    verdicts: list[tuple[dict[str, Any], str]] = []
    for hour, (kind, who, to, until) in enumerate(said):
        end = None if until is None else START + until * HOUR
        body = a_verdict(kind, digest, who, to=to if kind is Kind.DELEGATE else None, until=end)
        at = START + hour * HOUR
        plain = body.model_dump(mode="json")
        entries.append(Entry(version=hour + 2, type=EventType.VERDICT, body=plain, recorded_at=at))
        verdicts.append((plain, at.isoformat()))
    plain_intent = intent.model_dump(mode="json")
    theirs = verify_ledger.passed(plain_intent, verdicts) and not verify_ledger.outrun(verdicts)
    assert theirs == (may_act(entries, intent, digest, START + 9 * HOUR) is None)


def test_a_policy_that_asks_for_what_nobody_can_establish_is_refused_with_what_to_write(
    tmp_path: Path,
) -> None:
    toml = '[policy.agents.external]\nconnectors = []\n[policy.agents.external.gate]\nassurance = "{}"\n'
    (tmp_path / "countersign.toml").write_text(toml.format("principal"))
    wanted = r"policy\.agents\.external\.gate\.assurance: 'principal' .*write signed"
    with pytest.raises(InvalidInput, match=wanted):
        config.load({}, tmp_path)
    (tmp_path / "countersign.toml").write_text(toml.format("signed"))
    assert config.load({}, tmp_path).policy.of("external").gate.assurance == "signed"
