from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from activities.services.memory_store import UNSEEN
from models.inference import OPEN, DataClass
from models.memory import EmbeddingSettings, Search, WeaviateSettings
from models.settings import RegionSettings, Settings
from tests.test_memory import NOW, Hashed, Place, ids


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(f"sqlite:///{tmp_path / 'memory.db'}")
    made.embedder.sees = frozenset(OPEN)
    made.store = made.open(made.embedder)
    yield made
    made.database.close()


async def indexed(place: Place) -> None:
    while await place.store.index_pending():
        pass


@pytest.mark.parametrize("by", [Search.MEANING, Search.HYBRID])
async def test_what_an_embedding_server_may_not_see_is_not_sent_there_and_found_by_its_words(place, by):
    for name, text, data_class in (
        ("open", "green tea", DataClass.PUBLIC),
        ("closed", "the margin on oolong", DataClass.CONFIDENTIAL),
        ("about", "oolong for ann@example.com", DataClass.INTERNAL),
    ):
        await place.store.keep(await place.memo(name, text=text, data_class=data_class), NOW)
    await indexed(place)
    assert place.embedder.texts == ["\ngreen tea"]
    found = await place.ask("oolong", by=by)
    assert {"closed", "about"} <= set(ids(found))
    # What was said of a record stays, and who reads it goes by that.
    assert {hit.record_id: hit.data_class for hit in found.hits}["about"] is DataClass.INTERNAL
    assert found.degraded == ""


async def test_a_query_with_personal_data_is_not_sent_to_a_server_that_may_not_see_it(place):
    await place.store.keep(await place.memo("a", "tea for ann@example.com"), NOW)
    await indexed(place)
    found = await place.ask("ann@example.com tea")
    assert (ids(found), found.degraded) == (["a"], UNSEEN)
    assert place.embedder.texts == []


async def test_what_was_kept_apart_gets_its_vector_once_settings_permit_it(place):
    await place.store.keep(await place.memo("a", text="tea", data_class=DataClass.CONFIDENTIAL), NOW)
    await indexed(place)
    trusted = Hashed()
    while await place.open(trusted).index_pending():
        pass
    assert trusted.texts == ["\ntea"]


@pytest.mark.parametrize(
    ("more", "sees"),
    [
        ({}, set(DataClass)),
        ({"url": "http://localhost:8091"}, set(DataClass)),
        ({"url": "https://tei.example.com"}, {DataClass.PUBLIC, DataClass.INTERNAL}),
        ({"url": "https://127.0.0.1.example.com"}, {DataClass.PUBLIC, DataClass.INTERNAL}),
        ({"data_classes": ("public",)}, {DataClass.PUBLIC}),
        ({"url": "https://tei.example.com", "data_classes": ("personal",)}, {DataClass.PERSONAL}),
    ],
)
def test_a_server_elsewhere_sees_what_is_open_unless_settings_say_more(more, sees):
    assert EmbeddingSettings(**more).sees == sees


@pytest.mark.parametrize(
    ("more", "serves"),
    [
        ({}, True),
        ({"url": "https://tei.example.com"}, False),
        ({"url": "https://tei.example.com", "region": "us"}, False),
        ({"url": "https://tei.example.com", "region": "eu"}, True),
    ],
)
def test_a_regions_processes_show_texts_to_no_server_that_stands_elsewhere(tmp_path, more, serves):
    key = {"id": "eu1", "file": tmp_path / "eu1.key"}
    eu = RegionSettings.model_validate({"keys": [key], "current": "eu1"})
    embeddings = EmbeddingSettings(**more)
    centre = Settings(data=tmp_path, regions={"eu": eu}, embeddings=embeddings, weaviate=WeaviateSettings())
    there = centre.model_copy(update={"region": "eu"})
    assert (there.embedding_server is not None) is serves
    assert there.vector_index is None
    assert (centre.embedding_server, centre.vector_index) == (embeddings, WeaviateSettings())
