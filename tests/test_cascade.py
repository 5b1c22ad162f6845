import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from typer.testing import CliRunner

from activities.services.budget import CALL, RESERVATION
from activities.services.cache import Cache
from activities.services.calibration import Calibrations, judged_of, newest
from activities.services.content import ContentStore, get_blob
from activities.services.database import Database
from activities.services.ledger_store import LedgerStore
from activities.services.probe import Probes
from activities.services.router import Answerer
from activities.services.routes import Measurements, Routes, wish_of
from activities.services.till import Till
from activities.tiers.scripted import Scripted
from models.budget import Budget
from models.calibration import (
    ENOUGH,
    Calibrated,
    Fit,
    Judged,
    Odds,
    Step,
    chance,
    confidence,
    fits_of,
    odds_of,
    pooled,
    share,
    spread,
)
from models.cascade import Rung, Terms, bar_of, is_calibrated, ranks, unsure
from models.content import ContentSettings
from models.errors import TierUnavailable
from models.gate import Kind
from models.inference import Bar, Call, Completion, Grant, Message, Needs, Probed, Prompt, Task, TokenChance
from models.ledger import Draft, EventType, calibration_stream
from models.loop import Request, Status
from models.orders import RouteOrder
from models.routing import Measured, RoutePolicy, RouteRecord, Snapshot, Telemetry, decide, replayed
from models.settings import (
    ScheduleSettings,
    Settings,
    SiteSettings,
    TaskSettings,
    TierSettings,
)
from scripts.bench._simulated import LEVELS, World, said_at_levels
from scripts.bench.tiers import played, wilson
from scripts.cli import app
from scripts.commands.route import explained, show
from scripts.commands.session import Session
from scripts.commands.tiers import show_silent
from temporal.client import submit
from temporal.schedules import Schedules
from tests.conftest import ROLES, a_key, settings_for, stack_of
from tests.databases import migrated
from tests.test_agents_content import BRIEF, copywriter
from workers.compose import Parts
from workers.registry import scheduled

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)

pairs = st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=60)


def mean(answers):
    return Fraction(sum(right for _, right in answers), len(answers))


def answers_of(steps, given):
    """The answers under each step."""
    ends = [*(step.least for step in steps[1:]), 1001]
    return [
        [pair for pair in given if step.least <= pair[0] < end] for step, end in zip(steps, ends, strict=True)
    ]


@settings(max_examples=200, deadline=None)
@given(pairs)
def test_a_fit_only_rises_and_each_of_its_steps_is_the_mean_of_its_answers(given):
    steps = pooled(given)
    for low, high in pairwise(steps):
        assert low.least < high.least
        assert Fraction(low.right, low.count) < Fraction(high.right, high.count)
    for step, mine in zip(steps, answers_of(steps, given), strict=True):
        assert (step.count, Fraction(step.right, step.count)) == (len(mine), mean(mine))


@settings(max_examples=200, deadline=None)
@given(pairs)
def test_fitting_what_was_fitted_changes_nothing(given):
    steps = pooled(given)
    again = [(step.least, place < step.right) for step in steps for place in range(step.count)]
    assert pooled(again) == steps


@settings(max_examples=100, deadline=None)
@given(pairs)
def test_a_fit_is_the_isotonic_regression_of_its_answers(given):
    # The min-max formula: the greatest, over what starts at or below, of the least mean up to what is above.
    places = sorted({said for said, _ in given})
    steps = pooled(given)
    for said in places:
        best = max(
            min(mean([pair for pair in given if low <= pair[0] <= high]) for high in places if high >= said)
            for low in places
            if low <= said
        )
        assert chance(steps, said) == best.numerator * 1000 // best.denominator


@settings(max_examples=100, deadline=None)
@given(pairs, st.integers(1, 20))
def test_every_step_rests_on_enough_answers_and_none_is_lost(given, least):
    steps = pooled(given, least)
    assert all(step.count >= least for step in steps) or len(steps) == 1
    assert sum(step.count for step in steps) == len(given)
    assert sum(step.right for step in steps) == sum(right for _, right in given)


def test_a_confidence_outside_of_what_was_seen_takes_the_nearest_step():
    steps = pooled([(300, False), (300, True), (700, True)])
    assert [chance(steps, said) for said in (0, 300, 699, 700, 1000)] == [500, 500, 500, 1000, 1000]


def token(text, logprob=-0.1, margin=None):
    return TokenChance(token=text, logprob=logprob, margin=margin)


def test_of_json_only_the_values_say_how_sure_a_model_was():
    given = [token('{"', -9), token("price", -9), token('":"', -9), token("12", -0.5), token('"}', -9)]
    assert confidence(given, structured=True) == 607
    assert confidence(given, structured=False) < 10


def test_numbers_and_words_of_json_are_values_and_quoted_quotes_end_nothing():
    given = [
        token('{"a": ', -9),
        token("-1.5e3", -0.5),
        token(', "b": "x\\"', -0.5),
        token('y", "c": true}', -0.5),
    ]
    assert confidence(given, structured=True) == 607


def test_the_lead_over_the_second_likeliest_counts_where_every_token_has_one():
    assert confidence([token("a", margin=0.0), token("b", margin=2.0)], structured=False) == 632
    assert confidence([token("a", margin=2.0), token("b", -0.1)], structured=False) == 905


def test_who_says_nothing_of_confidence_has_none():
    assert confidence([], structured=False) is None
    assert confidence([token("{}")], structured=True) is None


def test_the_error_of_a_calibration_is_how_far_words_and_deeds_lie_apart():
    perfect = [(0, False)] * 10 + [(1000, True)] * 10
    assert spread(perfect).permille == 0
    boasting = [(900, False)] * 5 + [(900, True)] * 5
    assert spread(boasting).permille == 400
    shown = spread(boasting * 4)
    assert shown.low <= shown.permille <= shown.high
    assert shown == spread(boasting * 4)
    assert spread([]) is None


def judged(count, right, said=None, **more):
    rights = [place * 1000 < right * count for place in range(count)]
    return [Judged("draft", "m", said, one, **more) for one in rights]


def test_a_fit_is_trusted_from_enough_answers_on_and_counts_those_nobody_judged_only_as_seen():
    (few,) = fits_of(judged(ENOUGH - 1, 500, 600))
    assert not few.trusted
    assert odds_of([few]) == {}
    unsaid = [Judged("draft", "m", 200, None)] * 30
    (fit,) = fits_of([*judged(50, 100, 200), *judged(50, 900, 800), *unsaid])
    assert fit.trusted
    assert [(step.least, step.count, step.seen, step.permille) for step in fit.steps] == [
        (200, 50, 80, 100),
        (800, 50, 50, 900),
    ]
    assert share(fit.steps) == (80 * 100 + 50 * 900) // 130
    assert fit.held_out.permille < fit.before.permille


def test_without_confidences_there_is_one_step_with_the_share_that_was_right():
    (fit,) = fits_of(judged(80, 750, by_people=True))
    assert [(step.least, step.permille) for step in fit.steps] == [(0, 750)]
    assert (fit.blind, fit.people, fit.before) == (80, 80, None)


def test_what_one_model_makes_of_anothers_doubts_is_a_fit_of_its_own():
    fits = fits_of([*judged(60, 900), *judged(60, 600, 300, after="s")])
    assert [(fit.after, share(fit.steps)) for fit in fits] == [(None, 900), ("s", 600)]
    (odds,) = odds_of(fits).values()
    assert (share(odds.own), share(odds.after["s"])) == (900, 600)


def test_what_the_next_model_makes_of_a_call_goes_by_the_confidence_of_the_one_before_it():
    small = [*judged(400, 200, 200), *judged(400, 900, 800)]
    small = [replace(one, model="s") for one in small]
    large = [*judged(400, 700, 200, after="s"), *judged(400, 950, 800, after="s")]
    fits = fits_of([*small, *large])
    (after,) = [fit for fit in fits if fit.after]
    low, high = after.steps
    assert [(one.least, one.right, one.count, one.seen) for one in after.steps] == [
        (200, 280, 400, 400),
        (800, 380, 400, 400),
    ]
    assert 690 < low.permille < 720 < 940 < high.permille < 960
    assert odds_of(fits)["m"].after["s"] == after.steps


def test_with_few_answers_it_is_the_same_at_every_confidence_and_never_less_where_the_first_is_surer():
    small = [replace(one, model="s") for one in (*judged(100, 200, 200), *judged(100, 900, 800))]
    for rights, steep in (((True, True), False), ((True, False), False), ((False, True), True)):
        large = [
            Judged("draft", "m", said, right, after="s")
            for said, right in zip((200, 800), rights, strict=True)
        ]
        (after,) = [fit for fit in fits_of([*small, *large]) if fit.after]
        low, high = (one.permille for one in after.steps)
        assert (low < high) == steep
        assert high - low < 300


def test_calls_that_began_at_the_next_model_speak_for_its_level_but_no_louder_than_those_passed_on():
    small = [replace(one, model="s") for one in (*judged(100, 200, 200), *judged(100, 900, 800))]
    passed_on = [*judged(50, 800, 200, after="s"), *judged(50, 800, 800, after="s")]

    def level(alone):
        (after,) = [fit for fit in fits_of([*small, *passed_on, *alone]) if fit.after]
        return share(after.steps)

    assert abs(level([]) - 800) < 10
    assert abs(level(judged(100, 900)) - 850) < 10
    assert abs(level(judged(5000, 900)) - 850) < 10
    assert level(judged(20, 900)) < level(judged(60, 900)) < level(judged(100, 900))


def test_a_step_without_an_expected_share_is_written_and_named_as_it_always_was():
    (own,) = steps(700)
    assert own.model_dump(exclude_defaults=True) == {"least": 100, "right": 70, "count": 100, "seen": 100}
    assert Step.model_validate({"least": 0, "right": 1, "count": 4, "seen": 9}).permille == 250
    assert own.model_copy(update={"expected": 640}).permille == 640


def steps(*shares):
    """Steps of a hundred answers at confidences 100, 200 and so on."""
    return tuple(
        Step(least=100 * place, right=one // 10, count=100, seen=100) for place, one in enumerate(shares, 1)
    )


def rung(name, micros, *shares, **more):
    odds = Odds(own=steps(*shares)) if shares else None
    return Rung(name, Decimal(micros), f"{name}-1", odds, **more)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 1000))
def test_starting_low_pays_if_escalation_is_rarer_than_what_it_saves(low, high, unusable):
    made = ranks([rung("small", low, unusable=unusable), rung("large", high)], Terms())
    pays = Fraction(unusable, 1000) < 1 - Fraction(low, high)
    assert (made["small"] < made["large"]) == pays


shares = st.lists(st.integers(0, 100), min_size=1, max_size=6, unique=True).map(
    lambda found: [10 * one for one in sorted(found)]
)


@settings(max_examples=200, deadline=None)
@given(
    shares, shares, st.integers(1, 50), st.integers(1, 500), st.integers(0, 3000), st.sampled_from([0, 100])
)
def test_no_other_bar_would_be_cheaper_and_the_cheaper_beginning_comes_first(
    small, large, low, high, wrong, unusable
):
    first, second = rung("small", low, *small, unusable=unusable), rung("large", high, *large)
    better = share(second.own)
    alone = Fraction(high) + Fraction(wrong * (1000 - better), 1000)

    def cost(cut):
        per_step = [
            alone if place < cut else Fraction(wrong * (1000 - one), 1000) for place, one in enumerate(small)
        ]
        kept = sum(per_step) / len(small)
        return low + Fraction(unusable, 1000) * alone + (1 - Fraction(unusable, 1000)) * kept

    bar = bar_of(first, second, Terms(wrong=wrong))
    cut = 0 if bar is None else [step.least for step in first.own].index(bar.confidence)
    assert cost(cut) == min(cost(other) for other in range(len(small)))
    made = ranks([first, second], Terms(wrong=wrong))
    assert (made["small"][1] <= made["large"][1]) == (cost(cut) <= alone) or abs(cost(cut) - alone) < 1e-9


def test_what_the_next_tier_makes_of_doubtful_calls_decides_and_not_what_it_makes_of_all():
    small = rung("small", 1, 200, 900)
    good = Rung("large", Decimal(10), "large-1", Odds(own=steps(950)))
    assert bar_of(small, good, Terms(wrong=100)) == Bar(tier="small", model="small-1", confidence=200)
    stuck = Rung("large", Decimal(10), "large-1", Odds(own=steps(950), after={"small-1": steps(250, 990)}))
    assert bar_of(small, stuck, Terms(wrong=100)) is None


def test_a_tier_that_gives_no_confidence_is_weighed_as_a_whole_and_has_no_bar():
    odds = Odds(own=steps(970), after={"small-1": steps(900, 990)})
    large = Rung("large", Decimal(10), "large-1", odds)
    for silent, bar in ((False, Bar(tier="small", model="small-1", confidence=200)), (True, None)):
        small = rung("small", 1, 200, 900, silent=silent)
        assert bar_of(small, large, Terms(wrong=100)) == bar
    made = ranks([small, large], Terms(wrong=100))
    # 55 of 100 are right, and nobody knows which; with the large one it is 94.5.
    assert made["small"][1] == Decimal(1 + 45)
    assert made["large"][1] == Decimal("15.5")
    assert bar_of(small, large, Terms(both=True)) is None


def test_nothing_is_doubted_without_the_price_of_an_error_without_figures_or_without_time():
    small = rung("small", 1, 200, 900, milliseconds=300)
    large = rung("large", 10, 950, milliseconds=800)
    assert bar_of(small, large, Terms(wrong=100, within=1100)) is not None
    assert bar_of(small, large, Terms(wrong=100, within=1099)) is None
    assert bar_of(small, large, Terms()) is None
    assert bar_of(small, rung("large", 10), Terms(wrong=100)) is None
    assert not is_calibrated([small], Terms(wrong=100))


def test_who_would_have_no_time_for_the_next_tier_begins_there():
    small = rung("small", 1, 200, 900, milliseconds=300)
    large = rung("large", 10, 950, milliseconds=800)
    for within, first in ((1100, "small"), (1099, "large")):
        made = ranks([small, large], Terms(wrong=100, within=within))
        assert min(made, key=lambda name: made[name]) == first


def test_only_the_model_and_tier_a_bar_is_for_can_be_below_it():
    bar = Bar(tier="small", model="m", confidence=500)
    assert unsure(bar, "small", "m", 499)
    assert not any(
        [
            unsure(bar, "small", "m", 500),
            unsure(bar, "small", "m", None),
            unsure(bar, "small", "another", 1),
            unsure(bar, "large", "m", 1),
            unsure(None, "small", "m", 1),
        ]
    )


def tier(name, price):
    return TierSettings(
        name=name,
        kind="llama_cpp",
        url="http://127.0.0.1:1",
        price_per_million_input=Decimal(price),
        price_per_million_output=Decimal(price),
        currency="EUR",
    )


SMALL, LARGE = TIERS = tier("small", 1), tier("large", 10)
FITS = (
    Fit(task="draft", model="s-1", steps=steps(100, 950), count=200),
    Fit(task="draft", model="l-1", steps=steps(970), count=100),
)
WRONG = TaskSettings(wrong_costs=Decimal("0.01"))


AT_THE_DESK = TaskSettings(wrong_costs=Decimal("0.0005"))
"""Where calls have fifteen tokens."""


def known(model):
    return Telemetry(model=model, odds=odds_of(FITS)[model])


def wish(prefer="small", draw=1000, wanted=WRONG, **needs):
    return wish_of("draft", prefer, Needs(context_tokens=300, answer_tokens=50, **needs), wanted, draw)


CALIBRATED = Snapshot(tiers={"small": known("s-1"), "large": known("l-1")})


def test_a_calibration_sets_the_bar_and_gives_way_to_no_preference():
    for prefer in ("small", "large"):
        route = decide(wish(prefer), TIERS, CALIBRATED).route
        assert (route.tiers, route.bar) == (
            ("small", "large"),
            Bar(tier="small", model="s-1", confidence=200),
        )
    assert decide(wish("large", wanted=TaskSettings()), TIERS, CALIBRATED).route.tiers == ("large", "small")


def test_without_a_calibration_everything_is_as_it_was_before_there_were_any():
    snapshot = Snapshot(tiers={"small": Telemetry(model="s-1"), "large": Telemetry(model="l-1")})
    for prefer in ("small", "large"):
        before = decide(wish(prefer, wanted=TaskSettings()), TIERS, snapshot)
        assert decide(wish(prefer), TIERS, snapshot) == before
        assert before.route.bar is None


def test_an_answer_is_not_passed_on_to_a_tier_that_is_suspended():
    tiers = CALIBRATED.tiers | {"large": known("l-1").model_copy(update={"suspended": True})}
    route = decide(wish(), TIERS, Snapshot(tiers=tiers)).route
    assert (route.tiers, route.bar) == (("small", "large"), None)


def test_calls_that_are_there_to_learn_from_ask_both_tiers_or_only_the_small_one():
    wanted = WRONG.model_copy(update={"learn_permille": 100})
    both = decide(wish(draw=1, wanted=wanted), TIERS, CALIBRATED).route
    assert both.bar == Bar(tier="small", model="s-1", confidence=1001)
    assert decide(wish(draw=2, wanted=wanted), TIERS, CALIBRATED).route.bar is None
    assert decide(wish(draw=100, wanted=wanted), TIERS, CALIBRATED).route.bar.confidence == 200


@settings(max_examples=100, deadline=None)
@given(shares, shares, st.sampled_from(["small", "large"]), st.integers(0, 200), st.sampled_from([None, 500]))
def test_a_route_by_a_calibration_is_made_again_from_its_record(small, large, prefer, draw, within):
    odds = {"small": Odds(own=steps(*small)), "large": Odds(own=steps(*large), after={"s-1": steps(*small)})}
    measured = Measured(calls=50, slow_milliseconds=300)
    snapshot = Snapshot(
        tiers={
            name: Telemetry(model=f"{name[0]}-1", odds=one, measured=measured) for name, one in odds.items()
        }
    )
    made = wish(prefer, draw, WRONG.model_copy(update={"learn_permille": 100}), within_milliseconds=within)
    decision = decide(made, TIERS, snapshot)
    record = RouteRecord(
        route=decision.route,
        needs=made.needs,
        prefer=made.prefer,
        wrong=made.wrong,
        both=made.both,
        snapshot=snapshot,
        snapshot_digest=snapshot.digest(),
    )
    read = RouteRecord.model_validate(json.loads(record.model_dump_json(exclude_defaults=True)))
    policy = RoutePolicy.model_validate(json.loads(json.dumps(RoutePolicy.of(TIERS).stored())))
    assert replayed(read, policy).route == decision.route
    assert read.snapshot.digest() == read.snapshot_digest


def answer(model="s-1", said=300, route="r", doubted=False, problems=0):
    body = {"route": route, "task": "draft", "tier": model[0], "model": model, "confidence": said}
    return EventType.ANSWER, body | {"unsure": doubted, "problems": problems}


APPROVED = EventType.VERDICT, {"kind": Kind.APPROVE}
REVISED = EventType.VERDICT, {"kind": Kind.REVISE}
EXECUTED = EventType.OUTCOME, {"status": Status.EXECUTED}
EXPIRED = EventType.OUTCOME, {"status": Status.EXPIRED}


def told(*events, run="run"):
    found = judged_of((kind, run, body) for kind, body in events)
    return [(one.model, one.confidence, one.right, one.by_people, one.after) for one in found]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([answer(), APPROVED, EXECUTED], [("s-1", 300, True, True, None)]),
        (
            [answer(), REVISED, answer(said=400), APPROVED, EXECUTED],
            [("s-1", 300, False, True, None), ("s-1", 400, True, True, None)],
        ),
        ([answer(problems=1), APPROVED, EXECUTED], [("s-1", 300, True, True, None)]),
        ([answer(), EXECUTED], [("s-1", 300, True, False, None)]),
        ([answer(), EXPIRED], [("s-1", 300, None, False, None)]),
        ([answer(problems=1), EXPIRED], [("s-1", 300, False, False, None)]),
        ([answer()], [("s-1", 300, None, False, None)]),
        (
            [answer(doubted=True), answer("l-1", None), APPROVED, EXECUTED],
            [("s-1", 300, None, False, None), ("l-1", 300, True, True, "s-1")],
        ),
    ],
    ids=["approved", "revised", "objected", "code", "expired", "cut", "waits", "passed on"],
)
def test_what_people_and_code_said_is_held_against_the_answers_before_it(events, expected):
    assert told(*events) == expected


def test_runs_are_judged_apart_and_only_the_newest_answers_count():
    events = [
        ("a", *answer(said=1)),
        ("b", *answer(said=2)),
        ("a", *APPROVED),
        ("b", *REVISED),
        ("a", *EXECUTED),
    ]
    found = list(judged_of((kind, run, body) for run, kind, body in events))
    assert {(one.confidence, one.right) for one in found} == {(1, True), (2, False)}
    many = [Judged("draft", "m", said % 1000, True) for said in range(10_050)]
    assert newest(many) == many[50:]


def a_task(name="draft"):
    def build(inputs, params):
        return Prompt(messages=(Message(role="user", content=f"x{params.get('n', '')}"),), max_tokens=50)

    return Task(name, "small", False, build, lambda *_: (), cache_seconds=60)


def saying(model, margin):
    return Completion(
        text=f"{model} says",
        finish="stop",
        prompt_tokens=10,
        completion_tokens=5,
        model=model,
        milliseconds=7,
        chances=(token('"x"', margin=margin),),
    )


SURE, UNSURE = 2.0, 0.1
"""Margins that stand for a confidence of 865 and of 95."""


class Desk:
    """Router, tiers and till on one database, as the workers have them."""

    def __init__(self, database, small, wanted=AT_THE_DESK):
        self.database, tasks = database, {"draft": a_task()}
        content, ledger = ContentStore(database), LedgerStore(database, self.now)
        self.ledger, self.calibrations = ledger, Calibrations(database, self.now)
        cache = Cache(database, self.now)
        self.probes = Probes(Measurements(database, TIERS, self.now))
        self.small = Scripted("small", small)
        self.large = Scripted("large", lambda _: saying("l-1", None))
        self.routes = Routes(
            TIERS,
            tasks,
            content,
            ledger,
            database=database,
            clock=self.now,
            wanted={"draft": wanted},
            budgets=[Budget(amount="1", currency="EUR")],
            sensing=self.probes,
            cache=cache,
            calibrated=self.calibrations,
        )
        endpoints = {"small": self.small, "large": self.large}
        till = Till(database, self.now)
        self.answerer = Answerer(TIERS, endpoints, tasks, content, till=till, cache=cache, clock=self.now)

    def now(self):
        return NOON

    async def ask(self, run):
        """As the loop does it; the answers that came."""
        call = Call(task="draft", params={"n": run})
        order = RouteOrder(tenant="acme", workflow_id=run, event_id=f"r{run}", agent="content", call=call)
        routed = await self.routes.route(order)
        answers = []
        for name in routed.route.tiers:
            answers.append(await self.answerer.answer("acme", call, name, routed.grant))
            if not answers[-1].unsure:
                break
        return routed, answers

    async def told(self, run, kind, body):
        stream = {"stream": run, "correlation_id": run, "actor_kind": "person", "actor_ref": "ann"}
        draft = Draft(event_id=f"{kind}{run}", type=kind, body=body, **stream)
        await self.ledger.add("acme", draft)

    async def keep(self, fits):
        await calibrated(self.ledger, "acme", "draft", fits)

    async def measured(self):
        await measured(self.database, "draft", small="s-1", large="l-1")


async def calibrated(ledger, tenant, task, fits):
    stream = calibration_stream(task)
    draft = Draft(
        event_id=f"fits of {task}",
        stream=stream,
        type=EventType.CALIBRATION,
        actor_kind="system",
        actor_ref="router",
        correlation_id=stream,
        body={"task": task, "fits": [fit.model_dump(mode="json") for fit in fits]},
    )
    await ledger.add(tenant, draft)


async def measured(database, task, **models):
    """Calls on record, so that it is known which model answers where."""
    numbers = {"milliseconds": 5, "prompt_tokens": 10, "completion_tokens": 5, "called_at": 1, "usable": True}
    rows = [
        {"id": f"{task}/{tier}", "tier": tier, "task": task, "model": model, "tenant": "acme", **numbers}
        for tier, model in models.items()
    ]
    await database.write(lambda link: link.execute(CALL.insert(), rows))


async def test_an_answer_that_is_not_sure_enough_goes_on_paid_from_the_same_money_and_is_not_cached(database):
    desk = Desk(database, [saying("s-1", SURE), saying("s-1", UNSURE)])
    await desk.measured()
    await desk.keep(FITS)
    routed, sure = await desk.ask("1")
    assert routed.route.bar == Bar(tier="small", model="s-1", confidence=200)
    assert [(one.tier, one.confidence, one.unsure) for one in sure] == [("small", 865, False)]
    _, both = await desk.ask("2")
    assert [(one.tier, one.confidence, one.unsure) for one in both] == [
        ("small", 95, True),
        ("large", 905, False),
    ]
    assert all(prompt.logprobs for prompt in (*desk.small.prompts, *desk.large.prompts))

    def money(link):
        return link.execute(select(RESERVATION.c.id, RESERVATION.c.state, RESERVATION.c.spent)).all()

    rows = {row.id: (row.state, row.spent) for row in await database.read(money)}
    assert rows == {"r1": ("settled", 15), "r2": ("settled", 15 + 150)}
    # The doubted answer was kept for nobody: an identical call asks again.
    call = Call(task="draft", params={"n": "2"})
    again = await desk.answerer.answer("acme", call, "large")
    assert again.cached
    with pytest.raises(TierUnavailable, match="used up"):
        await desk.answerer.answer("acme", call, "small")


async def test_a_tier_that_gives_no_confidence_is_never_doubted(database):
    silent = saying("s-1", SURE).model_copy(update={"chances": ()})
    desk = Desk(database, [silent])
    await desk.measured()
    await desk.keep(FITS)
    _, answers = await desk.ask("1")
    assert [(one.tier, one.confidence) for one in answers] == [("small", None)]


async def test_a_tier_whose_probe_found_no_logprobs_is_not_asked_for_any_and_explain_says_so(
    database, capsys
):
    desk = Desk(database, [saying("s-1", UNSURE)])
    await desk.measured()
    await desk.keep(FITS)
    desk.probes.found(Probed(tier="small", reachable=True, logprobs=False))
    desk.probes.found(Probed(tier="large", reachable=True, logprobs=True))
    routed, answers = await desk.ask("1")
    assert (routed.grant.silent, routed.route.bar) == (("small",), None)
    assert [one.tier for one in answers] == [routed.route.tiers[0]]
    call = Call(task="draft", params={"n": "2"})
    for name, server, asked in (("small", desk.small, False), ("large", desk.large, True)):
        await desk.answerer.answer("acme", call, name, Grant(weigh=routed.grant.weigh, silent=("small",)))
        assert server.prompts[-1].logprobs is asked
    (found,) = await explained(Session(Settings(tenant="acme"), database), "1")
    show(found)
    printed = capsys.readouterr().out
    assert "small: its server gives no logprobs; none of its answers is doubted" in printed
    assert "large: its server" not in printed
    assert "replay: the same decision" in printed


def test_the_table_of_tiers_names_those_without_logprobs_where_a_task_needs_them(capsys):
    found = [Probed(tier=name, reachable=True, logprobs=says) for name, says in (("a", False), ("b", None))]
    show_silent(found, ["draft", "a title"])
    assert capsys.readouterr().out == "a: no logprobs; none of its answers is doubted (a title, draft)\n"
    show_silent(found, [])
    assert capsys.readouterr().out == ""


async def test_a_task_without_the_price_of_an_error_is_neither_asked_for_confidence_nor_recorded(database):
    desk = Desk(database, [saying("s-1", UNSURE)], TaskSettings())
    await desk.measured()
    await desk.keep(FITS)
    routed, _ = await desk.ask("1")
    assert (routed.grant.weigh, routed.grant.bar) == (None, None)
    assert not desk.small.prompts[0].logprobs
    events = await desk.ledger.of_run("acme", "1")
    assert [event.type for event in events] == [EventType.ROUTE]


async def test_verdicts_become_a_calibration_on_record_that_the_next_route_goes_by_and_replays(database):
    lines = [saying("s-1", UNSURE if place % 2 else SURE) for place in range(120)]
    desk = Desk(database, lines)
    for place in range(120):
        run = str(place)
        await desk.ask(run)
        kind = Kind.REJECT if place % 2 else Kind.APPROVE
        await desk.told(run, EventType.VERDICT, {"kind": kind})
        await desk.told(run, EventType.OUTCOME, {"status": Status.EXECUTED})
    (fit,) = await desk.calibrations.refit("acme")
    assert (fit.model, fit.count, fit.people) == ("s-1", 120, 120)
    assert [(step.least, step.permille) for step in fit.steps] == [(95, 0), (865, 1000)]
    assert (fit.before.permille > 100, fit.held_out.permille) == (True, 0)
    stream = calibration_stream("draft")
    assert len(await desk.ledger.of_run("acme", stream)) == 1
    await desk.calibrations.refit("acme")
    assert len(await desk.ledger.of_run("acme", stream)) == 1
    odds = await Calibrations(database, desk.now).odds("acme", "draft")
    assert odds == odds_of([fit])
    assert await Calibrations(database, desk.now).odds("another", "draft") == {}

    routed, _ = await Desk(database, [saying("s-1", SURE)]).ask("last")
    (event,) = [one for one in await desk.ledger.of_run("acme", "last") if one.type is EventType.ROUTE]
    record = RouteRecord.model_validate(event.body)
    assert record.snapshot.of("small").odds == odds["s-1"]
    stored = await database.read(lambda link: get_blob(link, "acme", record.policy))
    policy = RoutePolicy.model_validate(json.loads(stored))
    assert replayed(record, policy) == record.decision()
    assert record.route == routed.route


def test_the_command_fits_and_says_what_a_confidence_is_worth(tmp_path):
    folder = tmp_path / "var"
    folder.mkdir()
    url = migrated(f"sqlite:///{folder / 'countersign.db'}")
    env = {"COUNTERSIGN_DATA": str(folder), "COUNTERSIGN_TENANT": "acme"}
    nothing = CliRunner().invoke(app, ["tiers", "calibrate"], env=env)
    assert (nothing.exit_code, "set wrong_costs" in nothing.output) == (0, True)
    database = Database(url)

    async def fill():
        desk = Desk(database, [saying("s-1", SURE)] * 60)
        for place in range(60):
            await desk.ask(str(place))
            await desk.told(str(place), EventType.VERDICT, {"kind": Kind.APPROVE})
            await desk.told(str(place), EventType.OUTCOME, {"status": Status.EXECUTED})

    asyncio.run(fill())
    database.close()
    shown = CliRunner().invoke(app, ["tiers", "calibrate"], env=env)
    assert shown.exit_code == 0, shown.output
    assert "s-1" in shown.output
    assert "100.0 %" in shown.output
    (fit,) = json.loads(CliRunner().invoke(app, ["tiers", "calibrate", "--json"], env=env).output)
    assert (fit["task"], fit["count"], fit["people"], fit["trusted"]) == ("draft", 60, 60, True)


async def test_a_schedule_calibrates_and_the_error_is_on_record(temporal, tmp_path):
    settings = settings_for(temporal, tmp_path, tenant=f"t{a_key()}")
    async with stack_of(settings) as stack:
        tenant = settings.tenant
        for place in range(60):
            run, right = str(place), place % 3 > 0
            kind, body = answer(said=700, route=f"r{run}")
            verdict = {"kind": Kind.APPROVE if right else Kind.REJECT}
            events = ((kind, body), (EventType.VERDICT, verdict), (EventType.OUTCOME, {"status": "executed"}))
            for number, (of, said) in enumerate(events):
                who = {"actor_kind": "system", "actor_ref": "router"}
                draft = Draft(
                    event_id=f"{run}/{number}", stream=run, correlation_id=run, type=of, body=said, **who
                )
                await stack.ledger.add(tenant, draft)
        schedules = Schedules(stack.client, tenant, settings.temporal)
        hourly = ScheduleSettings(
            name="calibrate", agent="upkeep", cron="0 * * * *", body={"calibrate": True}
        )
        await schedules.apply((hourly,), scheduled())
        handle = schedules.handle("calibrate")
        await handle.trigger()
        async with asyncio.timeout(120):
            while not (runs := (await handle.describe()).info.recent_actions):
                await asyncio.sleep(0.02)
            started = stack.client.get_workflow_handle(
                runs[0].action.workflow_id, run_id=runs[0].action.first_execution_run_id
            )
            (said,) = Calibrated.model_validate(await started.result()).fits
        await schedules.apply((), scheduled())
        (event,) = await stack.ledger.of_run(tenant, calibration_stream("draft"))
    assert (said.task, said.model, said.count, said.trusted) == ("draft", "s-1", 60, True)
    (fit,) = [Fit.model_validate(one) for one in event.body["fits"]]
    assert (fit.before, fit.held_out) == (said.before, said.held_out)
    assert fit.before.permille == 33


async def test_a_run_asks_on_where_an_answer_is_doubted_and_keeps_it_where_nobody_else_answers(
    temporal, tmp_path
):
    tasks = ("content.outline", "content.section", "content.metadata")
    where = SiteSettings(
        name="site",
        repository=Path("site.git"),
        build=Path("site"),
        address="http://127.0.0.1:9",
        engine="plain",
    )
    settings = settings_for(
        temporal,
        tmp_path,
        tiers=TIERS,
        probe=False,
        sites=(where,),
        content=ContentSettings(min_words=10),
        tasks={name: AT_THE_DESK for name in tasks},
    )

    def by(model, prompt):
        if model == "l-1" and prompt.answer_schema is not None:
            return TierUnavailable("large: not for this")
        return saying(model, UNSURE).model_copy(update={"text": copywriter(prompt)})

    endpoints = {
        "small": Scripted("small", lambda prompt: by("s-1", prompt)),
        "large": Scripted("large", lambda prompt: by("l-1", prompt)),
    }
    async with stack_of(settings, Parts(endpoints=endpoints), ROLES) as stack:
        for name in tasks:
            await measured(stack.database, name, small="s-1", large="l-1")
            fits = [fit.model_copy(update={"task": name}) for fit in FITS]
            await calibrated(stack.ledger, "default", name, fits)
        body = await stack.content.put("default", BRIEF.encode(), "text/markdown; charset=utf-8")
        request = Request(agent="content", key=a_key(), body=body)
        run = await submit(stack.client, request, settings.temporal)
        async with asyncio.timeout(120):
            digest = await stack.digest(run)
        events = await stack.events(run)
        falls = [event.body for event in events if event.type is EventType.FALLBACK]
        unsure_ones = [fall for fall in falls if fall["reason"] == "not sure enough, 95 of 1000"]
        assert {fall["task"] for fall in unsure_ones} == set(tasks)
        assert {fall["task"] for fall in falls if fall["tier"] == "large"} == {tasks[0], tasks[2]}
        heard = [event.body for event in events if event.type is EventType.ANSWER]
        assert {(one["task"], one["tier"]) for one in heard if not one["unsure"]} == {(tasks[1], "large")}
        assert {(one["task"], one["tier"]) for one in heard if one["unsure"]} == {
            (name, "small") for name in tasks
        }
        await stack.answer(run, Kind.REJECT, digest)
        await run.handle.result()


def test_the_known_optimum_is_found_on_simulated_tiers():
    # The whole of fifty seeds is the benchmark.
    seen = [played(seed, calls=3000, cases=200) for seed in range(5)]
    assert [one.regret < 0.02 for one in seen] == [True] * 5
    for one in seen:
        assert min(one.small, one.large) > one.regret
        assert one.error[1] < one.error[0]


def test_where_hard_calls_are_hard_for_both_the_large_tier_is_known_at_every_confidence():
    world = World(35)
    cases = [world.case() for _ in range(4000)]
    small = [Judged("t", "s", one.confidence, one.small) for one in cases[:3000]]
    large = [Judged("t", "l", one.confidence, one.large, after="s") for one in cases[3000:]]
    (after,) = [fit for fit in fits_of([*small, *large], measured=False) if fit.after]
    off = [
        (whole, abs(chance(after.steps, said) / 1000 - right / whole))
        for said, (whole, _, right) in zip(said_at_levels(), world.joint(), strict=True)
    ]
    assert sum(whole * one for whole, one in off) < 0.03
    assert after.steps[-1].permille - after.steps[0].permille > 40


def test_no_policy_of_any_kind_is_cheaper_than_the_known_optimum():
    world = World(3)
    small = [world.begun_small([place >= bar for place in range(LEVELS)]) for bar in range(LEVELS + 1)]
    assert world.best() <= min(*small, world.begun_large())
    assert sum(whole for whole, _, _ in world.joint()) == pytest.approx(1)


def test_a_share_stands_with_its_interval():
    assert wilson(13, 14) == {"percent": 92.9, "low": 68.5, "high": 98.7}


async def test_explain_says_from_where_on_an_answer_is_taken(database, capsys):
    desk = Desk(database, [saying("s-1", SURE)])
    await desk.measured()
    await desk.keep(FITS)
    await desk.ask("1")
    (found,) = await explained(Session(Settings(tenant="acme"), database), "1")
    show(found)
    printed = capsys.readouterr().out
    assert "small: an answer of s-1 below 200 of 1000 goes on" in printed
    assert "replay: the same decision" in printed
