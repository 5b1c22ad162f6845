import asyncio

import pytest

from activities.services.admission import CUT_SECONDS, Admission
from activities.services.breaker import (
    CONNECTS,
    MOST_OPEN_SECONDS,
    OPEN_SECONDS,
    SAMPLES,
    STEP,
    Breaker,
    Breakers,
    Pass,
    Sign,
    sign_of,
    sign_of_error,
)
from models.errors import CredentialsRejected, InvalidInput, OutputInvalid, RateLimited, TierUnavailable
from models.inference import Attempt, Ending, TimeLimit


class Ticks:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def ticks():
    return Ticks()


@pytest.fixture
def breaker(ticks):
    return Breaker(ticks, lambda: 1.0)


def opened(breaker):
    for _ in range(CONNECTS):
        breaker.saw(Sign.UNREACHED)
    assert breaker.ask() is Pass.STOP
    return breaker


@pytest.mark.parametrize("sign", [Sign.PRESSURE, Sign.NOTHING, Sign.BROKEN_SCHEMA])
def test_no_amount_of_pressure_or_bad_requests_opens_it(breaker, sign):
    for _ in range(10_000):
        breaker.saw(sign)
    assert breaker.ask() is Pass.GO
    assert breaker.openings == 0


def test_half_of_twenty_failing_opens_it_and_not_one_less(breaker):
    for number in range(SAMPLES - 1):
        breaker.saw(Sign.FAULT if number % 2 else Sign.GOOD)
    assert breaker.ask() is Pass.GO
    breaker.saw(Sign.FAULT)
    assert breaker.ask() is Pass.STOP


def test_failures_of_long_ago_are_forgotten(breaker, ticks):
    for _ in range(SAMPLES - 1):
        breaker.saw(Sign.FAULT)
    ticks.now += 31
    breaker.saw(Sign.FAULT)
    assert breaker.ask() is Pass.GO


def test_five_connections_that_fail_in_a_row_open_it(breaker):
    for _ in range(3):
        for _ in range(CONNECTS - 1):
            breaker.saw(Sign.UNREACHED)
        breaker.saw(Sign.GOOD)
    assert breaker.ask() is Pass.GO
    opened(breaker)


def test_one_probe_at_a_time_and_only_after_the_pause(breaker, ticks):
    opened(breaker)
    ticks.now += OPEN_SECONDS - 0.01
    assert breaker.ask() is Pass.STOP
    ticks.now += 0.02
    assert [breaker.ask() for _ in range(3)] == [Pass.PROBE, Pass.STOP, Pass.STOP]


def test_a_cancelled_probe_leaves_the_next_call_to_probe(breaker, ticks):
    opened(breaker)
    ticks.now += OPEN_SECONDS
    assert breaker.ask() is Pass.PROBE
    breaker.abandoned()
    assert breaker.ask() is Pass.PROBE


def test_a_failed_probe_doubles_the_pause_up_to_a_minute(breaker, ticks):
    opened(breaker)
    for pause in (5, 10, 20, 40, 60, 60):
        ticks.now += pause - 0.01
        assert breaker.ask() is Pass.STOP
        ticks.now += 0.01
        assert breaker.ask() is Pass.PROBE
        breaker.probed(alive=False)
    assert MOST_OPEN_SECONDS == 60


def test_jitter_shortens_the_pause_by_half_at_most(ticks):
    hasty = opened(Breaker(ticks, lambda: 0.0))
    ticks.now += OPEN_SECONDS / 2
    assert hasty.ask() is Pass.PROBE


def test_stragglers_that_fail_extend_the_pause_and_good_ones_do_not_end_it(breaker, ticks):
    opened(breaker)
    ticks.now += 4
    breaker.saw(Sign.GOOD)
    assert breaker.ask() is Pass.STOP
    breaker.saw(Sign.FAULT)
    ticks.now += 2
    assert breaker.ask() is Pass.STOP


def test_after_a_probe_traffic_comes_back_in_steps(breaker, ticks):
    opened(breaker)
    ticks.now += OPEN_SECONDS
    assert breaker.ask() is Pass.PROBE
    breaker.probed(alive=True)
    shares = []
    for _ in range(4):
        assert breaker.ask() is Pass.GO
        shares.append(breaker.share)
        for _ in range(STEP):
            breaker.saw(Sign.GOOD)
    assert shares == [10, 25, 50, 100]


def test_one_failure_while_traffic_comes_back_opens_it_again(breaker, ticks):
    opened(breaker)
    ticks.now += OPEN_SECONDS
    breaker.ask()
    breaker.probed(alive=True)
    breaker.saw(Sign.FAULT)
    assert breaker.ask() is Pass.STOP
    assert breaker.openings == 2


def test_endpoints_models_and_ways_of_asking_have_breakers_of_their_own(ticks):
    breakers = Breakers(ticks, lambda: 1.0)
    opened(breakers.of("edge", "a", "json"))
    assert breakers.of("edge", "a", "text").ask() is Pass.GO
    assert breakers.of("edge", "b", "json").ask() is Pass.GO
    assert breakers.is_open("edge")
    assert not breakers.is_open("large")
    assert breakers.openings() == 1


@pytest.mark.parametrize(
    ("ending", "more", "sign"),
    [
        (Ending.OK, {}, Sign.GOOD),
        (Ending.TRUNCATED, {}, Sign.GOOD),
        (Ending.OVERLOADED, {}, Sign.PRESSURE),
        (Ending.INVALID_REQUEST, {}, Sign.NOTHING),
        (Ending.TOO_LONG, {}, Sign.NOTHING),
        (Ending.AUTH, {}, Sign.NOTHING),
        (Ending.CANCELLED, {}, Sign.NOTHING),
        (Ending.SCHEMA_VIOLATED, {}, Sign.BROKEN_SCHEMA),
        (Ending.BACKEND_FAULT, {}, Sign.FAULT),
        (Ending.BACKEND_FAULT, {"sent": False}, Sign.UNREACHED),
        (Ending.INCOMPLETE, {}, Sign.FAULT),
        (Ending.TIMEOUT, {"limit": TimeLimit.CONNECT}, Sign.UNREACHED),
        (Ending.TIMEOUT, {"limit": TimeLimit.FIRST_TOKEN}, Sign.FAULT),
        (Ending.TIMEOUT, {"limit": TimeLimit.IDLE}, Sign.FAULT),
        (Ending.TIMEOUT, {"limit": TimeLimit.TOTAL}, Sign.NOTHING),
    ],
)
def test_every_ending_has_its_sign(ending, more, sign):
    attempt = Attempt(tier="edge", ending=ending, **more)
    assert sign_of(attempt) is sign
    assert sign_of_error(TierUnavailable("edge: away", attempt.model_dump(mode="json"))) is sign


def test_an_error_without_an_attempt_is_told_by_its_type_and_never_by_its_text():
    errors = (RateLimited, OutputInvalid, TierUnavailable, InvalidInput, CredentialsRejected, ValueError)
    said = [sign_of_error(error("503 overloaded, connection refused")) for error in errors]
    assert said == [Sign.PRESSURE, Sign.BROKEN_SCHEMA, Sign.FAULT, *[Sign.NOTHING] * 3]


def test_of_ever_new_schemas_only_so_many_breakers_are_kept_and_none_that_has_something_to_say(ticks):
    breakers = Breakers(ticks, lambda: 1.0, most=8)
    opened(breakers.of("schema of edge", "m", "bad"))
    breakers.of("schema of edge", "m", "shaky").saw(Sign.UNREACHED)
    for number in range(20):
        breakers.of("schema of edge", "m", str(number)).saw(Sign.GOOD)
    assert len(breakers._breakers) == 8
    assert breakers.of("schema of edge", "m", "bad").ask() is Pass.STOP
    for _ in range(CONNECTS - 1):
        breakers.of("schema of edge", "m", "shaky").saw(Sign.UNREACHED)
    assert breakers.of("schema of edge", "m", "shaky").is_open
    for number in range(8):
        opened(breakers.of("edge", str(number)))
    assert len(breakers._breakers) == 8
    assert breakers.openings() == 10


async def test_a_door_lets_in_as_many_as_there_is_room_for_in_order(ticks):
    door, entered, go = Admission(2, ticks), [], asyncio.Event()

    async def call(number):
        async with door.entered():
            entered.append(number)
            await go.wait()

    calls = [asyncio.create_task(call(number)) for number in range(5)]
    while door.queue < 3:
        await asyncio.sleep(0)
    assert (entered, door.busy) == ([0, 1], 2)
    go.set()
    await asyncio.gather(*calls)
    assert (entered, door.busy) == ([0, 1, 2, 3, 4], 0)


def test_pressure_halves_the_room_once_a_moment_and_good_answers_grow_it_back(ticks):
    door = Admission(8, ticks)
    for _ in range(5):
        door.pressed()
    assert door.room == 4
    ticks.now += CUT_SECONDS
    door.pressed()
    assert door.room == 2
    for _ in range(5):
        ticks.now += CUT_SECONDS
        door.pressed()
    assert door.room == 1
    for _ in range(200):
        door.good()
    assert door.room == 8


async def test_whoever_stops_waiting_takes_no_place_with_them(ticks):
    door = Admission(1, ticks)
    async with door.entered():
        waiting = [asyncio.create_task(_through(door)) for _ in range(3)]
        while door.queue < 3:
            await asyncio.sleep(0)
        waiting[0].cancel()
    waiting[1].cancel()
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert done[2] == "in"
    assert (door.busy, door.queue) == (0, 0)


async def _through(door):
    async with door.entered():
        return "in"
