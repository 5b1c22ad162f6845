import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from temporalio.testing import ActivityEnvironment

from activities.inference import Inference
from activities.services.breaker import OPEN_SECONDS, SAMPLES, Breakers
from activities.services.budget import Books, Hold
from activities.services.cache import Cache
from activities.services.content import ContentStore
from activities.services.questions import Examined, best_of, schema_objections
from activities.services.router import Answerer
from activities.services.till import Till
from activities.tiers.scripted import Scripted
from activities.tiers.tgi import Tgi
from activities.tiers.wire import http_client
from models.budget import Budget, accounts_of
from models.errors import (
    BudgetExceeded,
    DeadlineMissed,
    InvalidInput,
    OutputInvalid,
    PolicyDenied,
    RateLimited,
    TierUnavailable,
    UnknownName,
)
from models.inference import Answered, Ask, Call, Completion, DataClass, Grant, Message, Needs, Prompt, Task
from models.loop import Cost, Ref
from models.routing import Measured, averaged, estimate, needs_of, route, unsuitable
from models.settings import TaskSettings, TierSettings
from tests.tgi_stub import TgiStub

SCHEMA = {
    "type": "object",
    "properties": {"title": {"type": "string", "maxLength": 30}},
    "required": ["title"],
    "additionalProperties": False,
}


def tier(name="edge", **more):
    return TierSettings(name=name, kind="llama_cpp", url="http://127.0.0.1:1", **more)


def needing(**more):
    return Needs(**{"context_tokens": 100} | more)


TIERS = (tier("edge", context_tokens=512), tier("standard"), tier("large", region="eu"))


def test_small_takes_the_first_that_fits_and_large_the_last():
    assert route("draft", needing(), TIERS, "small").tiers == ("edge", "standard")
    assert route("draft", needing(), TIERS, "large").tiers == ("large", "standard")


def test_every_candidate_says_why_it_lost():
    chosen = route("draft", needing(context_tokens=1000), TIERS, "small")
    assert chosen.tiers == ("standard", "large")
    assert [candidate.lost for candidate in chosen.candidates] == [
        "1000 tokens are more than its 512",
        None,
        None,
    ]


def test_at_most_one_fallback_and_the_rest_say_so():
    chosen = route("draft", needing(), TIERS, "small")
    assert chosen.candidates[2].lost == "edge and standard come first; at most one fallback is tried"


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (needing(data_class=DataClass.PERSONAL), "data class personal"),
        (needing(region="us"), "region unknown is not us"),
        (needing(context_tokens=9999), "9999 tokens"),
    ],
)
def test_an_empty_choice_is_a_refusal_that_names_task_reason_and_remedy(needs, reason):
    with pytest.raises(PolicyDenied) as caught:
        route("draft", needs, TIERS, "small")
    for word in ("draft", "edge", "large", reason, "[[tiers]]"):
        assert word in str(caught.value)


def test_no_tiers_at_all_is_the_same_refusal():
    with pytest.raises(PolicyDenied, match="no tier is configured"):
        route("draft", needing(), (), "small")


any_tier = st.builds(
    tier,
    name=st.sampled_from([f"t{number}" for number in range(9)]),
    region=st.sampled_from([None, "eu", "us"]),
    data_classes=st.lists(st.sampled_from(list(DataClass)), unique=True).map(tuple),
    context_tokens=st.integers(64, 5000),
    structured=st.booleans(),
)
any_needs = st.builds(
    Needs,
    data_class=st.sampled_from(list(DataClass)),
    region=st.sampled_from([None, "eu", "us"]),
    context_tokens=st.integers(1, 6000),
    structured=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(
    needs=any_needs,
    tiers=st.lists(any_tier, max_size=6, unique_by=lambda made: made.name),
    prefer=st.sampled_from(["small", "large"]),
)
def test_no_chosen_tier_ever_breaks_a_hard_constraint(needs, tiers, prefer):
    fitting = [made.name for made in tiers if unsuitable(needs, made) is None]
    try:
        chosen = route("draft", needs, tiers, prefer)
    except PolicyDenied:
        assert not fitting
        return
    by_name = {made.name: made for made in tiers}
    assert 1 <= len(chosen.tiers) <= 2
    assert [candidate.tier for candidate in chosen.candidates] == [made.name for made in tiers]
    for name in chosen.tiers:
        assert needs.data_class in by_name[name].data_classes
        assert needs.region in (None, by_name[name].region)
        assert needs.context_tokens <= by_name[name].context_tokens
        assert by_name[name].structured or not needs.structured
    for candidate in chosen.candidates:
        assert (candidate.lost is None) == (candidate.tier in chosen.tiers)


def test_an_estimate_without_prices_or_speed_is_unknown_not_zero():
    expected = estimate(needing(answer_tokens=50), tier())
    assert (expected.amount, expected.currency, expected.milliseconds) == (None, None, None)


PRICED = {
    "price_per_million_input": Decimal("0.15"),
    "price_per_million_output": Decimal("0.60"),
    "currency": "EUR",
}


def test_an_estimate_uses_prices_and_speed_from_the_settings():
    expected = estimate(needing(answer_tokens=50), tier(tokens_per_second=40, **PRICED))
    assert (expected.amount, expected.currency) == ("0.00003750", "EUR")
    assert expected.milliseconds == 1250


def test_prices_without_a_currency_are_no_price():
    unpriced = tier(**PRICED).model_copy(update={"currency": None})
    assert estimate(needing(answer_tokens=50), unpriced).amount is None


def test_what_was_measured_beats_what_was_configured():
    seen = averaged(
        [
            Cost(amount="0.01", currency="EUR", milliseconds=100, tokens=10),
            Cost(amount="0.02", currency="EUR", milliseconds=300, tokens=30),
        ]
    )
    assert seen == Measured(calls=2, milliseconds=200, tokens=20, amount="0.01500000", currency="EUR")
    expected = estimate(needing(answer_tokens=50), tier(tokens_per_second=1, **PRICED), seen)
    assert (expected.amount, expected.milliseconds, expected.tokens) == ("0.01500000", 200, 20)


@pytest.mark.parametrize("other", [Cost(milliseconds=1), Cost(amount="1", currency="USD", milliseconds=1)])
def test_an_unknown_or_foreign_amount_makes_the_average_unknown(other):
    seen = averaged([Cost(amount="1", currency="EUR", milliseconds=1), other])
    assert (seen.amount, seen.currency) == (None, None)


class Shelf:
    def __init__(self):
        self.blobs = {}

    async def text(self, tenant, ref):
        return self.blobs[tenant, ref.digest].decode()

    async def put(self, tenant, data, media_type="text/plain; charset=utf-8", subject=None):
        ref = Ref(digest=sha256(data).hexdigest(), size=len(data), media_type=media_type)
        self.blobs[tenant, ref.digest] = data
        return ref


def task(structured=False, check=lambda text, inputs, params: (), **more):
    def build(inputs, params):
        messages = (Message(role="user", content="Title for: " + inputs.get("brief", "")),)
        return Prompt(messages=messages, answer_schema=SCHEMA if structured else None, **more)

    return Task("title", "small", structured, build, check)


def completion(text, finish="stop"):
    return Completion(
        text=text, finish=finish, prompt_tokens=10, completion_tokens=5, model="m", milliseconds=7
    )


def asking_with(script, task, **more):
    made = tier(**more)
    scripted = Scripted("edge", script)
    return Answerer([made], {"edge": scripted}, {"title": task}, Shelf()), scripted


async def test_a_good_answer_is_stored_with_its_cost():
    shelf = Shelf()
    brief = await shelf.put("acme", b"kettles")
    scripted = Scripted("edge", [completion(' {"title": "Kettles"} ')])
    answerer = Answerer([tier(**PRICED)], {"edge": scripted}, {"title": task(structured=True)}, shelf)
    answered = await answerer.answer("acme", Call(task="title", inputs={"brief": brief}), "edge")
    assert json.loads(await shelf.text("acme", answered.text)) == {"title": "Kettles"}
    assert answered.text.media_type == "application/json"
    assert scripted.prompts[0].messages[0].content == "Title for: kettles"
    assert answered.cost == Cost(amount="0.00000450", currency="EUR", milliseconds=7, tokens=15)
    assert (answered.model, answered.repaired, answered.problems) == ("m", False, ())


async def test_each_tenant_has_its_own_part_of_a_servers_prefix_cache():
    answerer, scripted = asking_with([completion("x")] * 2, task())
    for tenant in ("acme", "other"):
        await answerer.answer(tenant, Call(task="title"), "edge")
    assert [prompt.cache_group for prompt in scripted.prompts] == ["acme", "other"]


async def test_the_amount_is_unknown_without_prices():
    answerer, _ = asking_with([completion("x")], task())
    assert (await answerer.answer("acme", Call(task="title"), "edge")).cost == Cost(milliseconds=7, tokens=15)


async def test_a_broken_schema_is_repaired_once_with_the_objections_and_both_calls_cost():
    answerer, scripted = asking_with(
        [completion('{"title": 7}'), completion('{"title": "Seven"}')], task(structured=True)
    )
    answered = await answerer.answer("acme", Call(task="title"), "edge")
    assert answered.repaired
    assert answered.problems == ()
    assert answered.cost.tokens == 30
    assert [message.role for message in scripted.prompts[1].messages] == ["user", "assistant", "user"]
    assert '$.title: breaks type "string"' in scripted.prompts[1].messages[2].content


@pytest.mark.parametrize("bad", ["no json", '{"title": NaN}', "[" * 5000, '{"other": "x"}', '{"title": "T"'])
async def test_still_broken_after_one_repair_is_output_invalid_without_the_text(bad):
    answerer, scripted = asking_with([bad, bad, '{"title": "late"}'], task(structured=True))
    with pytest.raises(OutputInvalid) as caught:
        await answerer.answer("acme", Call(task="title"), "edge")
    assert len(scripted.prompts) == 2
    assert "NaN" not in str(caught.value)
    assert "[[[" not in str(caught.value)


def too_loud(text, inputs, params):
    return ("it shouts",) if text.isupper() else ()


async def test_what_the_check_still_objects_to_is_shown_to_the_person():
    answerer, scripted = asking_with(["LOUD", "LOUDER"], task(check=too_loud))
    answered = await answerer.answer("acme", Call(task="title"), "edge")
    assert answered.problems == ("it shouts",)
    assert answered.repaired
    assert "- it shouts" in scripted.prompts[1].messages[-1].content


async def test_a_repair_that_made_it_worse_is_thrown_away():
    shelf = Shelf()
    scripted = Scripted("edge", ['{"title": "LOUD"}', "oops"])
    shouting = task(structured=True, check=lambda text, inputs, params: ("it shouts",))
    answerer = Answerer([tier()], {"edge": scripted}, {"title": shouting}, shelf)
    answered = await answerer.answer("acme", Call(task="title"), "edge")
    assert await shelf.text("acme", answered.text) == '{"title": "LOUD"}'
    assert not answered.repaired


async def test_a_cut_answer_is_asked_again_and_otherwise_reported():
    answerer, _ = asking_with([completion("a long", "length"), completion("short")], task())
    assert (await answerer.answer("acme", Call(task="title"), "edge")).problems == ()
    answerer, _ = asking_with([completion("a long", "length")] * 2, task())
    assert "cut off" in (await answerer.answer("acme", Call(task="title"), "edge")).problems[0]


def room_for(task):
    return needs_of(task, Call(task="title"), task.build({}, {})).context_tokens


async def test_an_answer_too_long_to_be_quoted_is_repaired_from_the_objections_alone():
    shouting = task(check=too_loud)
    answerer, scripted = asking_with(
        ["LOUD " * 200, "quiet"], shouting, context_tokens=room_for(shouting) + 100
    )
    assert (await answerer.answer("acme", Call(task="title"), "edge")).problems == ()
    assert [message.role for message in scripted.prompts[1].messages] == ["user"]
    assert "it shouts" in scripted.prompts[1].messages[0].content


async def test_a_repair_that_does_not_fit_is_not_asked():
    shouting = task(check=too_loud)
    answerer, scripted = asking_with(["LOUD"], shouting, context_tokens=room_for(shouting))
    assert (await answerer.answer("acme", Call(task="title"), "edge")).problems == ("it shouts",)
    assert len(scripted.prompts) == 1


@pytest.mark.parametrize(
    ("call", "more"),
    [
        (Call(task="title", data_class=DataClass.PERSONAL), {}),
        (Call(task="title", region="eu"), {}),
        (Call(task="title"), {"structured": False}),
        (Call(task="title"), {"context_tokens": 64}),
    ],
)
async def test_a_tier_that_may_not_take_the_call_is_never_asked_whatever_the_caller_says(call, more):
    answerer, scripted = asking_with(['{"title": "x"}'], task(structured=True), **more)
    with pytest.raises(PolicyDenied, match="edge may not take this call"):
        await answerer.answer("acme", call, "edge")
    assert scripted.prompts == []


async def test_unknown_tier_and_task_are_named_with_what_is_known():
    answerer, _ = asking_with([], task())
    with pytest.raises(UnknownName, match="'huge'.*edge"):
        await answerer.answer("acme", Call(task="title"), "huge")
    with pytest.raises(UnknownName, match="'paint'.*title"):
        await answerer.answer("acme", Call(task="paint"), "edge")


async def test_a_structured_task_that_builds_no_schema_is_refused():
    lax = Task("title", "small", True, task().build, task().check)
    answerer, _ = asking_with([], lax)
    with pytest.raises(InvalidInput, match="answer_schema"):
        await answerer.answer("acme", Call(task="title"), "edge")


async def test_errors_of_the_tier_pass_unchanged_and_are_not_retried():
    answerer, scripted = asking_with([RateLimited("edge: full")], task())
    with pytest.raises(RateLimited):
        await answerer.answer("acme", Call(task="title"), "edge")
    assert len(scripted.prompts) == 1


async def test_a_tier_is_asked_no_more_at_once_than_it_allows():
    class Slow:
        name = "edge"

        def __init__(self):
            self.now = self.most = 0
            self.full, self.go = asyncio.Event(), asyncio.Event()

        async def complete(self, prompt):
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now == 2:
                self.full.set()
            await self.go.wait()
            self.now -= 1
            return completion("x")

    slow = Slow()
    answerer = Answerer([tier(concurrency=2)], {"edge": slow}, {"title": task()}, Shelf())
    asked = [asyncio.create_task(answerer.answer("acme", Call(task="title"), "edge")) for _ in range(6)]
    await slow.full.wait()
    slow.go.set()
    await asyncio.gather(*asked)
    assert slow.most == 2


def test_schema_objections_say_where_and_which_rule_but_not_what():
    found = schema_objections('{"title": "' + "secret" * 20 + '"}', SCHEMA)
    assert found == ("$.title: breaks maxLength 30",)


def test_of_equal_answers_the_later_is_kept():
    examined = [Examined(completion(text), text, ("o",), True) for text in "ab"]
    assert best_of(examined) is examined[1]


async def test_a_tgi_tier_answers_a_structured_task_end_to_end():
    async with TgiStub() as stub:
        made = TierSettings(name="large", kind="tgi", url=stub.url)
        endpoint = Tgi(made, http_client(made))
        shelf = Shelf()
        brief = await shelf.put("acme", b"kettles boil quickly")
        answerer = Answerer([made], {"large": endpoint}, {"title": task(structured=True)}, shelf)
        answered = await answerer.answer("acme", Call(task="title", inputs={"brief": brief}), "large")
        await endpoint.aclose()
    assert answered.problems == ()
    assert "kettles" in await shelf.text("acme", answered.text)


ASK = Ask(tenant="acme", workflow_id="test", call=Call(task="title"), tier="edge")
REF = Ref(digest="0" * 64, size=0)


async def test_the_activity_answers_and_heartbeats_while_it_thinks():
    beaten = asyncio.Event()

    class Thinking:
        async def answer(self, tenant, call, tier, grant=None, attempt=1):
            await beaten.wait()
            return Answered(text=REF, tier=tier, model="m")

    environment = ActivityEnvironment()
    environment.info = replace(environment.info, heartbeat_timeout=timedelta(seconds=1))
    environment.on_heartbeat = lambda *_: beaten.set()
    answered = await environment.run(Inference(Thinking()).answer, ASK)
    assert answered.tier == "edge"


@pytest.mark.parametrize("by", [None, "another"])
async def test_a_call_that_its_run_did_not_order_reaches_no_tier(by: str | None):
    environment = ActivityEnvironment()
    environment.info = replace(environment.info, workflow_id=by)
    asked = list[str]()

    class Answering:
        async def answer(self, tenant, call, tier, grant=None, attempt=1):
            asked.append(tier)

    with pytest.raises(PolicyDenied):
        await environment.run(Inference(Answering()).answer, ASK)
    assert asked == []


async def test_cancelling_the_activity_cancels_the_call():
    started, stopped = asyncio.Event(), asyncio.Event()

    class Endless:
        async def answer(self, tenant, call, tier, grant=None, attempt=1):
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()

    environment = ActivityEnvironment()
    running = asyncio.create_task(environment.run(Inference(Endless()).answer, ASK))
    await started.wait()
    environment.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert stopped.is_set()


def test_importing_the_activity_loads_no_engine():
    code = "import activities.inference, models.routing, sys; print(*sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"httpx", "numpy", "sqlalchemy", "jsonschema", "aiohttp", "xllamacpp"}


class Ticks:
    now = 0.0

    def __call__(self):
        return self.now


NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
AWAY = TierUnavailable("edge: away")


async def ask(answerer, grant=None, attempt=1, **call):
    return await answerer.answer("acme", Call(task="title", **call), "edge", grant, attempt)


async def failing(answerer, times, error=TierUnavailable):
    for _ in range(times):
        with pytest.raises(error):
            await ask(answerer)


def with_breakers(script, ticks, made=None, **more):
    breakers = Breakers(ticks, lambda: 1.0)
    scripted = Scripted("edge", script)
    answerer = Answerer(
        [tier(**more)], {"edge": scripted}, {"title": made or task()}, Shelf(), breakers=breakers, ticks=ticks
    )
    return answerer, scripted, breakers


async def test_a_tier_that_fails_is_left_alone_until_a_probe_generates_a_token():
    ticks = Ticks()
    answerer, scripted, _ = with_breakers([*[AWAY] * SAMPLES, "yes", "better"], ticks)
    await failing(answerer, SAMPLES)
    with pytest.raises(TierUnavailable, match="its breaker is open"):
        await ask(answerer)
    assert len(scripted.prompts) == SAMPLES
    ticks.now += OPEN_SECONDS
    assert (await ask(answerer)).tier == "edge"
    probe, asked = scripted.prompts[SAMPLES:]
    assert (probe.max_tokens, asked.max_tokens) == (1, 256)


async def test_a_probe_that_fails_keeps_it_away_for_twice_as_long_and_asks_nothing_else():
    ticks = Ticks()
    answerer, scripted, _ = with_breakers([AWAY] * (SAMPLES + 1), ticks)
    await failing(answerer, SAMPLES)
    ticks.now += OPEN_SECONDS
    await failing(answerer, 3)
    assert len(scripted.prompts) == SAMPLES + 1
    ticks.now += OPEN_SECONDS * 2 - 0.1
    await failing(answerer, 1)
    assert len(scripted.prompts) == SAMPLES + 1


@pytest.mark.parametrize("error", [RateLimited("edge: full"), InvalidInput("edge: too long")])
async def test_no_storm_of_refusals_opens_a_breaker(error):
    answerer, _, breakers = with_breakers([error] * 200 + ["yes"], Ticks(), concurrency=8)
    await failing(answerer, 200, type(error))
    assert breakers.openings() == 0
    assert (await ask(answerer)).tier == "edge"


async def test_a_schema_that_is_broken_again_and_again_is_refused_while_text_still_works():
    ticks = Ticks()
    answerer, scripted, _ = with_breakers(["no"] * 12, ticks, task(structured=True))
    await failing(answerer, 5, OutputInvalid)
    asked = len(scripted.prompts)
    with pytest.raises(OutputInvalid, match="several times in a row"):
        await ask(answerer)
    assert len(scripted.prompts) == asked
    ticks.now += OPEN_SECONDS
    await failing(answerer, 1, OutputInvalid)
    assert len(scripted.prompts) == asked + 2


async def test_a_deadline_that_has_passed_asks_nobody():
    answerer, scripted = asking_with(["late"], task())
    with pytest.raises(DeadlineMissed, match="has passed"):
        await ask(answerer, Grant(deadline=NOON))
    assert scripted.prompts == []


async def test_a_call_that_outlasts_its_deadline_is_cut_off_and_its_socket_with_it():
    class Hanging:
        name = "edge"

        def __init__(self):
            self.cancelled = False

        async def complete(self, prompt):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise

    hanging = Hanging()
    answerer = Answerer([tier()], {"edge": hanging}, {"title": task()}, Shelf(), clock=lambda: NOON)
    with pytest.raises(DeadlineMissed, match="no answer within"):
        await ask(answerer, Grant(deadline=NOON + timedelta(milliseconds=20)))
    assert hanging.cancelled


def shipped(database, script, made=None, **more):
    scripted = Scripted("edge", script)
    answerer = Answerer(
        [tier(**PRICED)],
        {"edge": scripted},
        {"title": made or task()},
        ContentStore(database),
        clock=lambda: NOON,
        **{"till": Till(database, lambda: NOON), "cache": Cache(database, lambda: NOON)} | more,
    )
    return answerer, scripted


EUR = accounts_of([Budget(amount="1", currency="EUR")], "acme", "content", NOON)


async def granted(database, worst=10_000):
    caps = {account.name: account.cap for account in EUR}
    hold = Hold("acme", "money", "run", "content", "title", caps, "EUR", worst)
    await Books(database, lambda: NOON).reserve(hold, EUR)
    return Grant(reservation="money")


async def booked(database):
    (account,) = await Books(database, lambda: NOON).accounts(EUR)
    return account.held, account.spent


async def test_an_answer_settles_what_was_held_for_it_in_its_own_commit(database):
    answerer, _ = shipped(database, [completion("x")])
    answered = await ask(answerer, await granted(database))
    assert answered.cost.amount == "0.00000450"
    assert await booked(database) == (0, 5)


async def test_a_failed_try_keeps_the_money_for_the_next_tier_and_counts_at_its_worst(database):
    answerer, _ = shipped(database, [AWAY, completion("x")])
    grant = await granted(database)
    with pytest.raises(TierUnavailable):
        await ask(answerer, grant)
    assert await booked(database) == (10_000, 0)
    await ask(answerer, grant, attempt=2)
    held, spent = await booked(database)
    assert held == 0
    assert 100 < spent < 10_000


async def test_back_pressure_costs_nothing(database):
    answerer, _ = shipped(database, [RateLimited("edge: full"), completion("x")])
    grant = await granted(database)
    with pytest.raises(RateLimited):
        await ask(answerer, grant)
    await ask(answerer, grant, attempt=2)
    assert await booked(database) == (0, 5)


async def test_a_try_that_died_with_its_process_counts_at_its_worst(database):
    answerer, _ = shipped(database, [completion("x")])
    await ask(answerer, await granted(database), attempt=2)
    assert (await booked(database))[1] > 100


async def test_an_identical_call_is_answered_from_the_cache_for_nothing(database):
    wanted = {"title": TaskSettings(cache_seconds=60)}
    answerer, scripted = shipped(database, [completion("x")], wanted=wanted)
    first = await ask(answerer)
    assert not first.cached
    again = await ask(answerer, await granted(database))
    assert (again.cached, again.text, again.cost.amount, again.cost.tokens) == (True, first.text, "0", 0)
    assert len(scripted.prompts) == 1
    assert await booked(database) == (0, 0)


async def test_identical_calls_at_once_are_one_call_and_one_bill(database):
    wanted = {"title": TaskSettings(cache_seconds=60)}
    answerer, scripted = shipped(database, [completion("x")], wanted=wanted)
    answers = await asyncio.gather(*(ask(answerer) for _ in range(10)))
    assert len(scripted.prompts) == 1
    assert sum(answer.cost.tokens for answer in answers) == 15


async def test_a_caller_that_looked_before_an_identical_answer_was_kept_does_not_buy_it_again(database):
    other_is_done, looks = asyncio.Event(), iter(range(10))

    class SlowToHear(Cache):
        async def get(self, key):
            kept = await super().get(key)
            if next(looks) == 1:
                await other_is_done.wait()
            return kept

    wanted = {"title": TaskSettings(cache_seconds=60)}
    answerer, scripted = shipped(
        database, [completion("x")], wanted=wanted, cache=SlowToHear(database, lambda: NOON)
    )
    first, second = asyncio.create_task(ask(answerer)), asyncio.create_task(ask(answerer))
    await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
    other_is_done.set()
    assert {(await first).text, (await second).text} == {(await first).text}
    assert len(scripted.prompts) == 1


class Slow:
    """A tier that answers when it is told to, and takes its time to be cut off."""

    name = "edge"

    def __init__(self):
        self.asked, self.go, self.calls = asyncio.Event(), asyncio.Event(), 0

    async def complete(self, prompt):
        self.calls += 1
        self.asked.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            for _ in range(20):
                await asyncio.sleep(0)
            raise
        return completion("x")


def slowly(database, till=None):
    slow = Slow()
    wanted = {"title": TaskSettings(cache_seconds=60)}
    answerer, _ = shipped(database, [], wanted=wanted, till=till or Till(database, lambda: NOON))
    answerer._endpoints["edge"] = slow
    return answerer, slow


async def an_hour_passes():
    """On this loop's clock, by which deadlines are kept."""
    loop = asyncio.get_running_loop()
    time = loop.time
    loop.time = lambda: time() + 3600
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    loop.time = time


async def test_money_of_a_caller_that_gave_up_is_held_while_others_wait_for_what_it_asked(database):
    answerer, slow = slowly(database)
    grant = (await granted(database)).model_copy(update={"deadline": NOON + timedelta(minutes=30)})
    first = asyncio.create_task(ask(answerer, grant))
    await slow.asked.wait()
    other = asyncio.create_task(ask(answerer))
    while [flight.waiting for flight in answerer._cache._flights.values()] != [2]:
        await asyncio.sleep(0)
    await an_hour_passes()
    with pytest.raises(DeadlineMissed):
        await first
    assert await booked(database) == (10_000, 0)
    slow.go.set()
    assert (await other).cached
    assert await booked(database) == (0, 5)
    assert slow.calls == 1


async def test_what_a_call_took_that_was_cut_off_is_on_the_books_before_its_money_is_given_back(database):
    order = []

    class Noting(Till):
        async def pay(self, tried, settle):
            await super().pay(tried, settle)
            order.append("paid")

        async def settle(self, tenant, reservation):
            order.append("given back")
            await super().settle(tenant, reservation)

    answerer, slow = slowly(database, Noting(database, lambda: NOON))
    grant = (await granted(database)).model_copy(update={"deadline": NOON + timedelta(minutes=30)})
    only = asyncio.create_task(ask(answerer, grant))
    await slow.asked.wait()
    await an_hour_passes()
    with pytest.raises(DeadlineMissed):
        await only
    assert order == ["paid", "given back"]
    held, spent = await booked(database)
    assert held == 0
    assert spent > 0


async def test_nothing_is_cached_unless_task_or_settings_say_so_nor_with_objections(database):
    answerer, scripted = shipped(database, [completion("x")] * 2)
    for _ in range(2):
        assert not (await ask(answerer)).cached
    assert len(scripted.prompts) == 2
    wanted = {"title": TaskSettings(cache_seconds=60)}
    answerer, scripted = shipped(database, ["LOUD"] * 4, task(check=too_loud), wanted=wanted)
    for _ in range(2):
        assert not (await ask(answerer)).cached
    assert len(scripted.prompts) == 4


async def test_a_kept_answer_is_not_for_a_call_of_another_tenant_or_class(database):
    wanted = {"title": TaskSettings(cache_seconds=60)}
    answerer, scripted = shipped(database, [completion("x")] * 3, wanted=wanted)
    await ask(answerer)
    assert not (await ask(answerer, data_class=DataClass.PUBLIC)).cached
    assert not (await answerer.answer("other", Call(task="title"), "edge")).cached
    assert len(scripted.prompts) == 3


async def test_tries_that_fail_again_and_again_run_out_of_money_and_never_past_the_cap(database):
    answerer, scripted = shipped(database, [AWAY] * 100)
    grant = await granted(database, worst=1_000)
    caps = {account.name: account.cap for account in EUR}
    rest = Hold("acme", "rest", "run", "content", "title", caps, "EUR", 998_500)
    await Books(database, lambda: NOON).reserve(rest, EUR)
    errors = []
    for attempt in range(1, 16):
        with pytest.raises((TierUnavailable, BudgetExceeded)) as caught:
            await ask(answerer, grant, attempt=attempt)
        errors.append(type(caught.value))
        held, spent = await booked(database)
        assert held + spent <= EUR[0].cap
    assert errors[0] is TierUnavailable
    assert errors[-1] is BudgetExceeded
    assert len(scripted.prompts) == errors.count(TierUnavailable)


async def test_an_attempt_that_was_refused_money_is_not_counted_as_one_that_died(database):
    answerer, _ = shipped(database, [AWAY] * 100)
    grant = await granted(database, worst=100)
    caps = {account.name: account.cap for account in EUR}
    rest = Hold("acme", "rest", "run", "content", "title", caps, "EUR", 999_900)
    await Books(database, lambda: NOON).reserve(rest, EUR)
    for attempt in (2, 3, 4):
        with pytest.raises(BudgetExceeded):
            await ask(answerer, grant, attempt=attempt)
    first_alone = (await booked(database))[1]
    assert 0 < first_alone < 1_000
