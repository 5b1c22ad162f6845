"""Exact search: what the fast path returns is what a slow, obviously right one returns."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, update

from activities.services.database import Database
from activities.services.leases import Leases
from activities.services.vectors import (
    EMBEDDING,
    MEMORY,
    ExactVectors,
    Vector,
    When,
    empty_vectors,
    put_vectors,
    touch_vectors,
    unit_vector,
)
from activities.services.weaviate_store import WeaviateVectors, connected
from models.errors import InvalidInput
from models.tables import NEVER
from tests import real_weaviate
from tests.databases import migrated

MODEL = "test-model"


def unit(*values: float) -> Vector:
    vector = np.array(values)
    return unit_vector(vector / np.linalg.norm(vector), len(values))


def add_memory(connection, tenant: str, record_id: str, kind: str, recorded_at: int, position: int) -> None:
    blank = dict(title="", text_digest="", text_size=0, media_type="", source="", data_class="internal")
    row = dict(tenant=tenant, record_id=record_id, kind=kind, recorded_at=recorded_at, position=position)
    connection.execute(insert(MEMORY).values(**row, **blank, links="[]"))


def add(database: Database, rows: list[tuple[str, str, str, int, Vector]], start: int = 1) -> None:
    def work(connection) -> None:
        for number, (tenant, record_id, kind, recorded_at, _) in enumerate(rows):
            add_memory(connection, tenant, record_id, kind, recorded_at, start + number)
        put_vectors(
            connection, MODEL, [(tenant, record_id, vector) for tenant, record_id, _, _, vector in rows]
        )

    database.submit(work).result()


def slow_search(
    rows, tenant: str, query: Vector, kinds: tuple[str, ...], limit: int
) -> list[tuple[str, float]]:
    """Correctly rounded cosines of everything, sorted in full."""
    keys = []
    for owner, record_id, kind, recorded_at, vector in rows:
        if owner == tenant and (not kinds or kind in kinds):
            cosine = math.fsum(float(a) * float(b) for a, b in zip(vector, query, strict=True))
            keys.append((-cosine, -recorded_at, record_id))
    return [(record_id, -cosine) for cosine, _, record_id in sorted(keys)[:limit]]


def found(vectors: ExactVectors, tenant: str, query: Vector, kinds: tuple[str, ...] = (), limit: int = 10):
    near = asyncio.run(vectors.nearest(tenant, MODEL, query, kinds, limit))
    return [(one.record_id, one.cosine) for one in near]


# Few distinct coarse values give many exact duplicates and equal sums; the nudges give near ties.
coarse = st.lists(st.integers(-2, 2), min_size=8, max_size=8).filter(any)
nudge = st.sampled_from([0.0, 0.0, 0.0, 1e-7, 3e-7, -1e-7])
record = st.tuples(
    st.sampled_from(["one", "two"]),
    st.sampled_from(["post", "idea", "outcome"]),
    st.integers(0, 3),
    coarse,
    nudge,
)


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(record, max_size=40),
    query=coarse,
    kinds=st.sets(st.sampled_from(["post", "idea", "other"])).map(tuple),
    limit=st.integers(1, 12),
    gone=st.sets(st.integers(0, 39)),
    block_rows=st.integers(1, 50),
)
def test_exact_search_equals_brute_force_with_ties_filters_and_deletions(
    tmp_path_factory, data, query, kinds, limit, gone, block_rows
):
    rows = [
        (
            tenant,
            f"r{number * 7 % 41}",
            kind,
            when,
            unit(*[value + shift * place for place, value in enumerate(raw)]),
        )
        for number, (tenant, kind, when, raw, shift) in enumerate(data)
    ]
    database = Database(migrated(f"sqlite:///{tmp_path_factory.mktemp('search') / 'memory.db'}"))
    try:
        vectors, half = ExactVectors(database, 8, block_rows), len(rows) // 2
        asked = unit(*query)
        add(database, rows[:half])
        assert found(vectors, "one", asked, kinds, limit) == slow_search(
            rows[:half], "one", asked, kinds, limit
        )
        add(database, rows[half:], start=half + 1)
        dead = [row for number, row in enumerate(rows) if number in gone]
        for tenant, record_id, *_ in dead:
            database.submit(lambda c, t=tenant, r=record_id: empty_vectors(c, t, r)).result()
        left = [row for number, row in enumerate(rows) if number not in gone]
        assert found(vectors, "one", asked, kinds, limit) == slow_search(left, "one", asked, kinds, limit)
        fresh = ExactVectors(database, 8)
        assert found(fresh, "two", asked, kinds, limit) == slow_search(left, "two", asked, kinds, limit)
    finally:
        database.close()


def test_near_ties_below_float32_resolution_are_ordered_exactly(database):
    generator = np.random.default_rng(7)
    base = generator.standard_normal(384)
    rows = [
        ("one", f"r{number:03}", "post", number % 3, unit(*(base + 3e-6 * generator.standard_normal(384))))
        for number in range(300)
    ]
    rows += [("one", f"twin{number}", "post", 1, rows[number][4]) for number in range(30)]
    add(database, rows)
    vectors = ExactVectors(database, 384)
    for _ in range(5):
        query = unit(*(base + 0.3 * generator.standard_normal(384)))
        assert found(vectors, "one", query) == slow_search(rows, "one", query, (), 10)


def test_growth_and_compaction_keep_every_answer_right(database):
    generator = np.random.default_rng(3)
    vectors, rows = ExactVectors(database, 16, block_rows=700), []
    for batch in range(5):
        more = [
            ("one", f"r{batch}-{number:04}", "post", 0, unit(*generator.standard_normal(16)))
            for number in range(600)
        ]
        add(database, more, start=len(rows) + 1)
        rows += more
        query = unit(*generator.standard_normal(16))
        assert found(vectors, "one", query) == slow_search(rows, "one", query, (), 10)
    dead, rows = rows[:2000], rows[2000:]
    database.submit(lambda c: [empty_vectors(c, row[0], row[1]) for row in dead]).result()
    assert found(vectors, "one", query) == slow_search(rows, "one", query, (), 10)
    add(database, [("one", "late", "post", 0, query)], start=5001)
    assert found(vectors, "one", query, limit=1)[0][0] == "late"


def test_a_forgotten_newest_position_is_never_used_again(database):
    vectors = ExactVectors(database, 2)
    add(database, [("one", "first", "post", 0, unit(1, 0))])
    assert found(vectors, "one", unit(1, 0)) == [("first", 1.0)]
    database.submit(lambda c: empty_vectors(c, "one", "first")).result()
    add(database, [("one", "second", "post", 0, unit(1, 0))], start=2)
    assert found(vectors, "one", unit(1, 0)) == [("second", 1.0)]


def test_another_process_writing_and_forgetting_is_seen_by_the_next_search(database, url):
    vectors = ExactVectors(database, 2)
    add(database, [("one", "mine", "post", 0, unit(1, 0))])
    assert found(vectors, "one", unit(1, 0)) == [("mine", 1.0)]
    script = """
import sys
from activities.services.database import Database
from activities.services.vectors import empty_vectors, put_vectors, unit_vector
from tests.test_vectors import MODEL, add_memory
database = Database(sys.argv[1])
def work(connection):
    add_memory(connection, "one", "theirs", "post", 1, 2)
    put_vectors(connection, MODEL, [("one", "theirs", unit_vector([1.0, 0.0], 2))])
    empty_vectors(connection, "one", "mine")
database.submit(work).result()
database.close()
"""
    subprocess.run([sys.executable, "-c", script, url], check=True, cwd=Path(__file__).parents[1], timeout=60)
    assert found(vectors, "one", unit(1, 0)) == [("theirs", 1.0)]


def test_searches_and_writes_at_once_never_disagree_with_what_was_committed(database):
    vectors = ExactVectors(database, 2)

    async def write(number: int) -> None:
        def work(connection) -> None:
            add_memory(connection, "one", f"r{number:03}", "post", number, number + 1)
            put_vectors(connection, MODEL, [("one", f"r{number:03}", unit(1, 0))])

        await database.write(work)
        near = await vectors.nearest("one", MODEL, unit(1, 0), (), 50)
        assert f"r{number:03}" in {one.record_id for one in near}

    async def together() -> None:
        await asyncio.gather(*(write(number) for number in range(40)))

    asyncio.run(together())


def test_a_vector_is_written_once_and_only_for_a_record_that_is_there(database):
    add(database, [("one", "mine", "post", 0, unit(1, 0))])
    again = [("one", "mine", unit(0, 1)), ("one", "nobody", unit(0, 1))]
    assert database.submit(lambda c: put_vectors(c, MODEL, again)).result() == 0
    assert found(ExactVectors(database, 2), "one", unit(1, 0)) == [("mine", 1.0)]


@pytest.mark.parametrize(
    "hostile",
    [
        [],
        [1.0],
        [1.0, 0.0, 0.0],
        [[1.0, 0.0]],
        [float("nan"), 1.0],
        [float("inf"), 0.0],
        [0.0, 0.0],
        [3.0, 4.0],
        [1e300, 1e300],
        [10**400, 0],
        ["a", "b"],
        [None, 1.0],
        [1.0] * 100_000,
    ],
)
def test_what_is_no_unit_vector_of_the_right_size_is_refused(database, hostile):
    with pytest.raises(InvalidInput):
        asyncio.run(ExactVectors(database, 2).nearest("one", MODEL, hostile, (), 5))


@pytest.mark.parametrize("stored", [b"\0" * 7, b"\0" * 8, np.array([np.nan, 1], "<f4").tobytes(), b"\0" * 12])
def test_a_broken_stored_vector_is_named_and_gone_once_its_record_is_forgotten(database, stored):
    add(database, [("one", "good", "post", 0, unit(1, 0)), ("one", "bad", "post", 0, unit(1, 0))])
    database.submit(
        lambda c: c.execute(update(EMBEDDING).where(EMBEDDING.c.record_id == "bad").values(vector=stored))
    ).result()
    vectors = ExactVectors(database, 2)
    with pytest.raises(InvalidInput, match="bad"):
        found(vectors, "one", unit(1, 0))
    database.submit(lambda c: empty_vectors(c, "one", "bad")).result()
    assert found(vectors, "one", unit(1, 0)) == [("good", 1.0)]


# One suite for every store: whatever serves search, this is what it promises.


class Stand:
    """A store over one database, with records that count from and until given times."""

    def __init__(self, database: Database, store) -> None:
        self.database, self.store, self.count = database, store, 0

    async def add(self, record_id: str, vector: Vector, tenant: str = "one", **values) -> None:
        self.count += 1
        number = self.count
        row = {"kind": "post", "recorded_at": number} | values

        def work(connection) -> None:
            add_memory(connection, tenant, record_id, row["kind"], row["recorded_at"], number)
            named = (MEMORY.c.tenant == tenant) & (MEMORY.c.record_id == record_id)
            connection.execute(update(MEMORY).where(named).values(**row))
            put_vectors(connection, MODEL, [(tenant, record_id, vector)])

        await self.database.write(work)

    async def change(self, record_id: str, **values) -> None:
        def work(connection) -> None:
            connection.execute(update(MEMORY).where(MEMORY.c.record_id == record_id).values(**values))
            touch_vectors(connection, "one", record_id)

        await self.database.write(work)

    async def found(
        self, query: Vector, *kinds: str, limit: int = 10, tenant: str = "one", **when
    ) -> list[str]:
        near = await self.store.nearest(tenant, MODEL, query, kinds, limit, When(**when))
        return [one.record_id for one in near]


@pytest.fixture(scope="session")
def weaviate_server(tmp_path_factory):
    if not real_weaviate.BINARY.exists():
        pytest.skip(real_weaviate.MISSING)
    server = real_weaviate.Server(tmp_path_factory.mktemp("weaviate"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["exact", pytest.param("weaviate", marks=pytest.mark.real)])
async def stand(request, database):
    if request.param == "exact":
        yield Stand(database, ExactVectors(database, 4))
        return
    server = request.getfixturevalue("weaviate_server")
    leases = Leases(database, "test", lambda: datetime.now(UTC))
    async with connected(server.settings) as client:
        store = WeaviateVectors(database, client, leases, 4)
        await store.rebuild(MODEL)
        yield Stand(database, store)


NORTH, NEAR_NORTH, EAST = unit(1, 0, 0, 0), unit(1, 0.2, 0, 0), unit(0, 1, 0, 0)


async def test_every_store_ranks_by_cosine_and_says_it(stand):
    for record_id, vector in (("east", EAST), ("north", NORTH), ("near", NEAR_NORTH)):
        await stand.add(record_id, vector)
    near = await stand.store.nearest("one", MODEL, NORTH, (), 2)
    assert [one.record_id for one in near] == ["north", "near"]
    assert [one.cosine for one in near] == pytest.approx([1.0, float(NORTH @ NEAR_NORTH)], abs=1e-5)


async def test_every_store_breaks_ties_by_newer_time_then_id(stand):
    for record_id, when in (("c", 1), ("b", 2), ("d", 1), ("a", 1)):
        await stand.add(record_id, NORTH, recorded_at=when)
    assert await stand.found(NORTH) == ["b", "a", "c", "d"]


async def test_every_store_keeps_tenants_kinds_and_agents_apart(stand):
    await stand.add("post", NORTH)
    await stand.add("idea", NORTH, kind="idea")
    await stand.add("owned", NORTH, agent="pricing")
    await stand.add("foreign", NORTH, tenant="two")
    assert sorted(await stand.found(NORTH)) == ["idea", "owned", "post"]
    assert await stand.found(NORTH, "idea") == ["idea"]
    assert await stand.found(NORTH, "unheard") == []
    assert await stand.found(NORTH, tenant="two") == ["foreign"]
    assert await stand.found(NORTH, tenant="nobody") == []
    assert sorted(await stand.found(NORTH, agent="pricing")) == ["idea", "owned", "post"]
    assert sorted(await stand.found(NORTH, agent="content")) == ["idea", "post"]


async def test_every_store_hides_what_has_expired_is_proposed_or_does_not_hold_then(stand):
    await stand.add("lasting", NORTH)
    await stand.add("ending", NORTH, expires_at=100)
    await stand.add("proposed", NORTH, active_at=NEVER)
    await stand.add("once", NORTH, active_at=10, valid_from=10, valid_to=50)
    assert sorted(await stand.found(NORTH, now=99, at=99)) == ["ending", "lasting"]
    assert await stand.found(NORTH, now=100, at=100) == ["lasting"]
    assert sorted(await stand.found(NORTH, now=20, at=20)) == ["ending", "lasting", "once"]
    assert sorted(await stand.found(NORTH, now=100, at=20)) == ["lasting", "once"]
    assert sorted(await stand.found(NORTH, now=5, at=5)) == ["ending", "lasting"]


async def test_every_store_sees_a_record_promoted_renewed_and_forgotten(stand):
    await stand.add("a", NORTH, active_at=NEVER)
    await stand.add("b", NORTH, expires_at=100)
    assert await stand.found(NORTH, now=100, at=100) == []
    await stand.change("a", active_at=50)
    await stand.change("b", expires_at=200)
    assert await stand.found(NORTH, now=100, at=100) == ["b", "a"]
    await stand.database.write(lambda c: empty_vectors(c, "one", "b"))
    assert await stand.found(NORTH, now=100, at=100) == ["a"]


@pytest.mark.parametrize(
    "hostile", [[], [1.0], [[1.0, 0, 0, 0]], [float("nan")] * 4, [2.0, 0, 0, 0], ["a"] * 4]
)
async def test_every_store_refuses_what_is_no_unit_vector(stand, hostile):
    with pytest.raises(InvalidInput, match="vector"):
        await stand.store.nearest("one", MODEL, hostile, (), 5)
