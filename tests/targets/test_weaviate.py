"""A real Weaviate that dies and comes back (`scripts/targets/weaviate.sh install` builds it)."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import insert

from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.leases import Leases
from activities.services.memory_store import INDEX_AWAY, MemoryStore
from activities.services.vectors import EMBEDDING, MEMORY, empty_vectors, touch_vectors
from activities.services.weaviate_store import WeaviateVectors, collection_name, connected
from models.errors import MemoryUnavailable
from models.inference import DataClass
from models.memory import Memo, Recall
from tests import real_weaviate

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not real_weaviate.BINARY.exists(), reason=real_weaviate.MISSING),
]

MODEL, SIZE, WRITES = "model", 16, 10_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[real_weaviate.Server]:
    made = real_weaviate.Server(tmp_path / "weaviate")
    made.start()
    yield made
    made.kill()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path / 'memory.db'}")
    MEMORY.metadata.create_all(opened.engine)
    yield opened
    opened.close()


def leases(database: Database, holder: str = "test") -> Leases:
    return Leases(database, holder, lambda: datetime.now(UTC))


def fill(database: Database, first: int, count: int, tenant: str = "one") -> None:
    generator = np.random.default_rng(first)
    matrix = generator.standard_normal((count, SIZE)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    blank = dict(title="", text_digest="", text_size=0, media_type="", source="", data_class="internal")
    names = [dict(tenant=tenant, record_id=f"r{n:05}", position=n) for n in range(first, first + count)]
    memories = [name | blank | dict(kind="post", recorded_at=1, links="[]") for name in names]
    vectors = [
        name | dict(model=MODEL, vector=row.tobytes()) for name, row in zip(names, matrix, strict=True)
    ]

    def work(connection) -> None:
        connection.execute(insert(MEMORY), memories)
        connection.execute(insert(EMBEDDING), vectors)

    database.submit(work).result()


async def test_after_a_kill_during_ten_thousand_writes_the_index_is_what_sql_says(server, database):
    async with connected(server.settings) as client:
        store = WeaviateVectors(database, client, leases(database), SIZE)
        fill(database, 1, WRITES // 2)
        following = asyncio.create_task(store.follow(MODEL))
        while await store.behind(MODEL) > WRITES // 2 - 1500:
            await asyncio.sleep(0)
        server.kill()
        with pytest.raises(MemoryUnavailable):
            await following
        fill(database, WRITES // 2 + 1, WRITES // 2)
        for number in range(1, 301):
            change = empty_vectors if number % 2 else touch_vectors
            await database.write(lambda c, n=number, of=change: of(c, "one", f"r{n:05}"))
        with pytest.raises(MemoryUnavailable):
            await store.follow(MODEL)
        server.start()
        assert await store.follow(MODEL) > 0
        assert await store.behind(MODEL) == 0
        assert not await store.diff("one", MODEL)
        assert await store.held("one", MODEL, ["r00001", "r00002"]) == 1


async def test_what_the_index_lost_or_invented_is_found_and_repaired(server, database):
    async with connected(server.settings) as client:
        store = WeaviateVectors(database, client, leases(database), SIZE)
        fill(database, 1, 20)
        await store.follow(MODEL)
        await store.delete("one", MODEL, ["r00003"])
        await database.write(lambda c: c.execute(EMBEDDING.delete().where(EMBEDDING.c.record_id == "r00007")))
        gap = await store.repair("one", MODEL)
        assert (gap.missing, gap.surplus) == (("r00003",), ("r00007",))
        assert not await store.diff("one", MODEL)


@pytest.mark.parametrize("count", [1, 500])
async def test_what_it_acknowledged_is_found_after_a_kill_that_follows_at_once(server, database, count):
    async with connected(server.settings) as client:
        store = WeaviateVectors(database, client, leases(database), SIZE)
        fill(database, 1, count)
        assert await store.follow(MODEL) == count
        server.kill()
        server.start()
    async with connected(server.settings) as client:
        store = WeaviateVectors(database, client, leases(database), SIZE)
        assert not await store.diff("one", MODEL)


async def test_an_object_whose_vector_is_gone_counts_as_missing_and_is_repaired(server, database):
    async with connected(server.settings) as client:
        store = WeaviateVectors(database, client, leases(database), SIZE)
        fill(database, 1, 3)
        await store.follow(MODEL)
        collection = client.collections.use(collection_name(MODEL)).with_tenant("one")
        found = await collection.query.fetch_objects(limit=1)
        properties = found.objects[0].properties
        await store.delete("one", MODEL, [properties["record_id"]])
        await collection.data.insert(properties, uuid=found.objects[0].uuid)
        assert (await store.repair("one", MODEL)).missing == (properties["record_id"],)
        assert not await store.diff("one", MODEL)


@pytest.mark.parametrize("tenant", ["a", "acme.com", "a.b-c_d", "x" * 63])
async def test_any_name_of_a_tenant_is_one_in_the_index_and_holds_up_nobody(server, database, tenant):
    async with connected(server.settings) as client:
        store = WeaviateVectors(database, client, leases(database), SIZE)
        fill(database, 1, 3, tenant)
        fill(database, 4, 2)
        assert await store.follow(MODEL) == 5
        for of, count in ((tenant, 3), ("one", 2), (tenant.replace(".", "-") + "0", 0)):
            assert len(await store.nearest(of, MODEL, [1.0, *[0.0] * (SIZE - 1)], (), 9)) == count
        assert not await store.diff(tenant, MODEL)
        await store.delete(tenant, MODEL, ["r00001"])
        assert await store.held(tenant, MODEL, ["r00001", "r00002"]) == 1
        assert (await store.repair(tenant, MODEL)).missing == ("r00001",)


@pytest.mark.parametrize("whole", [True, False])
async def test_a_weaviate_that_comes_back_empty_is_filled_again_and_never_says_there_is_nothing(
    server, database, whole
):
    asked = [1.0, *[0.0] * (SIZE - 1)]
    async with connected(server.settings) as client:
        store = WeaviateVectors(database, client, leases(database), SIZE)
        fill(database, 1, 3)
        assert len(await store.nearest("one", MODEL, asked, (), 9)) == 3
        if whole:
            server.kill()
            shutil.rmtree(server.folder)
            server.start()
        else:
            await client.collections.use(collection_name(MODEL)).tenants.remove(["one"])
        with pytest.raises(MemoryUnavailable):
            await store.nearest("one", MODEL, asked, (), 9)
        if not whole:
            await store.rebuild(MODEL)
        assert len(await store.nearest("one", MODEL, asked, (), 9)) == 3
        assert not await store.diff("one", MODEL)


async def test_a_process_that_starts_beside_an_emptied_weaviate_fills_it_before_it_searches(server, database):
    fill(database, 1, 3)
    async with connected(server.settings) as client:
        await WeaviateVectors(database, client, leases(database), SIZE).follow(MODEL)
    server.kill()
    shutil.rmtree(server.folder)
    server.start()
    async with connected(server.settings) as client:
        store = WeaviateVectors(database, client, leases(database), SIZE)
        assert len(await store.nearest("one", MODEL, [1.0, *[0.0] * (SIZE - 1)], (), 9)) == 3
        assert not await store.diff("one", MODEL)


async def test_a_former_holder_of_the_lease_cannot_move_the_cursor(server, database):
    async with connected(server.settings) as client:
        mine = WeaviateVectors(database, client, leases(database, "first"), SIZE)
        other = leases(database, "second")
        fill(database, 1, 5)
        assert await mine.follow(MODEL) == 5
        fill(database, 6, 5)
        assert await other.take(f"index:weaviate:{MODEL}", timedelta(seconds=60)) is not None
        assert await mine.follow(MODEL) == 0
        assert await mine.behind(MODEL) == 5


class Stalled(WeaviateVectors):
    """Stops before it writes what it has read."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.stands, self.go = asyncio.Event(), asyncio.Event()

    async def _upsert(self, *given) -> None:
        self.stands.set()
        await self.go.wait()
        await super()._upsert(*given)


async def test_a_follower_that_was_stopped_brings_nothing_back_that_was_emptied_meanwhile(server, database):
    async with connected(server.settings) as client, connected(server.settings) as others:
        stalled = Stalled(database, client, leases(database, "slow"), SIZE)
        later = Leases(database, "fast", lambda: datetime.now(UTC) + timedelta(seconds=60))
        other = WeaviateVectors(database, others, later, SIZE)
        fill(database, 1, 3)
        following = asyncio.create_task(stalled.follow(MODEL))
        await stalled.stands.wait()
        assert await other.follow(MODEL) == 3
        await database.write(lambda link: empty_vectors(link, "one", "r00002"))
        assert await other.follow(MODEL) == 1
        stalled.go.set()
        assert await following == 0
        assert await other.held("one", MODEL, ["r00002"]) == 0
        assert await other.held("one", MODEL, ["r00001", "r00003"]) == 2
        assert not await other.diff("one", MODEL)


class Hashed:
    model = MODEL
    sees = frozenset(DataClass)

    async def embed(self, texts):
        generator = [np.random.default_rng(len(text)).standard_normal(SIZE) for text in texts]
        return [(vector / np.linalg.norm(vector)).tolist() for vector in generator]


async def test_while_weaviate_is_away_memory_goes_on_on_sql_and_the_index_catches_up(server, database):
    content = ContentStore(database)
    async with connected(server.settings) as client:
        vectors = WeaviateVectors(database, client, leases(database), SIZE)
        store = MemoryStore(database, content, Hashed(), vectors)
        text = await content.put("default", b"green tea")

        async def keep(name: str) -> None:
            memo = Memo(
                record_id=name, tenant="default", kind="post", title=f"Tea {name}", text=text, source=name
            )
            assert await store.keep(memo, datetime.now(UTC))
            while await store.index_pending():
                pass

        async def ask():
            query = await content.put("default", b"tea")
            return await store.recall(Recall(tenant="default", query=query))

        await keep("before")
        assert (await ask()).degraded == ""
        server.kill()
        await keep("meanwhile")
        found = await ask()
        assert (len(found.hits), found.degraded) == (2, INDEX_AWAY)
        server.start()
        found = await ask()
        assert (len(found.hits), found.degraded) == (2, "")
        assert not await vectors.diff("default", MODEL)
