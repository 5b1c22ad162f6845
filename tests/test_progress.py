from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from models.gate import Kind, Standing
from models.ledger import Entry, EventType
from models.loop import Receipt
from models.progress import Progress
from tests.intents import START, a_stream, a_verdict, an_intent, ref

ONE, TWO = "1" * 64, "2" * 64


def proposal(*arguments: str) -> tuple[EventType, dict[str, Any]]:
    actions = [{"connector": "null", "operation": "note", "arguments": one} for one in arguments]
    return EventType.PROPOSAL, {
        "proposal": ref(" ".join(arguments)).model_dump(mode="json"),
        "actions": actions,
    }


def intent(digest: str, number: int) -> tuple[EventType, dict[str, Any]]:
    return EventType.INTENT, {"digest": digest, "number": number}


def verdict(kind: Kind, digest: str, **more: Any) -> tuple[EventType, dict[str, Any]]:
    return EventType.VERDICT, a_verdict(kind, digest, **more).model_dump(mode="json")


def drift(digest: str, *kept: int) -> tuple[EventType, dict[str, Any]]:
    receipts = [
        Receipt(action_key=f"{digest}.{n}", action=n, reference="r", version="v").model_dump(mode="json")
        for n in kept
    ]
    return EventType.DRIFT, {"digest": digest, "reason": "moved", "kept": receipts}


def after(*events: tuple[EventType, dict[str, Any]]) -> Progress:
    progress = Progress()
    progress.take(a_stream(*events))
    return progress


def test_a_revision_closes_the_intent_and_keeps_the_feedback() -> None:
    words = ref("shorter, please")
    progress = after(proposal("a"), intent(ONE, 1), verdict(Kind.REVISE, ONE, comment=words))
    assert (progress.digest, progress.last_digest, progress.proposal) == (None, ONE, None)
    assert progress.feedback == [words]
    assert progress.stands(an_intent()) is Standing.REVISED


def test_a_new_intent_starts_without_the_old_one_s_verdicts() -> None:
    progress = after(
        intent(ONE, 1),
        (EventType.DELIVERY, {"at": START.isoformat()}),
        (EventType.REMINDER, {}),
        verdict(Kind.APPROVE, ONE),
        drift(ONE),
        intent(TWO, 2),
    )
    assert (progress.digest, progress.intents) == (TWO, 2)
    assert (progress.verdicts, progress.reminders, progress.delivered_at) == ([], 0, None)


def test_a_verdict_on_an_earlier_digest_is_not_counted() -> None:
    progress = after(intent(ONE, 1), drift(ONE), intent(TWO, 2), verdict(Kind.APPROVE, ONE))
    assert progress.verdicts == []


def test_expiry_outweighs_a_verdict_that_came_after_it() -> None:
    gone = (EventType.GATE, {"standing": "expired", "digest": ONE})
    progress = after(intent(ONE, 1), gone, verdict(Kind.APPROVE, ONE))
    assert progress.stands(an_intent()) is Standing.EXPIRED


def test_what_was_kept_is_skipped_only_where_the_new_proposal_wants_the_same() -> None:
    same = after(proposal("a", "b"), intent(ONE, 1), drift(ONE, 0), proposal("a", "c"))
    other = after(proposal("a", "b"), intent(ONE, 1), drift(ONE, 0), proposal("c", "a"))
    fewer = after(proposal("a", "b"), intent(ONE, 1), drift(ONE, 1), proposal("a"))
    assert (same.skips, other.skips, fewer.skips) == ((0,), (), ())
    assert all(len(progress.kept) == 1 for progress in (same, other, fewer))


def test_a_decision_to_take_back_is_remembered_until_the_next_intent() -> None:
    decided = (EventType.COMPENSATION, {"digest": ONE, "actions": [0, 1], "reason": "failed"})
    progress = after(intent(ONE, 1), decided)
    assert (progress.undoing, progress.undo_reason) == ((0, 1), "failed")
    progress.take(a_stream(drift(ONE), intent(TWO, 2)))
    assert (progress.undoing, progress.undo_reason) == ((), "")


EVENTS = st.lists(
    st.sampled_from(
        [
            proposal("a", "b"),
            proposal("a"),
            intent(ONE, 1),
            intent(TWO, 2),
            verdict(Kind.APPROVE, ONE),
            verdict(Kind.REVISE, TWO, comment=ref("x")),
            verdict(Kind.REJECT, ONE),
            verdict(Kind.DELEGATE, TWO, to="bob"),
            drift(ONE, 0),
            (EventType.GATE, {"standing": "expired", "digest": TWO}),
            (EventType.REFUSAL, {"kind": "approve"}),
            (EventType.REQUEST, {}),
            (EventType.REMINDER, {}),
        ]
    ),
    max_size=12,
)


@given(EVENTS, st.integers(0, 12))
def test_reading_a_stream_in_two_parts_is_reading_it_at_once(
    events: list[tuple[EventType, dict[str, Any]]], at: int
) -> None:
    entries: tuple[Entry, ...] = a_stream(*events)
    whole, parts = Progress(), Progress()
    whole.take(entries)
    parts.take(entries[:at])
    parts.take(entries[at:])
    assert whole == parts
    assert whole.version == len(events)
