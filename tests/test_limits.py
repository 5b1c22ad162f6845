from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.card import change_text, full_card, limits_text
from models.gate import is_automatic
from models.loop import Change, Exemption, GateRule, Intent, Limits, Plan, Reversibility, Status, Use
from models.policy import AgentPolicy, Policy, covers, moves_little
from models.settings import TemporalSettings
from scripts import verify_ledger
from tests.conftest import Stack, a_key, note, settings_for, stack_of
from tests.intents import START, an_intent

HOUR = timedelta(hours=1)
FIVE_PERCENT = Limits(at_most_permille=50)
TWENTY_EUROS = Limits(at_most_minor=2_000, currency="EUR")


def change(old: int, new: int, currency: str | None = "EUR") -> Change:
    return Change(what="price", old=old, new=new, currency=currency)


def planned(*changes: tuple[Change, ...], one_target: bool = False) -> tuple[Plan, ...]:
    made = an_intent(kinds=(Reversibility.REVERSIBLE,) * len(changes)).plans
    targets = ["null:notes" if one_target else f"null:n{n}" for n in range(len(made))]
    return tuple(
        plan.model_copy(update={"changes": some, "target": target})
        for plan, some, target in zip(made, changes, targets, strict=True)
    )


def a_grant(**more: Any) -> Exemption:
    fields: dict[str, Any] = {
        "name": "prices",
        "connector": "null",
        "operations": ("note",),
        "targets": ("null:n*",),
        "max_uses": 20,
        "valid_until": START + 2 * HOUR,
    }
    return Exemption(**(fields | more))


@pytest.mark.parametrize(
    ("old", "new", "within"),
    [
        (1000, 1050, True),
        (1000, 950, True),
        (1000, 1000, True),
        (1000, 1051, False),
        (1000, 949, False),
        (999, 1049, False),
        (0, 0, True),
        (0, 1, False),
        (1, 0, False),
    ],
)
def test_five_percent_is_five_percent_of_what_stood_there_and_not_a_cent_more(
    old: int, new: int, within: bool
) -> None:
    assert moves_little(FIVE_PERCENT, planned((change(old, new),))) is within


@pytest.mark.parametrize(
    ("changes", "within"),
    [
        (((change(0, 2000),),), True),
        (((change(0, 2001),),), False),
        (((change(5000, 3000),),), True),
        (((change(100, 1100), change(100, 1100)),), True),
        (((change(100, 1100),), (change(0, 1001),)), False),
        (((change(0, 1, "USD"),),), False),
        (((change(0, 1, None),),), False),
        (((change(0, 1),), (change(0, 1, "USD"),)), False),
    ],
)
def test_an_amount_is_that_of_all_changes_together_in_one_currency(
    changes: tuple[tuple[Change, ...], ...], within: bool
) -> None:
    assert moves_little(TWENTY_EUROS, planned(*changes)) is within


@pytest.mark.parametrize("limits", [FIVE_PERCENT, TWENTY_EUROS])
def test_where_a_plan_says_nothing_of_numbers_no_limit_covers_it(limits: Limits) -> None:
    assert not moves_little(limits, planned(()))
    assert not moves_little(limits, planned((change(100, 101),), ()))
    assert moves_little(Limits(), planned(()))


def test_small_steps_on_one_target_do_not_add_up_to_a_large_one() -> None:
    twice = ((change(1000, 1050),), (change(1050, 1102),))
    assert moves_little(FIVE_PERCENT, planned(*twice))
    assert not moves_little(FIVE_PERCENT, planned(*twice, one_target=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"at_most_minor": 5},
        {"currency": "EUR"},
        {"at_most_minor": 5, "currency": "euro"},
        {"at_most_permille": -1},
        {"at_most_minor": -1, "currency": "EUR"},
        {"at_most_permille": 1.5},
    ],
)
def test_a_limit_that_says_half_of_it_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Limits(**fields)
    with pytest.raises(ValidationError):
        a_grant(**fields)


def test_policy_may_let_small_changes_pass_alone() -> None:
    rule = GateRule(automatic=True, automatic_within=FIVE_PERCENT)
    assert is_automatic(an_intent(rule, plans=planned((change(1000, 1050),))))
    assert not is_automatic(an_intent(rule, plans=planned((change(1000, 1051),))))
    assert not is_automatic(an_intent(rule))
    assert not is_automatic(an_intent(GateRule(automatic_within=FIVE_PERCENT)))


def test_the_card_shows_what_moves_and_never_rounds_it_down() -> None:
    assert change_text(change(1000, 1050)) == ("`price`: 1000 → 1050 (EUR in its smallest unit; +50, 5.00 %)")
    assert change_text(change(3000, 2849, None)) == "`price`: 3000 → 2849 (plain number; -151, 5.04 %)"
    assert "from nothing" in change_text(change(0, 1))
    both = Limits(at_most_permille=25, at_most_minor=7, currency="EUR")
    assert limits_text(both) == "at most 2.5 % each, at most 7 EUR in its smallest unit altogether"
    plans = planned((change(1000, 1050),))
    granted = an_intent(plans=plans, use=Use(grant=a_grant(at_most_permille=50), number=3))
    card = full_card(granted, {plans[0].diff.digest: "+x"})
    assert "- `price`: 1000 → 1050" in card
    assert "use 3 of 20" in card
    assert "at most 5.0 % each" in card


NUMBERS = st.integers(0, 3_000)
CHANGES = st.builds(
    Change,
    what=st.just("price"),
    old=NUMBERS,
    new=NUMBERS,
    currency=st.sampled_from(("EUR", "EUR", "USD", None)),
)
PLANS = st.lists(
    st.builds(
        lambda some, connector, operation, target, kind: (
            an_intent(kinds=(kind,))
            .plans[0]
            .model_copy(
                update={"connector": connector, "operation": operation, "target": target, "changes": some}
            )
        ),
        some=st.lists(CHANGES, max_size=2).map(tuple),
        connector=st.sampled_from(("null", "null", "site")),
        operation=st.sampled_from(("note", "note", "publish")),
        target=st.sampled_from(("null:n1", "null:n2", "null:n3", "null:other")),
        kind=st.sampled_from(tuple(Reversibility)),
    ),
    max_size=3,
).map(tuple)
MOST = st.one_of(st.none(), st.integers(0, 1_500))


def limited(permille: int | None, minor: int | None) -> dict[str, Any]:
    currency = None if minor is None else "EUR"
    return {"at_most_permille": permille, "at_most_minor": minor, "currency": currency}


@given(PLANS, MOST, MOST, st.sampled_from(tuple(Reversibility)[:3]), st.integers(0, 4))
def test_a_grant_never_covers_anything_beyond_any_of_its_limits(
    plans: tuple[Plan, ...], permille: int | None, minor: int | None, up_to: Reversibility, hours: int
) -> None:
    grant = a_grant(up_to=up_to, **limited(permille, minor))
    if not covers(grant, plans, START + hours * HOUR):
        return
    assert plans
    assert hours <= 2
    classes = list(Reversibility)
    for plan in plans:
        assert (plan.connector, plan.operation) == ("null", "note")
        assert plan.target in ("null:n1", "null:n2", "null:n3")
        assert classes.index(plan.reversibility) <= classes.index(up_to)
        assert plan.changes or (permille is None and minor is None)
    moved = [one for plan in plans for one in plan.changes]
    if permille is not None:
        for one in moved:
            assert one.old == one.new or abs(Fraction(one.new - one.old, one.old)) <= Fraction(permille, 1000)
    if minor is not None:
        assert {one.currency for one in moved} == {"EUR"}
        assert sum(abs(one.new - one.old) for one in moved) <= minor


@given(PLANS, MOST, MOST, st.integers(0, 500))
def test_a_wider_limit_covers_all_that_a_narrower_one_does(
    plans: tuple[Plan, ...], permille: int | None, minor: int | None, more: int
) -> None:
    narrow = Limits(**limited(permille, minor))
    wider = Limits(
        **limited(
            None if permille is None else permille + more,
            None if minor is None else minor + more,
        )
    )
    if moves_little(narrow, plans):
        assert moves_little(wider, plans)
        assert moves_little(Limits(), plans)


def of_rule(plans: tuple[Plan, ...], permille: int | None, minor: int | None, by_grant: bool) -> Intent:
    limits = limited(permille, minor)
    if by_grant:
        return an_intent(plans=plans, use=Use(grant=a_grant(**limits), number=1))
    return an_intent(GateRule(automatic=True, automatic_within=Limits(**limits)), plans=plans)


@given(PLANS.filter(bool), MOST, MOST, st.booleans())
def test_the_one_file_verifier_knows_the_same_limits(
    plans: tuple[Plan, ...], permille: int | None, minor: int | None, by_grant: bool
) -> None:
    intent = of_rule(plans, permille, minor, by_grant)
    assert verify_ledger.alone(intent.model_dump(mode="json")) is is_automatic(intent)


def test_the_one_file_verifier_reads_intents_from_before_there_were_limits() -> None:
    plain = an_intent(GateRule(automatic=True)).model_dump(mode="json")
    del plain["gate"]["automatic_within"]
    for plan in plain["plans"]:
        del plan["changes"]
    assert verify_ledger.alone(plain)


def cheaper(**limits: Any) -> Policy:
    soon = datetime.now(UTC) + HOUR
    grant = a_grant(targets=("null:sku-*",), max_uses=2, valid_until=soon, **limits)
    one = AgentPolicy(connectors=("null",), gate=GateRule(remind_seconds=None), grants=(grant,))
    return Policy(agents={"external": one})


def priced(minor: int, currency: str = "EUR", target: str = "sku-1") -> dict[str, Any]:
    return note(a_key(), target=target, price={"minor": minor, "currency": currency})


async def asks(stack: Stack, *actions: dict[str, Any]) -> bool:
    """Whether a person was asked; the run is ended either way."""
    run = await stack.propose(a_key(), *actions)
    while True:
        status = await run.handle.query("status")
        if status["state"] == "waiting" and status["intent"]:
            await run.handle.signal("reject", {"digest": status["intent"], "approver": "ann"})
            assert (await run.handle.result()).status is Status.REJECTED
            return True
        if status["outcome"]:
            assert status["outcome"] == Status.EXECUTED
            return False


async def test_a_grant_of_at_most_five_percent_asks_a_person_for_everything_else(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    async with stack_of(settings_for(temporal, tmp_path, policy=cheaper(at_most_permille=50))) as stack:
        targets = tmp_path / "notes" / "targets"
        for name in ("sku-1", "sku-2", "other"):
            (targets / name).write_text("1000")
        (targets / "sku-3").write_text("a word")
        assert await asks(stack, priced(1051))
        assert await asks(stack, priced(1050, target="sku-3"))
        assert await asks(stack, priced(1050, target="sku-4"))
        assert await asks(stack, priced(1050, target="other"))
        assert await asks(stack, priced(1050), note(a_key(), target="sku-2"))
        assert await asks(stack, priced(1050), priced(1040))
        # None of these has taken a use.
        assert not await asks(stack, priced(1050), priced(950, target="sku-2"))
        assert not await asks(stack, priced(1010))
        assert await asks(stack, priced(1010))
