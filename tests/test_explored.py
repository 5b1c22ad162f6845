"""Overlapping attempts at one action in every order up to a bound, and in many beyond it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from models.loop import Guarantee
from scripts.chaos.book import Target
from scripts.chaos.explorer import Choices, Clocked, Ran, Script, every, some
from scripts.chaos.overlaps import NOW, Case, Overlaps, bound

KEYED, ASKED, BLIND = Guarantee.KEYED, Guarantee.ASKED, Guarantee.BLIND
EVENTS = ("drift", "revoke", "narrow", "expire")


@pytest.fixture(scope="module")
def loop() -> Iterator[Clocked]:
    made = Clocked(NOW)
    yield made
    made.close()


@pytest.fixture(scope="module")
def applying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlaps]:
    made = asyncio.run(bound(tmp_path_factory.mktemp("applying")))
    yield made
    made.close()


@pytest.fixture(scope="module")
def undoing(tmp_path_factory: pytest.TempPathFactory, loop: Clocked) -> Iterator[Overlaps]:
    made = asyncio.run(bound(tmp_path_factory.mktemp("undoing")))
    loop.run_until_complete(made.take_back())
    yield made
    made.close()


def named(case: Case) -> str:
    return case.name


def all_of(loop: Clocked, world: Overlaps, case: Case, budget: int = 1) -> Ran | None:
    count, wrong = loop.run_until_complete(every(lambda choices: world.run(case, choices), budget))
    assert count > 10
    return wrong


def many_of(loop: Clocked, world: Overlaps, case: Case, count: int = 5) -> Ran | None:
    done, wrong = loop.run_until_complete(some(lambda choices: world.run(case, choices), 8, range(count)))
    assert done == count or wrong is not None
    return wrong


def told(loop: Clocked, world: Overlaps, case: Case, *words: str) -> list[str]:
    """What everybody hears in one schedule, which must go as it is written and right."""
    script = Script(*words)
    happened, wrong = loop.run_until_complete(world.run(case, script))
    assert (wrong, script.words) == ([], []), happened
    return [line.split(" hears ")[1] for line in happened if " hears " in line]


@pytest.mark.parametrize(
    "case",
    [
        Case(KEYED, ("apply", "apply"), ("revoke", "expire")),
        Case(ASKED, ("apply", "settle"), ("drift",)),
        Case(ASKED, ("apply", "apply"), begun="is lost"),
        Case(BLIND, ("apply", "apply")),
        Case(KEYED, ("apply", "apply"), careful=False),
    ],
    ids=named,
)
def test_two_attempts_do_it_once_in_every_order_with_a_surprise(
    loop: Clocked, applying: Overlaps, case: Case
) -> None:
    assert all_of(loop, applying, case) is None


@pytest.mark.parametrize(
    "case", [Case(kind, ("undo", "undo"), undoing=True) for kind in (KEYED, ASKED)], ids=named
)
def test_two_attempts_take_it_back_once_in_every_order_with_a_surprise(
    loop: Clocked, undoing: Overlaps, case: Case
) -> None:
    assert all_of(loop, undoing, case) is None


@pytest.mark.parametrize(
    "case",
    [Case(kind, ("saga", "apply", "settle"), EVENTS, careful=kind is not KEYED) for kind in Guarantee],
    ids=named,
)
def test_a_run_and_two_others_do_it_once_in_many_orders(
    loop: Clocked, applying: Overlaps, case: Case
) -> None:
    assert many_of(loop, applying, case) is None


def test_after_an_attempt_without_an_answer_it_is_done_or_closed_in_every_order_with_two_surprises(
    loop: Clocked, applying: Overlaps
) -> None:
    case = Case(KEYED, ("settle", "apply"), begun="is away")
    assert all_of(loop, applying, case, budget=2) is None


@pytest.mark.parametrize("kind", Guarantee)
def test_what_was_done_is_not_called_refused_when_its_answer_was_lost_and_a_verdict_is_not_believed_now(
    loop: Clocked, applying: Overlaps, kind: Guarantee
) -> None:
    case = Case(kind, ("apply", "apply"), ("revoke",))
    heard = told(loop, applying, case, "apply1.start", "is lost", "apply2.start", "revoke")
    assert heard == ["ConnectorUnavailable", "in_doubt" if kind is BLIND else "applied"]


def test_what_was_not_done_is_refused_and_closed_when_a_verdict_is_not_believed_any_more(
    loop: Clocked, applying: Overlaps
) -> None:
    case = Case(KEYED, ("apply", "apply", "apply"), ("revoke",))
    first = ("apply1.start", "is away", "apply2.start", "revoke")
    assert told(loop, applying, case, *first) == ["ConnectorUnavailable"] * 3
    over = ("past 01:01:00", "past 01:01:05")
    assert told(loop, applying, case, *first, *over) == ["ConnectorUnavailable", "refused", "refused"]


def test_a_target_that_refuses_one_attempt_may_still_do_what_the_one_before_it_asked_for(
    loop: Clocked, applying: Overlaps
) -> None:
    case = Case(KEYED, ("apply", "apply", "settle"))
    heard = told(loop, applying, case, "apply1.start", "comes late", "apply2.start", "refuses")
    assert heard == ["ConnectorUnavailable"] * 3


def test_a_target_that_has_changed_may_change_back_for_the_attempt_before(
    loop: Clocked, applying: Overlaps
) -> None:
    case = Case(KEYED, ("apply", "apply", "settle"), ("drift",))
    refused = ("apply1.start", "comes late", "apply2.start", "drift", "apply2.writes", "apply2.sends")
    assert told(loop, applying, case, *refused, "settle3.start", "drift") == ["ConnectorUnavailable"] * 3


def test_a_target_that_will_not_take_it_back_may_still_do_so_for_the_attempt_before(
    loop: Clocked, undoing: Overlaps
) -> None:
    case = Case(KEYED, ("undo", "undo"), undoing=True)
    heard = told(loop, undoing, case, "undo1.start", "comes late", "undo2.start", "refuses")
    assert heard == ["ConnectorUnavailable"] * 2


def test_who_is_refused_while_another_one_takes_it_back_does_not_call_it_impossible(
    loop: Clocked, undoing: Overlaps
) -> None:
    case = Case(KEYED, ("undo", "undo"), ("drift",), undoing=True)
    refused = ("undo1.start", "undo1.writes", "undo1.reads", "drift", "undo1.sends")
    meanwhile = ("undo2.start", "undo2.writes", "undo1.writes", "drift")
    assert told(loop, undoing, case, *refused, *meanwhile) == ["ConnectorUnavailable", "undone"]


def test_what_cannot_be_taken_back_is_not_tried_again(loop: Clocked, undoing: Overlaps) -> None:
    case = Case(BLIND, ("undo", "undo"), undoing=True)
    heard = told(loop, undoing, case, "undo1.start", "refuses")
    assert heard == ["ConnectorRejected", "absent"]


def test_a_target_that_breaks_its_word_is_found_out(
    loop: Clocked, applying: Overlaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "_lands", twice)
    wrong = many_of(loop, applying, Case(KEYED, ("saga", "apply")), 40)
    assert wrong is not None
    assert "it was done 2 times" in wrong.wrong


def twice(self: Target, sent):
    self.book.append(sent)
    return self._says(sent)


def test_the_same_choices_make_the_same_run(loop: Clocked, applying: Overlaps) -> None:
    case = Case(ASKED, ("saga", "apply"), EVENTS)
    choices = [0, 0, 1, 2, 0, 1, 0, 3, 0, 1, 0, 0, 2]
    one, two = (loop.run_until_complete(applying.run(case, Choices(choices, budget=6))) for _ in range(2))
    assert one == two
    assert len(one[0]) > 5
