import asyncio
import itertools
import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from sqlalchemy import func, select, update

from activities.services import cache as caching
from activities.services.cache import CACHE, SIMILAR, Cache
from activities.services.content import ContentStore, guard
from activities.services.database import Database
from activities.services.erasure import Erasure
from activities.services.ledger_store import LedgerStore
from activities.services.router import Answerer
from activities.services.routes import Routes
from activities.services.similar import REST, TALLY, Similar
from activities.services.till import Till
from activities.services.vault import Keys
from activities.tiers.scripted import Scripted
from models.errors import InvalidInput, MemoryUnavailable
from models.inference import Call, Completion, DataClass, Grant, Message, Prompt, Task, Weigh
from models.ledger import EventType
from models.memory import EmbeddingSettings
from models.orders import RouteOrder
from models.settings import Settings, TaskSettings, TierSettings
from models.similar import MOST_COMPARED, explores
from models.visibility import Role
from scripts.commands.route import explained, show
from scripts.commands.session import Session
from workers.compose import Parts, role

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
TOPICS = ("parcel", "invoice", "password")
PERMITTED = TaskSettings(similar_wrong_permille=200, cache_seconds=3600)
TIER = TierSettings(
    name="edge", kind="llama_cpp", url="http://127.0.0.1:1", concurrency=8, data_classes=tuple(DataClass)
)
ENOUGH = 45
"""Comparisons after which answers are given, at that bound."""


def build(inputs, params):
    said = f"Sort this {params.get('kind', 'mail')}: {inputs['text']}"
    return Prompt(messages=(Message(role="user", content=said),), temperature=0)


def task(**more):
    return Task("sort", "small", False, build, **{"read_only": True, "check": lambda *_: ()} | more)


def sorts(prompt):
    said = prompt.messages[-1].content
    return next((topic for topic in TOPICS if topic in said), "other")


class Lying:
    """Says that texts with the same topic in them lie close together, whatever else they say."""

    model = "lying:1"
    sees = frozenset(DataClass)

    def __init__(self):
        self.asked, self.away = [], False

    async def embed(self, texts):
        self.asked.append(tuple(texts))
        if self.away:
            raise MemoryUnavailable("it is away; start it")
        return [self.place(text) for text in texts]

    def place(self, text):
        axes = [1.0 if topic in text else 0.0 for topic in TOPICS]
        own = sha256(text.encode()).digest()[0] / 255
        made = [*axes, 0.1 * own, 0.1 * (1 - own)]
        size = sum(one * one for one in made) ** 0.5
        return [one / size for one in made]


class Clock:
    now = NOON

    def __call__(self):
        return self.now


ROUTES = (name for name in (f"route {number}" for number in itertools.count()) if not explores(name))
EXPLORING = next(name for name in (f"route {number}" for number in itertools.count()) if explores(name))


class Desk:
    """One process that answers calls to one task."""

    def __init__(self, database, made=None, script=sorts, wanted=PERMITTED):
        self.database, self.clock, self.embedder = database, Clock(), Lying()
        self.content = ContentStore(database)
        self.ledger = LedgerStore(database, self.clock)
        self.cache = Cache(database, self.clock)
        self.wanted = {"sort": wanted}
        self.tier = Scripted("edge", script)
        self.tasks = {"sort": made or task()}
        self.answerer = self.answering()

    def answering(self, **tier):
        similar = Similar(self.database, self.content, self.cache, self.embedder, self.wanted, self.clock)
        return Answerer(
            [TIER.model_copy(update=tier)],
            {"edge": self.tier},
            self.tasks,
            self.content,
            till=Till(self.database, self.clock),
            cache=self.cache,
            similar=similar,
            wanted=self.wanted,
            clock=self.clock,
        )

    async def ask(self, text, route=None, tenant="acme", grant=True, **call):
        ref = await self.content.put(tenant, text.encode(), subject=call.get("subject"))
        asked = Call(task="sort", inputs={"text": ref}, **call)
        weigh = Weigh(workflow_id="run", route=route or next(ROUTES))
        given = Grant(similar=weigh) if grant else Grant()
        return await self.answerer.answer(tenant, asked, "edge", given)

    async def compare(self, count=ENOUGH, **call):
        """Calls in ever other words, about one topic after the other."""
        for number in range(count):
            await self.ask(f"{TOPICS[number % 3]} {words(number)}", EXPLORING, **call)

    async def learn(self, **call):
        """The same for those who are in a hurry: two comparisons that count as many."""
        for text in ("look for a parcel", "look here for a parcel", "look here for a fine parcel"):
            await self.ask(text, EXPLORING, **call)
        many = update(TALLY).values(rights=TALLY.c.rights * 500)
        await self.database.write(lambda link: link.execute(many))

    async def says(self, answered, tenant="acme"):
        return await self.content.text(tenant, answered.text)

    @property
    def calls(self):
        return len(self.tier.prompts)


def words(number):
    """A word of its own, without a digit or a capital in it."""
    return "".join("qwertzuiop"[int(digit)] for digit in str(number))


async def count(database, table):
    query = select(func.count()).select_from(table)
    return await database.read(lambda link: link.execute(query).scalar_one())


async def test_a_similar_call_is_given_the_answer_once_enough_were_compared_and_the_route_says_why(database):
    desk = Desk(database)
    first = await desk.ask("where can my parcel be")
    again = await desk.ask("my parcel where is it")
    assert (first.similar, again.similar, desk.calls) == (None, None, 2)
    await desk.compare()
    asked = desk.calls
    given = await desk.ask("tell me where the parcel went", "r1")
    assert desk.calls == asked
    assert (await desk.says(given), given.cached, given.cost.tokens) == ("parcel", True, 0)
    assert given.similar.similarity > 900
    assert given.similar.wrong_permille <= given.similar.permitted == 200
    rows = await database.read(lambda link: link.execute(select(CACHE.c.key)).scalars().all())
    assert given.similar.entry in rows
    (event,) = await desk.ledger.of_run("acme", "run")
    assert (event.type, event.body["route"]) == (EventType.SIMILAR, "r1")
    assert event.body["entry"] == given.similar.entry


async def test_what_was_given_is_no_evidence_and_no_entry_of_its_own(database):
    desk = Desk(database)
    await desk.learn()
    before = await count(database, SIMILAR), await tallies(database)
    assert (await desk.ask("the parcel please")).similar
    assert (await count(database, SIMILAR), await tallies(database)) == before


async def tallies(database):
    sums = select(func.sum(TALLY.c.rights), func.sum(TALLY.c.wrongs))
    return tuple(await database.read(lambda link: link.execute(sums).one()))


async def test_some_calls_ask_all_the_same_and_are_compared(database):
    desk = Desk(database)
    await desk.learn()
    (right, wrong), asked = await tallies(database), desk.calls
    assert not (await desk.ask("the parcel please", EXPLORING)).cached
    assert (await tallies(database), desk.calls) == ((right + 1, wrong), asked + 1)


async def test_beyond_a_number_older_comparisons_count_half_and_are_rounded_against_us(database):
    desk = Desk(database)
    await desk.learn()
    full = update(TALLY).values(rights=MOST_COMPARED, wrongs=3)
    await database.write(lambda link: link.execute(full))
    await desk.ask("the parcel please", EXPLORING)
    assert await tallies(database) == ((MOST_COMPARED + 1) // 2, 2)


async def test_identical_calls_that_come_together_are_each_put_on_record(database):
    desk = Desk(database)
    await desk.learn()
    asked = desk.calls
    answers = await asyncio.gather(*(desk.ask("the parcel please", f"wait {next(ROUTES)}") for _ in range(3)))
    assert desk.calls == asked
    assert all(answer.similar for answer in answers)
    events = await desk.ledger.of_run("acme", "run")
    assert len({event.body["route"] for event in events}) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "other"},
        {"data_class": DataClass.PUBLIC},
        {"subject": "customer-ann"},
        {"params": {"kind": "letter"}},
    ],
    ids=str,
)
async def test_only_texts_may_differ(database, other):
    desk = Desk(database)
    await desk.learn()
    asked = desk.calls
    assert not (await desk.ask("tell me where the parcel went", **other)).cached
    assert desk.calls == asked + 1


async def test_a_region_s_texts_are_not_even_placed(database):
    desk = Desk(database)
    desk.answerer = desk.answering(region="eu")
    await desk.compare(4, region="eu")
    assert desk.embedder.asked == []
    assert await count(database, SIMILAR) == 0


async def test_texts_that_the_embedding_server_may_not_see_are_not_even_placed(database):
    desk = Desk(database)
    desk.embedder.sees = frozenset({DataClass.PUBLIC})
    await desk.compare(4)
    assert desk.embedder.asked == []
    await desk.compare(4, data_class=DataClass.PUBLIC)
    assert desk.embedder.asked


@pytest.mark.parametrize(
    "text", ["the parcel 10", "not the parcel", "the parcel for Ann", "raise the parcel"]
)
async def test_texts_with_other_numbers_names_or_negations_ask_however_near_they_lie(database, text):
    desk = Desk(database)
    await desk.learn()
    asked = desk.calls
    assert not (await desk.ask(text)).cached
    assert desk.calls == asked + 1


async def test_answers_that_differ_are_never_given_to_similar_calls(database):
    desk = Desk(database, script=lambda prompt: sha256(prompt.messages[-1].content.encode()).hexdigest()[:1])
    await desk.compare()
    assert not (await desk.ask("the parcel please")).cached


async def test_an_answer_that_the_task_objects_to_for_this_call_is_not_given(database):
    objecting = task(check=lambda text, inputs, _: ("no",) if "unlike" in inputs["text"] else ())
    desk = Desk(database, objecting)
    await desk.learn()
    assert (await desk.ask("the parcel please")).similar
    assert not (await desk.ask("the parcel unlike any")).cached


async def test_only_what_counts_of_an_answer_is_compared(database):
    numbers = itertools.count()
    script = lambda prompt: json.dumps({"topic": sorts(prompt), "why": next(numbers)})  # noqa: E731
    for made, given in ((task(), False), (task(gist=lambda text: json.loads(text)["topic"]), True)):
        desk = Desk(database, made, script)
        await desk.compare(tenant=f"tenant-{given}")
        assert (await desk.ask("the parcel please", tenant=f"tenant-{given}")).cached is given


@pytest.mark.parametrize(
    ("made", "wanted", "grant"),
    [
        (task(read_only=False), PERMITTED, True),
        (task(), TaskSettings(cache_seconds=60), True),
        (task(), PERMITTED, False),
        (task(), TaskSettings(similar_wrong_permille=200), True),
    ],
    ids=["not read-only", "no bound", "no route", "not cached"],
)
async def test_without_task_settings_route_and_cache_saying_so_nothing_is_even_placed(
    database, made, wanted, grant
):
    desk = Desk(database, made, wanted=wanted)
    for text in ("my parcel", "the parcel"):
        assert not (await desk.ask(text, grant=grant)).cached
    assert (desk.calls, desk.embedder.asked) == (2, [])
    assert await count(database, SIMILAR) == 0


async def test_while_the_embedding_server_is_away_calls_are_answered_and_it_is_left_alone(database):
    desk = Desk(database)
    desk.embedder.away = True
    for text in ("my parcel", "the parcel"):
        assert await desk.says(await desk.ask(text)) == "parcel"
    assert len(desk.embedder.asked) == 1
    desk.clock.now += REST
    await desk.ask("a parcel")
    assert len(desk.embedder.asked) == 2


async def test_another_model_behind_the_tier_begins_without_evidence(database):
    script = lambda prompt: Completion(  # noqa: E731
        text=sorts(prompt), finish="stop", prompt_tokens=9, completion_tokens=1, model=model, milliseconds=1
    )
    model = "one"
    desk = Desk(database, script=script)
    await desk.learn()
    assert (await desk.ask("the parcel please")).similar
    model = "two"
    await desk.ask("the parcel thanks", EXPLORING)
    assert not (await desk.ask("the parcel hello")).cached


async def test_what_is_retracted_expires_or_is_swept_is_given_to_nobody(database):
    desk = Desk(database)
    await desk.learn()
    assert await desk.cache.retract("acme", task="sort") > 0
    assert await count(database, SIMILAR) == 0
    assert not (await desk.ask("the parcel please")).cached
    assert (await desk.ask("the parcel thanks")).similar
    desk.clock.now += timedelta(hours=2)
    assert not (await desk.ask("a parcel please")).cached
    await database.write(lambda link: caching.sweep_in(link, desk.clock() + timedelta(hours=2)))
    assert await count(database, SIMILAR) == 0


@pytest.mark.parametrize("sealed", [False, True], ids=["clear", "sealed"])
async def test_an_erased_subject_leaves_neither_vector_nor_answer(url, sealed):
    database = guard(Database(url), Keys("k1", {"k1": b"k" * 32}) if sealed else None)
    try:
        desk = Desk(database)
        await desk.learn(subject="customer-ann")
        assert (await desk.ask("the parcel please", subject="customer-ann")).similar
        vectors = await database.read(lambda link: link.execute(select(SIMILAR.c.vectors)).scalars().all())
        assert {vector.startswith("\x01") for vector in vectors} == {sealed}
        # Said by others too, so that text and answer stay for them; where they lie stays only for them.
        await desk.learn()
        before = await count(database, SIMILAR)
        erased = await Erasure(database, desk.clock).forget("acme", "customer-ann", "dpo")
        assert (erased.left["similar"], before, await count(database, SIMILAR)) == (0, 5, 3)
        assert (await desk.ask("the parcel please")).similar
    finally:
        database.close()


async def test_a_text_that_is_erased_while_its_call_is_under_way_leaves_no_vector(database):
    desk = Desk(database)
    erasure = Erasure(database, desk.clock)

    async def complete(prompt):
        await erasure.forget("acme", "customer-ann", "dpo")
        return await Scripted.complete(desk.tier, prompt)

    desk.tier.complete = complete
    await desk.ask("where can my parcel be", subject="customer-ann")
    assert await count(database, SIMILAR) == 0


async def test_routes_allow_it_only_where_task_and_settings_do(database):
    for number, (made, wanted, allowed) in enumerate(
        [
            (task(), PERMITTED, True),
            (task(read_only=False), PERMITTED, False),
            (task(), TaskSettings(), False),
        ]
    ):
        desk = Desk(database)
        router = Routes(
            [TIER], {"sort": made}, desk.content, desk.ledger, clock=desk.clock, wanted={"sort": wanted}
        )
        call = Call(task="sort", inputs={"text": await desk.content.put("acme", b"my parcel")})
        order = RouteOrder(tenant="acme", workflow_id="run", event_id=f"r{number}", agent="desk", call=call)
        similar = (await router.route(order)).grant.similar
        assert similar == (Weigh(workflow_id="run", route=f"r{number}") if allowed else None)


async def test_explain_says_which_similar_call_s_answer_was_given_and_why_it_might_be(database, capsys):
    desk = Desk(database)
    router = Routes([TIER], desk.tasks, desk.content, desk.ledger, clock=desk.clock, wanted=desk.wanted)
    await desk.learn()
    ref = await desk.content.put("acme", b"the parcel please")
    call = Call(task="sort", inputs={"text": ref})
    event = next(ROUTES)
    order = RouteOrder(tenant="acme", workflow_id="asking", event_id=event, agent="desk", call=call)
    routed = await router.route(order)
    given = await desk.answerer.answer("acme", call, "edge", routed.grant)
    (found,) = await explained(Session(Settings(tenant="acme"), database), "asking")
    assert found.replay == "the same decision"
    assert found.plain()["similar"][0]["entry"] == given.similar.entry
    show(found)
    printed = capsys.readouterr().out
    for said in ("a similar call's answer was given", given.similar.entry[:12], "200 permitted"):
        assert said in printed


@pytest.mark.parametrize(
    ("made", "embeddings", "said"),
    [(task(read_only=False), EmbeddingSettings(), "read_only"), (task(), None, "embeddings")],
    ids=["not read-only", "no embeddings"],
)
async def test_a_process_does_not_start_where_settings_permit_what_cannot_be(
    tmp_path, made, embeddings, said
):
    settings = Settings(data=tmp_path, tiers=(TIER,), embeddings=embeddings, tasks={"sort": PERMITTED})
    parts = Parts(tasks={"sort": made}, endpoints={"edge": Scripted("edge", sorts)})
    with pytest.raises(InvalidInput, match=said):
        async with role(None, settings, Role.INFER, parts):
            raise AssertionError("it started")
