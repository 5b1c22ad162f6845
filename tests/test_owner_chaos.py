"""Many deciders on one subject while processes fall; `python -m scripts.chaos owner` is the whole of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from models.beliefs import Belief, Change, Settled, apply
from models.ledger import Event, EventType
from scripts.chaos.deciders import COUNTER, PRICING, SUBJECT, Plan, event_of
from scripts.chaos.owner import prove
from scripts.chaos.owner_judge import Term, fenced, once, one_at_a_time

NOW = datetime(2026, 5, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def plan(events: int) -> Plan:
    return Plan(
        events=events,
        deciders=16,
        processes=2,
        hand_over_after=60,
        task_timeout=timedelta(seconds=2),
        seed=1,
    )


async def test_sixteen_deciders_lose_nothing_and_one_owner_rules_though_all_kinds_of_process_fall(
    tmp_path: Path,
) -> None:
    summary = await prove(tmp_path, plan(320), kills=3, limit=400)
    assert summary["wrong"] == []
    assert sum(summary["handled"].values()) == 320
    assert summary["handled"][COUNTER] == 32
    assert all(summary["fell"].values())
    assert summary["owners"] > 3 and summary["owners_ended_as"]["continued_as_new"] > 0


def handed_in(seq: int, owner: str, epoch: int) -> Event:
    return Event(
        event_id=f"e{seq}",
        stream="belief/1",
        type=EventType.BELIEF,
        actor_kind="agent",
        actor_ref=PRICING,
        correlation_id="belief/1",
        body={"version": seq, "state": "0" * 64, "owner": owner, "epoch": epoch},
        log_id="default",
        seq=seq,
        version=seq,
        recorded_at=NOW,
        leaf_hash="0" * 64,
    )


def test_the_judge_notices_a_former_owner_that_still_writes_and_an_epoch_with_two_owners() -> None:
    good = [handed_in(1, "run-1", 1), handed_in(2, "run-1", 1), handed_in(3, "run-2", 2)]
    assert list(fenced(good)) == []
    assert "epoch 1 after one of 2" in " ".join(fenced([*good, handed_in(4, "run-1", 1)]))
    assert list(fenced([*good, handed_in(4, "run-3", 2)])) == ["epoch 2 had 2 owners"]


def test_the_judge_notices_two_owners_at_a_time() -> None:
    first = Term("run-1", NOW, NOW + MINUTE, "terminated")
    assert list(one_at_a_time([first, Term("run-2", NOW + MINUTE, None, "running")])) == []
    early = Term("run-2", NOW + MINUTE / 2, None, "running")
    assert len(list(one_at_a_time([first, early]))) == 1
    assert len(list(one_at_a_time([early, Term("run-3", NOW + 2 * MINUTE, None, "running")]))) == 1


def test_the_judge_notices_an_event_that_was_lost_or_handled_twice() -> None:
    small = plan(16)
    names = [event_of(f"d{number:02}", 0) for number in range(16)]
    assert list(once(small, {PRICING: list(versions(names)), COUNTER: []})) == []
    lost = list(once(small, {PRICING: list(versions(names[1:])), COUNTER: []}))
    assert lost == ["pricing: d00-00000 was handled 0 times"]
    twice = list(once(small, {PRICING: list(versions([*names, names[0]])), COUNTER: []}))
    assert twice == ["pricing: d00-00000 was handled 2 times"]
    foreign = list(once(small, {PRICING: list(versions([*names, "x"])), COUNTER: []}))
    assert foreign == ["pricing: x was never sent"]


def versions(events: list[str]) -> Iterator[Settled]:
    belief = Belief(tenant="default", agent=PRICING, subject=SUBJECT)
    for event in events:
        belief = apply(belief, Change(tenant="default", agent=PRICING, subject=SUBJECT, event=event))
        yield Settled(won=True, belief=belief, at=NOW, reason=event)
