"""Search by words stays right where it is bounded: when a word stands in more records than are ranked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text

from activities.services.vectors import MEMORY
from activities.services.words import MATCHES, drop_words, put_spelled, put_words
from models.memory import Search
from tests.test_memory import Place, ids

MANY = MATCHES + MATCHES // 4
HASHED = f"x{'0' * 20}"
KEPT_AS_IT_WAS = {
    "sqlite": f"SELECT count(*) FROM memory_words WHERE memory_words MATCH '{HASHED}'",
    "postgresql": f"SELECT count(*) FROM memory_words WHERE words @@ '{HASHED}'::tsquery",
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(f"sqlite:///{tmp_path / 'memory.db'}")
    yield made
    made.database.close()


async def fill(place: Place, text: Callable[[int], str], tenant: str = "default", start: int = 1) -> None:
    blank = dict(text_digest="0" * 64, text_size=0, media_type="text/plain", source="", data_class="internal")
    numbers = range(start, start + MANY)
    rows = [
        dict(tenant=tenant, record_id=f"r{n:05}", position=n, kind="post", title=text(n), recorded_at=n)
        for n in numbers
    ]

    def work(connection) -> None:
        connection.execute(insert(MEMORY), [row | blank | dict(links="[]") for row in rows])
        for row in rows:
            put_words(connection, row["position"], row["title"], tenant)

    await place.database.write(work)


async def found(place: Place, query: str, **more) -> list[str]:
    return ids(await place.ask(query, by=Search.WORDS, limit=3, **more))


async def test_a_rare_word_decides_beside_one_that_stands_everywhere(place):
    await fill(place, lambda n: f"everywhere number{n}")
    assert await found(place, "everywhere number7") == ["r00007"]
    assert await found(place, "nowhere number8 everywhere") == ["r00008"]
    assert await found(place, "nowhere") == []


async def test_of_words_that_all_stand_nearly_everywhere_the_newest_records_with_every_one_are_found(place):
    await fill(place, lambda n: "everywhere" if n % 10 == 0 else "everywhere nearly")
    assert MANY % 10 == 0
    assert await found(place, "nearly everywhere") == [f"r{MANY - n:05}" for n in (1, 2, 3)]
    assert await found(place, "everywhere") == [f"r{MANY - n:05}" for n in (0, 1, 2)]


async def test_a_word_that_is_common_to_another_tenant_still_finds_ones_own(place):
    await place.store.keep(await place.memo("mine", "tea"), place.now)
    await fill(place, lambda n: "tea", tenant="other", start=2)
    assert await found(place, "tea") == ["mine"]
    assert await found(place, "tea", tenant="nobody") == []


async def test_words_indexed_before_tenants_spelled_their_own_are_found_after_the_upgrade(place):
    await place.store.keep(await place.memo("mine", "Crème brûlée for two"), place.now)
    await place.store.keep(await place.memo("hashed", "sealed"), place.now)
    from alembic import command

    from activities.services.migrations import _config

    def work(link) -> None:
        position = dict(link.execute(select(MEMORY.c.record_id, MEMORY.c.position)).all())
        for name, word in (("mine", "creme brulee"), ("hashed", HASHED)):
            drop_words(link, position[name])
            put_spelled(link, position[name], word.split())

    await place.database.write(work)
    assert await found(place, "brûlée") == []
    with place.database.engine.begin() as link:
        config = _config()
        config.attributes["connection"] = link
        command.stamp(config, "0009")
        command.upgrade(config, "0010")
        command.stamp(config, "head")
    assert await found(place, "brûlée") == ["mine"]
    with place.database.engine.begin() as link:
        assert link.execute(text(KEPT_AS_IT_WAS[link.dialect.name])).scalar_one() == 1
