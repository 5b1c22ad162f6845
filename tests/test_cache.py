import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from activities.services.cache import CACHE, FRESH, Cache, Scope, key_of, put_in, sweep_in
from activities.services.database import Database
from activities.services.leases import Leases
from activities.services.tidying import keep_tidy
from models.errors import DeadlineMissed
from models.inference import Answered, DataClass, Message, Prompt
from models.loop import Ref
from tests.databases import migrated
from tests.test_cli import offline, run

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
PROMPT = Prompt(messages=(Message(role="user", content="hello"),))
REF = Ref(digest="a" * 64, size=3)
ANSWER = Answered(text=REF, tier="edge", model="m")
SCOPE = Scope("acme", DataClass.INTERNAL, None, "p", "edge", "m", "draft")


class Clock:
    now = NOON

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def cache(database, clock):
    return Cache(database, clock)


async def put(database, key, seconds=60, task="draft"):
    until = NOON + timedelta(seconds=seconds)
    await database.write(lambda link: put_in(link, key, ANSWER, task, until))


async def test_an_identical_call_gets_the_same_answer_marked_as_cached(cache, database):
    key = key_of(SCOPE, PROMPT)
    assert await cache.get(key) is None
    await put(database, key)
    assert await cache.get(key) == ANSWER.model_copy(update={"cached": True})


@pytest.mark.parametrize(
    "other",
    [
        Scope("other", DataClass.INTERNAL, None, "p", "edge", "m", "draft"),
        Scope("acme", DataClass.PERSONAL, None, "p", "edge", "m", "draft"),
        Scope("acme", DataClass.INTERNAL, "eu", "p", "edge", "m", "draft"),
        Scope("acme", DataClass.INTERNAL, None, "q", "edge", "m", "draft"),
        Scope("acme", DataClass.INTERNAL, None, "p", "large", "m", "draft"),
        Scope("acme", DataClass.INTERNAL, None, "p", "edge", "n", "draft"),
        Scope("acme", DataClass.INTERNAL, None, "p", "edge", "m", "title"),
    ],
)
def test_another_tenant_class_region_policy_tier_model_or_task_is_another_key(other):
    assert key_of(other, PROMPT) != key_of(SCOPE, PROMPT)


@pytest.mark.parametrize(
    "change", [{"temperature": 0.0}, {"seed": 8}, {"answer_schema": {"type": "object"}}, {"max_tokens": 9}]
)
def test_another_schema_or_sampling_is_another_key(change):
    assert key_of(SCOPE, PROMPT.model_copy(update=change)) != key_of(SCOPE, PROMPT)


async def test_an_entry_ends_at_its_time(cache, database, clock):
    key = key_of(SCOPE, PROMPT)
    await put(database, key)
    assert await cache.get(key) is not None
    clock.now += timedelta(seconds=60)
    assert await cache.get(key) is None
    assert await database.write(lambda link: sweep_in(link, clock())) == 1


async def test_a_retraction_in_one_process_is_heard_in_another_within_a_second(cache, database, clock):
    key, elsewhere = key_of(SCOPE, PROMPT), Cache(database, clock)
    await put(database, key)
    assert await elsewhere.get(key) is not None
    assert await cache.retract("acme", digest=key[1]) == 1
    assert await cache.get(key) is None
    clock.now += FRESH
    assert await elsewhere.get(key) is None


async def test_a_clock_that_is_set_back_keeps_no_retraction_from_being_heard(cache, database, clock):
    key, elsewhere = key_of(SCOPE, PROMPT), Cache(database, clock)
    await put(database, key)
    assert await elsewhere.get(key) is not None
    clock.now -= timedelta(hours=1)
    assert await cache.retract("acme", digest=key[1]) == 1
    assert await elsewhere.get(key) is None


async def test_a_command_takes_the_answers_to_a_task_back(tmp_path):
    settings = offline(tmp_path)
    migrated(settings.database_url)
    database = Database(settings.database_url)
    try:
        for task, prompt in (("draft", PROMPT), ("title", PROMPT.model_copy(update={"max_tokens": 7}))):
            key = key_of(Scope("default", DataClass.INTERNAL, None, "p", "edge", "m", task), prompt)
            await put(database, key, task=task)
        said = await asyncio.to_thread(run, settings, "route", "retract", "--task", "draft", "--json")
        assert json.loads(said.stdout) == {"retracted": 1}
        assert "name one task" in (await asyncio.to_thread(run, settings, "route", "retract")).output
        said = await asyncio.to_thread(run, settings, "route", "retract", "--all", "--json")
        assert json.loads(said.stdout) == {"retracted": 1}
    finally:
        database.close()


async def test_a_retraction_reaches_only_the_tenant_and_task_it_names(cache, database):
    other = key_of(Scope("other", DataClass.INTERNAL, None, "p", "edge", "m", "draft"), PROMPT)
    mine, title = key_of(SCOPE, PROMPT), ("acme", "b" * 64)
    for key, task in ((other, "draft"), (mine, "draft"), (title, "title")):
        await put(database, key, task=task)
    assert await cache.retract("acme", task="draft") == 1
    assert await cache.get(mine) is None
    assert await cache.get(other) is not None
    assert await cache.get(title) is not None


class Making:
    def __init__(self):
        self.calls, self.started, self.go, self.ended = 0, asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self):
        self.calls += 1
        self.started.set()
        try:
            await self.go.wait()
            return ANSWER
        finally:
            self.ended.set()


async def test_identical_calls_that_come_together_are_one_call(cache):
    making, key = Making(), key_of(SCOPE, PROMPT)
    calls = [asyncio.create_task(cache.once(key, making)) for _ in range(20)]
    await making.started.wait()
    making.go.set()
    answers = await asyncio.gather(*calls)
    assert making.calls == 1
    assert [answer.cached for answer in answers] == [False, *[True] * 19]


async def test_the_first_giving_up_leaves_the_others_their_answer(cache):
    making, key = Making(), key_of(SCOPE, PROMPT)
    calls = [asyncio.create_task(cache.once(key, making)) for _ in range(3)]
    await making.started.wait()
    calls[0].cancel()
    making.go.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert (answers[1].text, answers[2].text, making.calls) == (REF, REF, 1)


async def test_when_all_give_up_the_call_is_cancelled(cache):
    making, key = Making(), key_of(SCOPE, PROMPT)
    calls = [asyncio.create_task(cache.once(key, making)) for _ in range(3)]
    await making.started.wait()
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await making.ended.wait()
    assert making.calls == 1


async def test_a_failure_is_shared_and_not_kept(cache):
    key = key_of(SCOPE, PROMPT)

    async def failing():
        raise ValueError("no")

    done = await asyncio.gather(*(cache.once(key, failing) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(error, ValueError) for error in done)
    making = Making()
    making.go.set()
    assert await cache.once(key, making) == ANSWER


async def test_a_caller_with_more_time_than_the_first_does_not_share_its_deadline(cache):
    key, making, begun, late = key_of(SCOPE, PROMPT), Making(), asyncio.Event(), asyncio.Event()

    async def short_of_time():
        begun.set()
        await late.wait()
        raise DeadlineMissed("its deadline has passed")

    first = asyncio.create_task(cache.once(key, short_of_time))
    await begun.wait()
    others = [asyncio.create_task(cache.once(key, making)) for _ in range(3)]
    await asyncio.sleep(0)
    late.set()
    making.go.set()
    with pytest.raises(DeadlineMissed):
        await first
    answers = await asyncio.gather(*others)
    assert [answer.text for answer in answers] == [REF] * 3
    assert making.calls == 1
    assert sum(not answer.cached for answer in answers) == 1


async def test_expired_answers_are_swept_away_until_the_loop_is_told_to_stop(database, clock):
    await put(database, key_of(SCOPE, PROMPT), seconds=1)
    await put(database, key_of(SCOPE, PROMPT.model_copy(update={"seed": 8})), seconds=3600)
    clock.now += timedelta(seconds=2)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def last_look():
        loop.call_soon_threadsafe(stop.set)
        return clock()

    await keep_tidy(database, last_look, Leases(database, "one", clock), stop, pause=3600)
    with database.engine.connect() as link:
        assert len(link.execute(select(CACHE)).all()) == 1


async def test_only_one_process_sweeps_and_a_fault_does_not_end_the_loop(database, clock):
    await put(database, key_of(SCOPE, PROMPT), seconds=-1)
    assert await Leases(database, "other", clock).take("cache sweeper", timedelta(hours=1)) is not None
    stop = asyncio.Event()
    taken = asyncio.Event()

    class Broken(Leases):
        tries = 0

        async def take(self, name, lifetime):
            self.tries += 1
            if self.tries == 1:
                raise OSError("the disk is full")
            epoch = await super().take(name, lifetime)
            taken.set()
            return epoch

    task = asyncio.create_task(keep_tidy(database, clock, Broken(database, "one", clock), stop, pause=0.01))
    await taken.wait()
    stop.set()
    await task
    with database.engine.connect() as link:
        assert len(link.execute(select(CACHE)).all()) == 1
