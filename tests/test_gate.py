from __future__ import annotations

from datetime import timedelta
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.canonical import canonical, digest_of
from models.gate import (
    Answer,
    Kind,
    Refusal,
    Standing,
    Verdict,
    assignee,
    closes_at,
    is_automatic,
    judge,
    may_act,
    may_undo,
    read_message,
    standing,
)
from models.ledger import EventType
from models.loop import GateRule, Intent, Reversibility
from tests.intents import DAY, START, a_stream, a_verdict, an_intent, passed

PEOPLE = ("ann", "Ann", "bob", "carl")
ROLES = ("editor", "lawyer")
DIGEST = "a" * 64
MOSTLY_APPROVALS = (*[Kind.APPROVE] * 6, Kind.DELEGATE, Kind.REJECT, Kind.REVISE)


@st.composite
def gates(draw: st.DrawFn) -> GateRule:
    roles = draw(st.sampled_from([(), ("editor",), ROLES]))
    return GateRule(approvals=draw(st.integers(1, 3)), roles=roles)


@st.composite
def verdicts(draw: st.DrawFn, kinds: tuple[Kind, ...] = MOSTLY_APPROVALS) -> list[Verdict]:
    one = st.builds(
        a_verdict,
        st.sampled_from(kinds),
        st.just(DIGEST),
        st.sampled_from(PEOPLE),
        role=st.sampled_from((None, *ROLES)),
        to=st.sampled_from(PEOPLE),
    )
    return draw(st.lists(one, max_size=7))


@given(gates(), verdicts())
def test_a_gate_never_passes_without_enough_distinct_people_in_every_role(
    gate: GateRule, given_: list[Verdict]
) -> None:
    if standing(an_intent(gate), given_) is not Standing.PASSED:
        return
    approvals = [verdict for verdict in given_ if verdict.kind is Kind.APPROVE]
    people = {verdict.approver.casefold() for verdict in approvals}
    assert len(people) >= gate.approvals
    held = [{v.approver.casefold() for v in approvals if v.role == role} for role in gate.roles]
    assert all(held)
    # Some choice of people covers every role with a person of its own.
    assert not gate.roles or any(
        all(person in held[n] for n, person in enumerate(chosen))
        for chosen in permutations(sorted(people), len(gate.roles))
    )


@given(gates(), verdicts(kinds=(Kind.APPROVE,)), st.randoms(use_true_random=False))
def test_the_order_of_approvals_by_different_people_does_not_matter(
    gate: GateRule, given_: list[Verdict], random: Any
) -> None:
    once = list({verdict.approver.casefold(): verdict for verdict in given_}.values())
    mixed = list(once)
    random.shuffle(mixed)
    assert standing(an_intent(gate), once) is standing(an_intent(gate), mixed)


@given(gates(), verdicts(), verdicts(), st.sampled_from([Kind.REJECT, Kind.REVISE]))
def test_nothing_counts_after_a_rejection_or_a_wish_for_revision(
    gate: GateRule, before: list[Verdict], after: list[Verdict], ends: Kind
) -> None:
    intent = an_intent(gate)
    ended = [*before, a_verdict(ends, DIGEST)]
    assert standing(intent, [*ended, *after]) is standing(intent, ended) is not Standing.WAITING
    said = judge(
        Kind.APPROVE,
        Answer(digest=DIGEST, approver="zoe", role="editor"),
        intent,
        DIGEST,
        [*ended, *after],
        START,
        START,
    )
    assert isinstance(said, Refusal)


@given(gates(), verdicts(), st.sampled_from(list(Kind)), st.sampled_from(PEOPLE), st.sampled_from(ROLES))
def test_what_is_judged_to_count_changes_nothing_but_forwards(
    gate: GateRule, before: list[Verdict], kind: Kind, approver: str, role: str
) -> None:
    intent = an_intent(gate)
    answer = Answer(digest=DIGEST, approver=approver, role=role, comment="why", to="bob")
    said = judge(kind, answer, intent, DIGEST, before, START + DAY, START)
    if isinstance(said, Refusal):
        assert said.field and said.remedy
        return
    assert standing(intent, before) is Standing.WAITING
    holder = assignee(before)
    assert holder is None or holder.casefold() == approver.casefold()
    if kind is Kind.APPROVE:
        assert approver.casefold() not in {v.approver.casefold() for v in before if v.kind is Kind.APPROVE}


@given(gates(), verdicts())
def test_whoever_acts_finds_what_whoever_waits_found(gate: GateRule, given_: list[Verdict]) -> None:
    intent = an_intent(gate)
    digest = digest_of(intent)
    bodies = [verdict.model_copy(update={"digest": digest}).model_dump(mode="json") for verdict in given_]
    stream = a_stream(
        (EventType.INTENT, {"digest": digest, "number": 1}), *((EventType.VERDICT, body) for body in bodies)
    )
    refused = may_act(stream, intent, digest, START)
    assert (refused is None) == (standing(intent, given_) is Standing.PASSED)


@given(st.lists(st.sampled_from(list(Reversibility)), min_size=1, max_size=4).map(tuple), st.booleans())
def test_nobody_is_asked_only_where_everything_can_be_taken_back(
    kinds: tuple[Reversibility, ...], automatic: bool
) -> None:
    grave = {Reversibility.IRREVERSIBLE, Reversibility.CORRECTABLE}
    intent = an_intent(GateRule(automatic=automatic), kinds)
    assert is_automatic(intent) == (automatic and not grave.intersection(kinds))
    if not is_automatic(intent):
        assert standing(intent, ()) is Standing.WAITING


def test_an_approved_intent_may_be_acted_on() -> None:
    intent = an_intent()
    assert may_act(passed(intent), intent, digest_of(intent), START) is None


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ((EventType.INTENT, {"digest": "b" * 64, "number": 2}), "later intent"),
        ((EventType.OUTCOME, {"status": "executed"}), "has ended"),
        ((EventType.GATE, {"standing": "expired"}), "expired"),
        ((EventType.DRIFT, {"reason": "r", "kept": []}), "drifted"),
        ((EventType.COMPENSATION, {"actions": [0], "reason": "r"}), "taken back"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].value,
)
def test_an_approved_intent_may_not_be_acted_on_after(
    event: tuple[EventType, dict[str, Any]], says: str
) -> None:
    intent = an_intent()
    digest = digest_of(intent)
    stream = passed(intent, (event[0], {"digest": digest} | event[1]))
    assert says in str(may_act(stream, intent, digest, START))


def test_a_verdict_on_another_digest_lets_nobody_act() -> None:
    intent, other = an_intent(), an_intent(nonce="other")
    logged = (EventType.INTENT, {"digest": digest_of(other), "number": 2})
    stream = (*passed(intent), *a_stream(logged))
    assert may_act(stream, other, digest_of(other), START) == "the gate says waiting"
    assert may_act((), intent, digest_of(intent), START) == "no such intent stands in the ledger"


def test_the_absolute_limit_is_held_by_whoever_acts() -> None:
    intent = an_intent()
    limit = intent.expires_at
    assert may_act(passed(intent, at=limit), intent, digest_of(intent), limit) is None
    late = passed(intent, at=limit + timedelta(microseconds=1))
    assert "absolute limit" in str(may_act(late, intent, digest_of(intent), limit))


def test_nothing_is_done_before_it_is_due() -> None:
    proposal = an_intent().proposal.model_copy(update={"not_before": START + DAY})
    intent = an_intent(proposal=proposal)
    assert "not happen before" in str(may_act(passed(intent), intent, digest_of(intent), START))
    assert may_act(passed(intent), intent, digest_of(intent), START + DAY) is None


def test_only_what_the_run_decided_to_take_back_may_be() -> None:
    intent = an_intent()
    digest = digest_of(intent)
    decided = (EventType.COMPENSATION, {"digest": digest, "actions": [1], "reason": "r"})
    assert may_undo(passed(intent), digest, 0) is not None
    assert may_undo(passed(intent, decided), digest, 0) is not None
    assert may_undo(passed(intent, decided), digest, 1) is None
    assert may_undo(passed(intent, decided), "c" * 64, 1) is not None
    assert may_undo(passed(intent, decided, (EventType.OUTCOME, {})), digest, 1) is not None


def test_an_answer_after_closing_does_not_count() -> None:
    intent = an_intent(GateRule(expire_seconds=3600))
    closing = closes_at(intent, START)
    assert closing == START + timedelta(hours=1)
    assert closes_at(intent, None) == intent.expires_at
    assert closes_at(intent, intent.expires_at) == intent.expires_at
    answer = Answer(digest=DIGEST, approver="ann")
    assert isinstance(judge(Kind.APPROVE, answer, intent, DIGEST, (), closing, closing), Verdict)
    late = judge(Kind.APPROVE, answer, intent, DIGEST, (), closing, closing + timedelta(microseconds=1))
    assert isinstance(late, Refusal)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SURROGATES = st.text(alphabet=st.characters(categories=["Cs", "Ll"]), min_size=1, max_size=3)
ALMOST = st.fixed_dictionaries(
    {},
    optional={
        "digest": st.just(DIGEST) | SURROGATES,
        "approver": st.just("ann") | SURROGATES | st.text(),
        "comment": SURROGATES | st.text(),
        "to": SURROGATES | st.text(),
        "role": SURROGATES | st.sampled_from(ROLES),
        "\ud800": st.none(),
    },
)


@given(st.sampled_from(list(Kind)), st.lists(ANYTHING | ALMOST, max_size=2))
def test_whatever_arrives_becomes_an_answer_or_a_refusal_that_can_be_recorded(
    kind: Kind, payloads: list[Any]
) -> None:
    said = read_message(kind, payloads)
    assert len(canonical(said)) < 20_000
    if isinstance(said, Refusal):
        assert said.field and said.remedy and said.approver
        assert len(canonical(said)) < 700
    else:
        assert kind is not Kind.REVISE or said.comment.strip()
        assert kind is not Kind.DELEGATE or said.to


def test_a_delegation_to_nobody_is_refused() -> None:
    for blank in ("", " ", "\t", "a b"):
        said = read_message(Kind.DELEGATE, [{"digest": DIGEST, "approver": "ann", "to": blank}])
        assert isinstance(said, Refusal) and said.field == "to"


def test_the_intent_is_named_by_its_bytes() -> None:
    one: Intent = an_intent()
    assert digest_of(one) == digest_of(Intent.model_validate_json(canonical(one)))
    assert digest_of(one) != digest_of(one.model_copy(update={"number": 2}))
