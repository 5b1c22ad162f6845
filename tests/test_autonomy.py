from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.autonomy import ActionClass, Record, Suggestion, advice, interval, may_pass, tally
from models.gate import Kind
from models.ledger import Event, EventType, act_stream
from models.loop import Exemption, GateRule, Reversibility, Status
from models.policy import AgentPolicy
from scripts.exits import Exit
from tests.conftest import Stack, a_key, note
from tests.intents import START
from tests.test_cli import command, offline, run

HOUR = timedelta(hours=1)
NOTE = ActionClass(agent="pricing", connector="null", operation="note", reversibility="reversible")
ASKS = AgentPolicy(connectors=("null",))
GRANT = Exemption(
    name="notes",
    connector="null",
    operations=("note",),
    targets=("*",),
    max_uses=5,
    valid_until=START + HOUR,
)
GRANTS = AgentPolicy(connectors=("null",), grants=(GRANT,))


def events(name: str, *told: tuple[EventType, dict[str, Any]], hour: int = 0) -> Iterator[Event]:
    start = (EventType.REQUEST, {"agent": "pricing"})
    for version, (kind, body) in enumerate((start, *told), start=1):
        yield Event(
            event_id=f"{name}-{version}",
            stream=name,
            type=kind,
            actor_kind="agent",
            actor_ref="pricing",
            correlation_id=name,
            body=body,
            log_id="default",
            seq=version,
            version=version,
            recorded_at=START + hour * HOUR,
            leaf_hash="0" * 64,
        )


def put(digest: str = "a", *, of: ActionClass = NOTE) -> list[tuple[EventType, dict[str, Any]]]:
    plan = of.model_dump(mode="json", exclude={"agent"})
    return [(EventType.PLAN, {"plans": [plan]}), (EventType.INTENT, {"digest": digest, "number": 1})]


def says(kind: Kind, digest: str = "a") -> tuple[EventType, dict[str, Any]]:
    return EventType.VERDICT, {"kind": kind.value, "digest": digest}


def gate(standing: str, digest: str = "a") -> tuple[EventType, dict[str, Any]]:
    return EventType.GATE, {"standing": standing, "digest": digest}


def ends(status: Status) -> tuple[EventType, dict[str, Any]]:
    return EventType.OUTCOME, {"status": status.value}


APPROVED = [*put(), says(Kind.APPROVE), ends(Status.EXECUTED)]
DRIFT = (EventType.DRIFT, {"digest": "a", "reason": "changed", "kept": []})


def counted(*told: tuple[EventType, dict[str, Any]]) -> dict[str, int]:
    record = tally(events("r", *told)).get(NOTE, Record())
    names = ("unchanged", "revised", "rejected", "alone", "expired", "undone")
    return {name: count for name in names if (count := getattr(record, name))}


@pytest.mark.parametrize(
    ("told", "counts"),
    [
        (APPROVED, {"unchanged": 1}),
        ([*put(), says(Kind.DELEGATE), says(Kind.APPROVE), ends(Status.EXECUTED)], {"unchanged": 1}),
        ([*put(), says(Kind.APPROVE), says(Kind.REJECT), ends(Status.REJECTED)], {"rejected": 1}),
        ([*put(), says(Kind.REVISE), *APPROVED], {"revised": 1}),
        ([*put(), says(Kind.REVISE), *put("b"), says(Kind.REJECT, "b")], {"revised": 1}),
        ([*put(), gate("passed"), ends(Status.EXECUTED)], {"alone": 1}),
        ([*put(), gate("expired"), ends(Status.EXPIRED)], {"expired": 1}),
        ([*put(), says(Kind.APPROVE, "other"), ends(Status.EXECUTED)], {}),
        ([*put(), says(Kind.APPROVE)], {}),
        ([*put(), says(Kind.APPROVE), ends(Status.CANCELLED)], {}),
        ([*put(), says(Kind.APPROVE), ends(Status.FAILED)], {}),
        ([*put(), ends(Status.CANCELLED)], {}),
        ([*put(), says(Kind.APPROVE), ends(Status.IN_DOUBT)], {"undone": 1}),
        ([*put(), says(Kind.APPROVE), ends(Status.PARTLY_EXECUTED)], {"undone": 1}),
        ([*put(), says(Kind.APPROVE), DRIFT, *put("b"), says(Kind.APPROVE, "b")], {"undone": 1}),
        (
            [
                *put(),
                says(Kind.APPROVE),
                (EventType.COMPENSATION, {"actions": [0]}),
                ends(Status.COMPENSATED),
            ],
            {"undone": 1},
        ),
        ([*put(), gate("passed"), (EventType.COMPENSATION, {"actions": [0]})], {"undone": 1}),
        ([says(Kind.APPROVE), ends(Status.EXECUTED)], {}),
    ],
)
def test_a_run_counts_once_and_only_as_what_became_of_its_first_proposal(
    told: list[tuple[EventType, dict[str, Any]]], counts: dict[str, int]
) -> None:
    assert counted(*told) == counts


def test_each_class_of_an_intent_counts_and_no_other() -> None:
    other = NOTE.model_copy(update={"reversibility": Reversibility.CORRECTABLE})
    plans = [one.model_dump(mode="json", exclude={"agent"}) for one in (NOTE, other, NOTE)]
    told = [(EventType.PLAN, {"plans": plans}), *APPROVED[1:]]
    assert tally(events("r", *told)) == {NOTE: Record(unchanged=1), other: Record(unchanged=1)}


def test_what_was_undone_ends_the_record_at_once() -> None:
    good = [event for name in "abcdef" for event in events(name, *APPROVED)]
    bad = list(events("bad", *put(), says(Kind.APPROVE), DRIFT, hour=1))
    assert tally([*good, *bad]) == {NOTE: Record(undone=1, undone_at=START + HOUR)}
    after = tally([*good, *bad, *events("g", *APPROVED, hour=2)])
    assert after[NOTE] == Record(unchanged=1, undone=1, undone_at=START + HOUR)


def test_runs_that_are_told_in_turn_do_not_mix_and_other_streams_do_not_count() -> None:
    one, other = list(events("one", *APPROVED)), list(events("other", *put(), says(Kind.REJECT)))
    mixed = [event for pair in zip(one, other, strict=False) for event in pair] + one[len(other) :]
    assert tally(mixed) == {NOTE: Record(unchanged=1, rejected=1)}
    acts = [event.model_copy(update={"stream": act_stream("one")}) for event in one]
    assert tally(acts) == {}


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 0, 0, 1),
        (0, 10, 0, 0.3085),
        (10, 10, 0.6915, 1),
        (8, 10, 0.4439, 0.9748),
        (50, 100, 0.3983, 0.6017),
    ],
)
def test_the_interval_is_that_of_clopper_and_pearson(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.5, 0.8, 0.95, 0.99])
def test_the_interval_holds_the_true_share_as_often_as_it_says(share: float) -> None:
    trials, held = 40, 0.0
    for count in range(trials + 1):
        low, high = interval(count, trials)
        if low <= share <= high:
            held += math.comb(trials, count) * share**count * (1 - share) ** (trials - count)
    assert held >= 0.95


@given(st.integers(1, 3000), st.data())
def test_more_of_the_same_never_lowers_and_one_refusal_always_does(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert interval(successes, trials + 1)[0] <= low
    assert interval(successes + 1, trials + 1)[0] >= low


@pytest.mark.parametrize(
    ("record", "policy", "kind", "suggestion"),
    [
        (Record(), ASKS, "reversible", Suggestion.ASK),
        (Record(unchanged=71), ASKS, "reversible", Suggestion.ASK),
        (Record(unchanged=72), ASKS, "reversible", Suggestion.GRANT),
        (Record(unchanged=72), ASKS, "correctable", Suggestion.GRANT),
        (Record(unchanged=72), ASKS, "irreversible", Suggestion.ASK),
        (Record(unchanged=72, rejected=1), ASKS, "reversible", Suggestion.ASK),
        (Record(unchanged=72, revised=1), ASKS, "reversible", Suggestion.ASK),
        (Record(unchanged=72), None, "reversible", Suggestion.GRANT),
        (Record(), GRANTS, "reversible", Suggestion.KEEP),
        (Record(alone=9, undone=1, undone_at=START), GRANTS, "reversible", Suggestion.NARROW),
        (Record(unchanged=72, undone=1, undone_at=START), GRANTS, "reversible", Suggestion.KEEP),
        (Record(unchanged=72), GRANTS, "correctable", Suggestion.GRANT),
    ],
)
def test_a_record_suggests_no_more_than_it_bears(
    record: Record, policy: AgentPolicy | None, kind: str, suggestion: Suggestion
) -> None:
    action = NOTE.model_copy(update={"reversibility": Reversibility(kind)})
    given_ = advice(action, record, policy, START, 950)
    assert given_.suggestion is suggestion, given_
    assert given_.why


def test_what_passes_without_a_person_is_read_from_the_policy_of_now() -> None:
    automatic = AgentPolicy(connectors=("null",), gate=GateRule(automatic=True))
    assert may_pass(automatic, NOTE, START)
    assert not may_pass(automatic, NOTE.model_copy(update={"reversibility": "correctable"}), START)
    assert may_pass(GRANTS, NOTE, START)
    assert not may_pass(GRANTS, NOTE, START + 2 * HOUR)
    assert not may_pass(GRANTS, NOTE.model_copy(update={"operation": "other"}), START)


async def test_the_command_reads_the_ledger_and_changes_nothing(stack: Stack) -> None:
    for kind in (Kind.APPROVE, Kind.APPROVE, Kind.REJECT):
        run_ = await stack.propose(a_key(), note())
        await stack.answer(run_, kind, await stack.digest(run_))
        await run_.handle.result()
    before = await stack.ledger.tail("default", 1)
    shown = await command(stack, "autonomy", "--json")
    assert shown.exit_code == Exit.DONE, shown.stderr
    [one] = json.loads(shown.stdout)
    assert one["action"] == NOTE.model_dump(mode="json") | {"agent": "external"}
    assert (one["record"]["unchanged"], one["record"]["rejected"], one["suggestion"]) == (2, 1, "ask")
    assert (one["lower_permille"], one["upper_permille"]) == (94, 992)
    told = await command(stack, "autonomy")
    assert "null.note: ask, since 2 of 3 approved unchanged bear 9.4 %, 95.0 % are wanted" in told.stdout
    assert await stack.ledger.tail("default", 1) == before


def test_the_command_says_what_is_missing(tmp_path: Any) -> None:
    assert run(offline(tmp_path), "autonomy").exit_code == Exit.NOT_READY
    assert run(offline(tmp_path), "autonomy", "--earned", "1000").exit_code == Exit.REFUSED
