import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from activities.services.budget import RESERVATION
from activities.services.content import ContentStore, get_blob
from activities.services.ledger_store import EVENT, LedgerStore
from activities.services.routes import Routes, telemetry_of
from models.budget import Account, Budget
from models.errors import BudgetExceeded, DeadlineMissed, PolicyDenied, UnknownName
from models.inference import Call, DataClass, Message, Needs, Prompt, Task
from models.orders import Fell, RouteOrder
from models.routing import (
    Measured,
    RoutePolicy,
    RouteRecord,
    Snapshot,
    Telemetry,
    Wish,
    barred,
    decide,
    replayed,
    worst,
)
from models.settings import Settings, TaskSettings, TierSettings
from scripts.bench.constraints import Violations, hammer
from scripts.commands.route import explained, read, show
from scripts.commands.session import Session

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
PRICES = {
    "price_per_million_input": Decimal("0.5"),
    "price_per_million_output": Decimal("1.5"),
    "currency": "EUR",
}


def tier(name, **more):
    return TierSettings(name=name, kind="llama_cpp", url="http://127.0.0.1:1", **more)


def needing(**more):
    return Needs(**{"context_tokens": 100, "answer_tokens": 50} | more)


def wish(prefer="small", **more):
    return Wish(task="draft", prefer=prefer, needs=needing(**more))


def seen(**more):
    return Telemetry(measured=Measured(calls=50, **more))


EDGE, STANDARD, LARGE = TIERS = (tier("edge"), tier("standard"), tier("large"))


def tiers_of(decision):
    return decision.route.tiers


def why(decision, name):
    return next(one.lost for one in decision.route.candidates if one.tier == name)


@pytest.mark.parametrize(
    ("known", "needs", "words"),
    [
        (Telemetry(held=True), {}, "another model"),
        (Telemetry(context_tokens=99), {}, "its server takes"),
        (Telemetry(structured=False), {"structured": True}, "ignore a schema"),
    ],
)
def test_what_was_seen_of_a_server_bars_it_whatever_its_settings_say(known, needs, words):
    decision = decide(wish(**needs), TIERS, Snapshot(tiers={"edge": known}))
    assert tiers_of(decision) == ("standard", "large")
    assert words in why(decision, "edge")


def test_a_pin_leaves_one_tier_and_no_fallback():
    decision = decide(wish(pin="standard"), TIERS, Snapshot())
    assert tiers_of(decision) == ("standard",)
    assert why(decision, "edge") == "the call is pinned to standard"


def test_a_pin_to_a_tier_that_may_not_see_the_data_is_a_refusal():
    decision = decide(wish(pin="edge", data_class=DataClass.PERSONAL), TIERS, Snapshot())
    assert decision.refused_as == "PolicyDenied"


def test_a_kept_answer_comes_first_but_never_past_a_constraint():
    snapshot = Snapshot(tiers={"large": Telemetry(cached=True)})
    assert tiers_of(decide(wish(), TIERS, snapshot))[0] == "large"
    barred_too = (*TIERS[:2], tier("large", data_classes=(DataClass.PUBLIC,)))
    assert tiers_of(decide(wish(), barred_too, snapshot)) == ("edge", "standard")


def test_an_open_breaker_moves_a_tier_back_but_the_only_one_stays():
    snapshot = Snapshot(tiers={"edge": Telemetry(suspended=True)})
    assert tiers_of(decide(wish(), TIERS, snapshot)) == ("standard", "large")
    assert why(decide(wish(), TIERS, snapshot), "edge").startswith("its breaker is open")
    assert tiers_of(decide(wish(), (EDGE,), snapshot)) == ("edge",)


def test_who_cannot_be_expected_in_time_loses_and_waiting_counts():
    slow = {"edge": seen(slow_milliseconds=900), "standard": seen(slow_milliseconds=400)}
    decision = decide(wish(within_milliseconds=500), TIERS[:2], Snapshot(tiers=slow))
    assert tiers_of(decision) == ("standard",)
    assert why(decision, "edge") == "it would take 900 ms and somebody waits 500"
    busy = slow["standard"].model_copy(update={"busy": 2, "room": 2})
    late = decide(wish(within_milliseconds=500), TIERS[:2], Snapshot(tiers=slow | {"standard": busy}))
    assert late.refused_as == "DeadlineMissed"
    with pytest.raises(DeadlineMissed, match="may_queue"):
        late.raise_refusal()


def test_what_cannot_be_had_in_time_becomes_queued_work_only_where_the_task_allows_it():
    slow = Snapshot(tiers={"edge": seen(slow_milliseconds=900)})
    late = decide(wish(within_milliseconds=500, may_queue=True), (EDGE,), slow)
    assert (late.route.queued, tiers_of(late)) == (True, ("edge",))
    timely = decide(wish(within_milliseconds=1000, may_queue=True), (EDGE,), slow)
    assert timely.route.queued is False


def test_the_small_tier_is_skipped_when_its_failures_cost_more_than_it_saves():
    def known(permille):
        return Snapshot(
            tiers={
                "edge": seen(amount="0.80", currency="EUR", escalated_permille=permille),
                "standard": seen(amount="1.00", currency="EUR", escalated_permille=0),
            }
        )

    assert tiers_of(decide(wish(), TIERS[:2], known(199))) == ("edge", "standard")
    assert tiers_of(decide(wish(), TIERS[:2], known(201))) == ("standard", "edge")


def test_an_unknown_price_leaves_the_order_of_the_settings():
    known = Snapshot(tiers={"standard": seen(amount="0.01", currency="EUR")})
    assert tiers_of(decide(wish(), TIERS, known)) == ("edge", "standard")


def account(left, name="acme/*/EUR/2026-05-04"):
    return Account(name=name, currency="EUR", cap=left)


def test_under_a_budget_a_tier_without_a_price_takes_nothing():
    decision = decide(wish(), (EDGE,), Snapshot(accounts=(account(10**9),)))
    assert decision.refused_as == "BudgetExceeded"
    assert "its price is unknown" in decision.refusal


def test_the_reservation_covers_first_and_fallback_and_a_fallback_that_does_not_fit_is_left_out():
    paid = (tier("edge", **PRICES), tier("large", **PRICES))
    one = worst(needing(), paid[0])
    both = decide(wish(), paid, Snapshot(accounts=(account(2 * one),)))
    assert (tiers_of(both), both.holds) == (("edge", "large"), 2 * one)
    single = decide(wish(), paid, Snapshot(accounts=(account(2 * one - 1),)))
    assert (tiers_of(single), single.holds) == (("edge",), one)
    assert "as a fallback it may take" in why(single, "large")
    none = decide(wish(), paid, Snapshot(accounts=(account(one - 1),)))
    assert (tiers_of(none), none.refused_as) == ((), "BudgetExceeded")


any_tier = st.builds(
    tier,
    name=st.sampled_from([f"t{number}" for number in range(6)]),
    region=st.sampled_from([None, "eu", "us"]),
    data_classes=st.lists(st.sampled_from(list(DataClass)), unique=True).map(tuple),
    context_tokens=st.integers(64, 5000),
    structured=st.booleans(),
)
any_telemetry = st.builds(
    Telemetry,
    measured=st.builds(
        Measured,
        calls=st.just(30),
        amount=st.sampled_from([None, "0.10", "0.30"]),
        currency=st.just("EUR"),
        slow_milliseconds=st.sampled_from([None, 10, 1000]),
        escalated_permille=st.sampled_from([None, 0, 500, 1000]),
    ),
    context_tokens=st.sampled_from([None, 64, 4000]),
    structured=st.sampled_from([None, True, False]),
    held=st.booleans(),
    suspended=st.booleans(),
    cached=st.booleans(),
    busy=st.sampled_from([None, 0, 9]),
    room=st.sampled_from([None, 1, 8]),
)
any_wish = st.builds(
    Wish,
    task=st.just("draft"),
    prefer=st.sampled_from(["small", "large"]),
    needs=st.builds(
        Needs,
        data_class=st.sampled_from(list(DataClass)),
        region=st.sampled_from([None, "eu", "us"]),
        context_tokens=st.integers(1, 6000),
        structured=st.booleans(),
        within_milliseconds=st.sampled_from([None, 100]),
        may_queue=st.booleans(),
        pin=st.sampled_from([None, None, "t1"]),
    ),
)
some_tiers = st.lists(any_tier, max_size=6, unique_by=lambda made: made.name)


@settings(max_examples=200, deadline=None)
@given(any_wish, some_tiers, st.dictionaries(st.sampled_from(["t0", "t1", "t2"]), any_telemetry))
def test_telemetry_can_take_tiers_away_and_never_bring_one_back(wish, tiers, known):
    snapshot = Snapshot(tiers=known)
    decision = decide(wish, tiers, snapshot)
    by_name = {made.name: made for made in tiers}
    for name in decision.route.tiers:
        assert barred(wish.needs, by_name[name], snapshot.of(name)) is None
    assert (decision.refused_as is None) == bool(decision.route.tiers)
    for candidate in decision.route.candidates:
        assert (candidate.lost is None) == (candidate.tier in decision.route.tiers)


@settings(max_examples=100, deadline=None)
@given(any_wish, some_tiers, st.dictionaries(st.sampled_from(["t0", "t1"]), any_telemetry))
def test_a_record_that_went_through_json_gives_the_same_decision(wish, tiers, known):
    snapshot = Snapshot(tiers=known)
    decision = decide(wish, tiers, snapshot)
    record = RouteRecord(
        route=decision.route,
        needs=wish.needs,
        prefer=wish.prefer,
        snapshot=snapshot,
        snapshot_digest=snapshot.digest(),
        refused_as=decision.refused_as,
        refusal=decision.refusal,
        holds=decision.holds,
        currency=decision.currency,
    )
    body = json.loads(record.model_dump_json(exclude_defaults=True))
    read = RouteRecord.model_validate(body)
    stored = RoutePolicy.model_validate(json.loads(json.dumps(RoutePolicy.of(tiers).stored())))
    assert replayed(read, stored) == decision == read.decision()
    assert read.snapshot.digest() == read.snapshot_digest


def test_random_requests_over_random_faults_never_reach_a_tier_that_may_not_see_them():
    violations: Violations = hammer(examples=1000, seed=1)
    assert violations.examples == 1000
    assert violations.found == ()
    assert min(violations.reached.values()) > 0, violations.reached


def test_a_policy_holds_no_address_and_no_secret():
    stored = json.dumps(RoutePolicy.of([tier("edge", token="hunter2")]).stored())
    assert "hunter2" not in stored
    assert "127.0.0.1" not in stored


class Row:
    def __init__(self, usable=True, milliseconds=10, model="m"):
        self.model, self.usable, self.milliseconds = model, usable, milliseconds
        self.prompt_tokens = self.completion_tokens = 10


def test_measurements_say_how_slow_and_how_often_in_vain():
    known = telemetry_of(EDGE, [*[Row(milliseconds=n) for n in range(1, 96)], *[Row(False, 500)] * 5])
    assert known.model == "m"
    assert (known.measured.slow_milliseconds, known.measured.escalated_permille) == (500, 50)
    assert telemetry_of(EDGE, [Row()] * 19).measured.escalated_permille is None
    assert telemetry_of(EDGE, [Row(model="")]) == Telemetry()


def task(name="draft"):
    def build(inputs, params):
        text = inputs.get("brief", "") + str(params.get("n", ""))
        return Prompt(messages=(Message(role="user", content=text or "x"),), max_tokens=50)

    return Task(name, "small", False, build, lambda *_: ())


def routes(database, tiers=TIERS, **more):
    content, ledger = ContentStore(database), LedgerStore(database, lambda: NOON)
    return Routes(tiers, {"draft": task()}, content, ledger, database=database, clock=lambda: NOON, **more)


def order(event="one", **call):
    return RouteOrder(
        tenant="acme", workflow_id="run", event_id=event, agent="content", call=Call(task="draft", **call)
    )


async def records(database):
    query = select(EVENT.c.envelope).where(EVENT.c.type == "route").order_by(EVENT.c.seq)
    rows = await database.read(lambda link: link.execute(query).scalars().all())
    return [RouteRecord.model_validate(json.loads(row)["body"]) for row in rows]


async def test_every_recorded_route_replays_from_the_ledger_and_the_content_store(database):
    made = routes(database, (tier("edge", **PRICES), tier("large", **PRICES)), budgets=[BUDGET])
    for number in range(30):
        await made.route(order(str(number), params={"n": number}))
    found = await records(database)
    assert len(found) == 30
    for record in found:
        bytes_ = await database.read(lambda link, record=record: get_blob(link, "acme", record.policy))
        policy = RoutePolicy.model_validate(json.loads(bytes_))
        assert replayed(record, policy) == record.decision()
        assert record.snapshot.digest() == record.snapshot_digest


BUDGET = Budget(amount="1", currency="EUR")


async def test_the_route_that_stands_is_the_route_whatever_has_changed_since(database):
    first = await routes(database).route(order())
    assert first.route.tiers == ("edge", "standard")
    changed = await routes(database, (LARGE,)).route(order())
    assert changed.route == first.route
    assert len(await records(database)) == 1


async def test_the_money_is_held_once_in_the_commit_of_the_route(database):
    made = routes(database, (tier("edge", **PRICES),), budgets=[BUDGET])
    grants = [(await made.route(order())).grant for _ in range(3)]
    assert {grant.reservation for grant in grants} == {"one"}
    rows = await database.read(lambda link: link.execute(select(RESERVATION)).all())
    assert [(row.id, row.state, row.worst) for row in rows] == [
        ("one", "held", (await records(database))[0].holds)
    ]


async def test_a_refusal_is_on_record_with_every_candidate_and_holds_nothing(database):
    made = routes(database, (tier("edge", **PRICES),), budgets=[Budget(amount="0.000001", currency="EUR")])
    for _ in range(2):
        with pytest.raises(BudgetExceeded, match="acme/"):
            await made.route(order())
    (record,) = await records(database)
    assert (record.route.tiers, record.refused_as) == ((), "BudgetExceeded")
    assert "left" in record.route.candidates[0].lost
    count = select(func.count()).select_from(RESERVATION)
    assert await database.read(lambda link: link.execute(count).scalar_one()) == 0


async def test_personal_data_in_a_text_keeps_it_from_tiers_that_may_not_see_it(database):
    content = ContentStore(database)
    brief = await content.put("acme", b"answer ann@example.org, please")
    with pytest.raises(PolicyDenied, match="data class personal"):
        await routes(database).route(order(inputs={"brief": brief}))
    private = tier("private", data_classes=tuple(DataClass))
    routed = await routes(database, (EDGE, private)).route(order("two", inputs={"brief": brief}))
    assert routed.route.tiers == ("private",)


async def test_what_settings_want_of_a_task_becomes_pin_deadline_and_priority(database):
    wanted = {"draft": TaskSettings(within_milliseconds=2000, priority=1, tier="large")}
    routed = await routes(database, wanted=wanted).route(order())
    assert routed.route.tiers == ("large",)
    assert routed.grant.deadline == NOON + timedelta(seconds=2)
    assert routed.grant.priority == 1
    assert not routed.route.queued
    assert (await routes(database).route(order("two"))).grant.deadline is None


async def test_the_last_fallback_settles_what_was_held(database):
    made = routes(database, (tier("edge", **PRICES),), budgets=[BUDGET])
    grant = (await made.route(order())).grant
    fell = Fell(
        tenant="acme",
        workflow_id="run",
        event_id="fell",
        task="draft",
        tier="edge",
        to=None,
        reason="away",
        kind="TierUnavailable",
        reservation=grant.reservation,
    )
    await made.fell(fell)
    rows = await database.read(lambda link: link.execute(select(RESERVATION.c.state)).scalars().all())
    assert rows == ["settled"]


@pytest.fixture
def session(database):
    return Session(Settings(tenant="acme"), database)


async def test_explain_shows_every_candidate_of_a_run_and_that_the_decision_can_be_made_again(
    database, session, capsys
):
    made = routes(database, (tier("edge", context_tokens=64), STANDARD, LARGE))
    await made.route(order())
    with pytest.raises(PolicyDenied):
        await made.route(order("two", region="mars"))
    first, second = await explained(session, "run")
    assert [one.replay for one in (first, second)] == ["the same decision"] * 2
    assert second.record.refused_as == "PolicyDenied"
    for one in (first, second):
        show(one)
    printed = capsys.readouterr().out
    for words in ("standard", "tokens are more than its 64", "region unknown is not mars", "refused as"):
        assert words in printed


async def test_explain_finds_one_route_by_its_event_id_and_says_what_it_does_not_know(database, session):
    await routes(database).route(order())
    await routes(database).route(order("two"))
    (found,) = await explained(session, "two")
    assert found.event.event_id == "two"
    assert json.loads(json.dumps(found.plain()))["route"]["tiers"] == ["edge", "standard"]
    with pytest.raises(UnknownName, match="'three'"):
        await explained(session, "three")


async def test_a_snapshot_that_was_changed_is_noticed_before_it_is_replayed(database, session):
    await routes(database).route(order())
    (found,) = await explained(session, "one")
    body = found.event.body | {"snapshot": {"tiers": {"edge": {"held": True}}}}
    forged = found.event.model_copy(update={"body": body})
    assert "does not hash" in (await read(session, forged, ())).replay


async def test_a_route_of_an_older_version_is_shown_and_not_replayed(database, session):
    await routes(database).route(order())
    (found,) = await explained(session, "one")
    old = {name: found.event.body[name] for name in ("route", "needs")}
    shown = await read(session, found.event.model_copy(update={"body": old}), ())
    assert "older version" in shown.replay
    assert shown.record.route == found.record.route
