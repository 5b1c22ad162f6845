from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.amendments import (
    Amendment,
    Autonomy,
    bounded,
    difference,
    in_force,
    reaches,
    setback,
    stands,
    without,
)
from models.answers import Kind, Verdict
from models.autonomy import ActionClass
from models.canonical import digest_of
from models.gate import Standing, may_act, standing
from models.ledger import Draft, Entry, EventType
from models.loop import (
    Action,
    Assurance,
    BreakGlass,
    Change,
    Cost,
    Exemption,
    GateRule,
    Guarantee,
    Limits,
    Plan,
    Reversibility,
    Status,
    Use,
)
from models.policy import GATE_POLICY, OUTDATED, POLICY_AGENT, AgentPolicy, Policy, covers, passes_alone
from tests.intents import START, a_stream, an_intent, ref

HOUR = timedelta(hours=1)
MANY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CONNECTORS, OPERATIONS = ("null", "site"), ("note", "publish")
FILE = AgentPolicy(connectors=CONNECTORS)
LIMITS = st.builds(
    lambda part, most: Limits(at_most_permille=part, at_most_minor=most, currency="EUR" if most else None),
    st.sampled_from([None, 50, 200]),
    st.sampled_from([None, 100, 1000]),
)
GRANT = st.builds(
    lambda name, connector, operations, targets, up_to, limits: Exemption(
        name=name,
        connector=connector,
        operations=tuple(operations),
        targets=(targets,),
        up_to=up_to,
        max_uses=5,
        valid_until=START + HOUR,
        **limits.model_dump(),
    ),
    st.sampled_from(["one", "two", "three"]),
    st.sampled_from(CONNECTORS),
    st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=2, unique=True),
    st.sampled_from(["*", "*:a"]),
    st.sampled_from([Reversibility.REVERSIBLE, Reversibility.CORRECTABLE]),
    LIMITS,
)
AUTONOMY = st.builds(
    lambda automatic, up_to, amount, within, grants: Autonomy(
        automatic=automatic,
        automatic_up_to=up_to,
        automatic_amount=amount and amount[0],
        automatic_currency=amount and amount[1],
        automatic_within=within,
        grants=tuple(grants),
    ),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([Reversibility.READ_ONLY, Reversibility.REVERSIBLE, Reversibility.REVERSIBLE]),
    st.sampled_from([None, ("50", "EUR"), ("100", "EUR"), ("100", "USD")]),
    st.none() | LIMITS,
    st.lists(GRANT, max_size=2, unique_by=lambda grant: grant.name),
)
PLAN = st.builds(
    lambda connector, operation, target, kind, cost, steps: Plan(
        action=0,
        connector=connector,
        operation=operation,
        target=f"{connector}:{target}",
        target_version="0",
        diff=ref("diff"),
        reversibility=kind,
        guarantee=Guarantee.KEYED,
        undo="",
        cost=cost,
        changes=tuple(Change(what="price", old=1000, new=1000 + step, currency="EUR") for step in steps),
    ),
    st.sampled_from(CONNECTORS),
    st.sampled_from(OPERATIONS),
    st.sampled_from("ab"),
    st.sampled_from(list(Reversibility)[:3]),
    st.sampled_from([Cost(), Cost(amount="20", currency="EUR"), Cost(amount="80", currency="EUR")]),
    st.lists(st.sampled_from([20, 90, 500]), max_size=2),
)
PLANS = st.lists(PLAN, min_size=1, max_size=2)
CLASS = st.builds(
    lambda connector, operation, kind: ActionClass(
        agent="pricing", connector=connector, operation=operation, reversibility=kind
    ),
    st.sampled_from(CONNECTORS),
    st.sampled_from(OPERATIONS),
    st.sampled_from(list(Reversibility)),
)


def passes(policy: AgentPolicy, plans: list[Plan]) -> bool:
    alone = passes_alone(policy.gate, plans)
    return alone or any(covers(grant, plans, START) for grant in policy.grants)


def changed(number: int, **more: Any) -> tuple[EventType, dict[str, Any]]:
    return EventType.POLICY_CHANGED, {"key": f"{number}", "agent": "pricing"} | more


def lost(what: ActionClass) -> tuple[EventType, dict[str, Any]]:
    return EventType.POLICY_NARROWED, {"class": what.model_dump(mode="json")}


class Story:
    """Changes and narrowings in the order of a stream, and what people have agreed to in it."""

    def __init__(self, file: AgentPolicy) -> None:
        self.file = file
        self.agreed: list[Autonomy] = []
        self.told: list[tuple[EventType, dict[str, Any]]] = []

    def go(self, step: tuple[str, Any]) -> None:
        kind, what = step
        if kind == "change":
            self.told.append(changed(len(self.agreed)))
            self.agreed.append(what)
        elif kind == "narrow":
            self.told.append(lost(what))
        elif self.agreed:
            number = what % len(self.agreed)
            undone = {"withdraws": f"{number}", "key": f"{number}.undo"} if kind == "withdraw" else {}
            self.told.append(changed(number, **undone))

    def entries(self) -> tuple[Entry, ...]:
        return a_stream(*self.told)

    def policy(self) -> AgentPolicy:
        told = stands(self.entries())
        if told.change is None:
            return self.file
        agreed = self.agreed[int(told.change.body["key"])]
        return in_force(Amendment(agent="pricing", base="0" * 64, autonomy=agreed), self.file, told.narrowed)


STEP = st.one_of(
    st.tuples(st.just("change"), AUTONOMY),
    st.tuples(st.just("narrow"), CLASS),
    st.tuples(st.sampled_from(["withdraw", "repeat"]), st.integers(0, 5)),
)


@MANY
@given(AUTONOMY, st.lists(STEP, max_size=8), st.lists(PLANS, min_size=4, max_size=8))
def test_nothing_passes_alone_that_neither_the_file_nor_a_change_people_agreed_to_lets_pass(
    file: Autonomy, steps: list[tuple[str, Any]], tried: list[list[Plan]]
) -> None:
    story = Story(file.over(FILE))
    for step in steps:
        story.go(step)
        agreed = [one.over(story.file) for one in story.agreed]
        for plans in tried:
            allowed = any(passes(one, plans) for one in (story.file, *agreed))
            assert allowed or not passes(story.policy(), plans)
            assert passes(story.file, plans) or not passes(bounded(story.policy(), story.file), plans)


@MANY
@given(AUTONOMY, st.lists(STEP, max_size=6), CLASS, st.lists(PLANS, min_size=4, max_size=8))
def test_narrowing_widens_nothing_and_leaves_a_class_only_what_the_file_gives_it(
    file: Autonomy, steps: list[tuple[str, Any]], what: ActionClass, tried: list[list[Plan]]
) -> None:
    story = Story(file.over(FILE))
    for step in steps:
        story.go(step)
    before = story.policy()
    story.go(("narrow", what))
    after = story.policy()
    names = {"connector": what.connector, "operation": what.operation, "reversibility": what.reversibility}
    for plans in tried:
        assert passes(before, plans) or not passes(after, plans)
        of_class = [plan.model_copy(update=names) for plan in plans]
        assert passes(story.file, of_class) or not passes(after, of_class)


@MANY
@given(AUTONOMY, AUTONOMY, st.lists(PLANS, min_size=4, max_size=8))
def test_a_rule_that_reaches_as_far_lets_all_pass_that_the_other_does(
    one: Autonomy, other: Autonomy, tried: list[list[Plan]]
) -> None:
    wider, narrower = one.over(FILE).gate, other.over(FILE).gate
    if reaches(wider, narrower):
        assert all(passes_alone(wider, plans) or not passes_alone(narrower, plans) for plans in tried)
    assert reaches(wider, wider)


def test_an_old_change_that_is_repeated_brings_back_nothing_that_was_narrowed() -> None:
    what = ActionClass(agent="pricing", connector="null", operation="note", reversibility="reversible")
    told = stands(a_stream(changed(0), lost(what), changed(0)))
    assert told.change is not None and told.change.version == 1
    assert told.narrowed == (what,)
    assert stands(a_stream(changed(0), lost(what), changed(1))).narrowed == ()


def test_a_change_that_was_taken_back_leaves_the_one_before_it_with_all_that_was_narrowed_since() -> None:
    what = ActionClass(agent="pricing", connector="null", operation="note", reversibility="reversible")
    told = stands(a_stream(changed(0), changed(1), lost(what), changed(1, key="1.undo", withdraws="1")))
    assert told.change is not None and told.change.body["key"] == "0"
    assert told.narrowed == (what,)
    assert stands(a_stream(changed(0), changed(0, key="0.undo", withdraws="0"))).change is None


GATE = st.builds(
    lambda automatic, approvals, roles, assurance, own, glass: GateRule(
        automatic=automatic,
        approvals=approvals,
        roles=roles,
        assurance=assurance,
        self_approval=own,
        break_glass=BreakGlass(classes=tuple(Reversibility), roles=("editor",), alarm=("inbox",))
        if glass
        else None,
    ),
    st.booleans(),
    st.integers(1, 2),
    st.sampled_from([(), ("owner",), ("owner", "legal")]),
    st.sampled_from([Assurance.CLAIMED, Assurance.SIGNED, Assurance.SIGNED]),
    st.booleans(),
    st.booleans(),
)
VERDICTS = st.lists(
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from([Kind.APPROVE] * 4 + [Kind.REJECT, Kind.DELEGATE]),
            "approver": st.sampled_from(["ann", "cy", "bob", "Bob", POLICY_AGENT]),
            "role": st.sampled_from([None, "owner", "legal", "editor"]),
            "assurance": st.sampled_from([Assurance.CLAIMED, Assurance.SIGNED, Assurance.SIGNED]),
            "break_glass": st.booleans(),
        }
    ),
    max_size=4,
)
WIDE = Exemption(
    name="all",
    connector=GATE_POLICY,
    operations=("amend",),
    targets=("*",),
    max_uses=9,
    valid_until=START + 9 * HOUR,
)


def an_amending(gate: GateRule, **more: Any) -> Any:
    made = an_intent(gate, **({"proposer": POLICY_AGENT, "requester": "bob"} | more))
    action = Action(connector=GATE_POLICY, operation="amend", arguments=ref("a"), title="Change")
    plan = made.plans[0].model_copy(update={"connector": GATE_POLICY, "operation": "amend"})
    proposal = made.proposal.model_copy(update={"agent": POLICY_AGENT, "actions": (action,)})
    return made.model_copy(update={"plans": (plan,), "proposal": proposal})


@MANY
@given(
    GATE, VERDICTS, st.booleans(), st.sampled_from([None, "bob"]), st.sampled_from([POLICY_AGENT, "other"])
)
def test_no_change_of_policy_is_made_without_signed_verdicts_of_the_named_role_by_somebody_else(
    gate: GateRule, given_: list[dict[str, Any]], used: bool, requester: str | None, proposer: str
) -> None:
    use = Use(grant=WIDE, number=1) if used else None
    intent = an_amending(gate, use=use, requester=requester, proposer=proposer)
    digest = digest_of(intent)
    verdicts = [Verdict(digest=digest, to="ann", **one) for one in given_]
    told = [(EventType.VERDICT, one.model_dump(mode="json")) for one in verdicts]
    entries = a_stream((EventType.INTENT, {"digest": digest}), *told)
    if may_act(entries, intent, digest, START) is not None:
        return
    who = {
        one.approver.casefold(): one.role
        for one in verdicts
        if one.kind is Kind.APPROVE and one.assurance is Assurance.SIGNED and not one.break_glass
    }
    others = {name: role for name, role in who.items() if name not in ("bob", POLICY_AGENT)}
    assert requester == "bob" and proposer == POLICY_AGENT
    assert gate.roles and len(others) >= gate.approvals
    given_roles = {one.role for one in verdicts if one.approver.casefold() in others}
    assert given_roles >= set(gate.roles)


def test_a_change_of_policy_waits_for_people_even_under_a_gate_that_asks_nobody() -> None:
    intent = an_amending(GateRule(automatic=True), use=Use(grant=WIDE, number=1))
    assert standing(intent, ()) is Standing.WAITING


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"automatic": True}, "automatic"),
        ({"self_approval": True}, "self_approval"),
        ({"roles": ()}, "name the role"),
        ({"assurance": "claimed"}, 'write "signed"'),
        ({"break_glass": BreakGlass(classes=("reversible",), alarm=("inbox",))}, "break_glass"),
    ],
)
def test_a_rule_for_changes_that_is_too_wide_is_refused_by_its_field(
    change: dict[str, Any], said: str
) -> None:
    gate = GateRule(**({"roles": ("owner",), "assurance": "signed"} | change))
    with pytest.raises(ValidationError, match=said):
        Policy(agents={POLICY_AGENT: AgentPolicy(connectors=(GATE_POLICY,), gate=gate)})


def test_only_the_policy_agent_may_change_policies_and_it_may_nothing_else() -> None:
    gate = GateRule(roles=("owner",), assurance="signed")
    with pytest.raises(ValidationError, match="external may not change policies"):
        Policy(agents={"external": AgentPolicy(connectors=("null", GATE_POLICY))})
    for wrong in (("null",), (GATE_POLICY, "null"), ()):
        with pytest.raises(ValidationError, match="connectors"):
            Policy(agents={POLICY_AGENT: AgentPolicy(connectors=wrong, gate=gate)})
    with pytest.raises(ValidationError, match="no grants"):
        rule = AgentPolicy(connectors=(GATE_POLICY,), gate=gate, grants=(WIDE,))
        Policy(agents={POLICY_AGENT: rule})


def draft(of: EventType, **body: Any) -> Draft:
    return Draft(
        event_id="e",
        stream="r",
        type=of,
        actor_kind="agent",
        actor_ref="pricing",
        correlation_id="r",
        body=body,
    )


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (draft(EventType.DRIFT, reason="the target changed"), "drift"),
        (draft(EventType.DRIFT, reason=OUTDATED), None),
        (draft(EventType.COMPENSATION, actions=[0]), "rollback"),
        *(
            (draft(EventType.OUTCOME, status=one.value), one.value)
            for one in (Status.FAILED, Status.IN_DOUBT)
        ),
        *(
            (draft(EventType.OUTCOME, status=one.value), None)
            for one in (Status.EXECUTED, Status.REJECTED, Status.EXPIRED, Status.CANCELLED)
        ),
        (draft(EventType.VERDICT, kind="reject"), None),
    ],
)
def test_what_went_wrong_narrows_and_what_people_decided_does_not(event: Draft, why: str | None) -> None:
    assert setback(event) == why


def test_the_difference_shows_each_line_that_goes_and_comes_and_no_value_makes_a_line_of_its_own() -> None:
    grant = Exemption(
        name="notes",
        connector="null",
        operations=("note",),
        targets=("x\n+automatic = false",),
        max_uses=2,
        valid_until=START,
    )
    after = Autonomy(automatic=True, grants=(grant,)).over(FILE)
    shown = difference(FILE, after)
    assert "-automatic = false" in shown and "+automatic = true" in shown
    assert '+grants.notes.targets = ["x\\n+automatic = false"]' in shown
    assert all("\n" not in line for line in shown)
    nothing = without(
        after, FILE, ActionClass(agent="x", connector="null", operation="note", reversibility="reversible")
    )
    assert nothing == FILE
