"""Short-term answers: never stale, made once, bounded, measured."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from activities.services.short_term import Key, ShortTerm

NOW = datetime(2026, 5, 1, tzinfo=UTC)


class Clock:
    now = NOW

    def __call__(self) -> datetime:
        return self.now


class Source:
    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self) -> int:
        self.calls += 1
        await asyncio.sleep(0)
        return self.calls


def key(version: int = 1, subject: str = "sku-1", tenant: str = "default") -> Key:
    return Key(tenant, subject, version, "summary")


def cache(capacity: int = 10) -> tuple[ShortTerm, Clock]:
    clock = Clock()
    return ShortTerm(capacity, timedelta(minutes=5), clock), clock


async def test_an_answer_is_made_once_per_belief_version_and_tenant():
    short, _ = cache()
    source = Source()
    assert [await short.get(key(), source) for _ in range(3)] == [1, 1, 1]
    assert await short.get(key(version=2), source) == 2
    assert await short.get(key(tenant="other"), source) == 3
    assert (short.rate.hits, short.rate.misses, short.rate.permille) == (2, 3, 400)


async def test_many_who_ask_at_once_cause_one_computation():
    short, _ = cache()
    source = Source()
    assert await asyncio.gather(*(short.get(key(), source) for _ in range(20))) == [1] * 20


async def test_who_gives_up_while_making_an_answer_takes_nobody_else_with_it():
    short, _ = cache()
    never = asyncio.Event()
    first = asyncio.create_task(short.get(key(), never.wait))
    await asyncio.sleep(0)
    source = Source()
    others = [asyncio.create_task(short.get(key(), source)) for _ in range(3)]
    leaving = asyncio.create_task(short.get(key(), source))
    await asyncio.sleep(0)
    leaving.cancel()
    first.cancel()
    assert await asyncio.gather(*others) == [1, 1, 1]
    assert await asyncio.gather(first, leaving, return_exceptions=True) != [1, 1]
    assert first.cancelled() and leaving.cancelled()
    assert (short.rate.hits, short.rate.misses) == (2, 2)


async def test_an_answer_ends_with_its_time_to_live():
    short, clock = cache()
    source = Source()
    await short.get(key(), source)
    clock.now = NOW + timedelta(minutes=5)
    assert await short.get(key(), source) == 2
    assert short.held() == (key(),)
    clock.now = NOW + timedelta(minutes=10)
    assert (short.held(), len(short)) == ((), 0)


async def test_the_least_used_answer_gives_way():
    short, _ = cache(capacity=2)
    source = Source()
    for version in (1, 2, 1, 3):
        await short.get(key(version), source)
    assert len(short) == 2
    assert await short.get(key(1), source) == 1
    assert await short.get(key(2), source) == 4


async def test_a_failure_is_told_to_everybody_who_waits_and_not_kept():
    short, _ = cache()
    source = Source()

    async def fails() -> int:
        await asyncio.sleep(0)
        raise ValueError("away")

    answers = await asyncio.gather(*(short.get(key(), fails) for _ in range(3)), return_exceptions=True)
    assert [str(one) for one in answers] == ["away"] * 3
    with pytest.raises(ValueError, match="away"):
        await short.get(key(), fails)
    assert await short.get(key(), source) == 1


async def test_warming_makes_what_is_missing_and_is_not_counted_as_asking():
    short, _ = cache()
    source = Source()
    assert await short.warm([(key(1), source), (key(2), source)]) == 2
    assert await short.warm([(key(1), source), (key(3), source)]) == 1
    assert await short.get(key(1), source) == 1
    assert (short.rate.hits, short.rate.misses, short.rate.warmed) == (1, 0, 3)


async def test_a_subject_is_forgotten_in_all_its_versions():
    short, _ = cache()
    source = Source()
    for version in (1, 2):
        await short.get(key(version), source)
    await short.get(key(1, subject="sku-2"), source)
    assert short.holds("default", "sku-1") == 2
    assert short.drop("default", "sku-1") == 2
    assert (short.holds("default", "sku-1"), len(short)) == (0, 1)
    assert short.rate.permille == 0 and cache()[0].rate.permille is None
