"""Erasure: nothing of a subject is left in any store or file, and the ledger says so and still holds."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from activities.services.beliefs import Beliefs
from activities.services.content import BLOB, ContentStore, guard
from activities.services.database import Database
from activities.services.erasure import Erasure
from activities.services.keeping import take
from activities.services.ledger_store import LedgerStore
from activities.services.memory_store import MemoryStore
from activities.services.short_term import Key, ShortTerm
from activities.services.vault import Keys
from activities.services.vectors import ExactVectors
from models.beliefs import Change
from models.errors import InvalidInput, KeyDestroyed, MemoryUnavailable, UnknownName
from models.inference import DataClass
from models.ledger import Draft, EventType
from models.memory import Cause, Kept, Memo, Recall, Search
from models.settings import Settings
from scripts.cli import app
from tests.databases import migrated
from workers import config

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ANN, BOB = "ann@example.test", "bob@example.test"
SECRETS = ("Zanzibar", "quetzal", ANN)


class Hashed:
    model = "hashed"
    sees = frozenset(DataClass)

    async def embed(self, texts):
        seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
        vectors = [np.random.default_rng(seed).standard_normal(8) for seed in seeds]
        return [(vector / np.linalg.norm(vector)).tolist() for vector in vectors]


class Index:
    """An index outside SQL that can be away, or keep things back."""

    def __init__(self) -> None:
        self.there, self.away, self.stubborn = set[str](), False, False

    async def delete(self, tenant, model, record_ids) -> None:
        if self.away:
            raise MemoryUnavailable("away")
        if not self.stubborn:
            self.there -= set(record_ids)

    async def held(self, tenant, model, record_ids) -> int:
        return len(self.there & set(record_ids))


class Place:
    def __init__(self, folder: Path, url: str = "") -> None:
        self.folder = folder
        url = url or Settings(data=folder).database_url
        migrated(url)
        self.database = Database(url)
        self.content = ContentStore(self.database)
        vectors = ExactVectors(self.database, 8)
        self.store = MemoryStore(self.database, self.content, Hashed(), vectors, lambda: NOW)
        self.beliefs = Beliefs(self.database, lambda: NOW)
        self.cache = ShortTerm(10, timedelta(hours=1), lambda: NOW)
        self.index = Index()
        self.erasure = Erasure(self.database, lambda: NOW, self.index, self.cache)

    async def memo(self, name: str, subject: str, text: str) -> Memo:
        ref = await self.content.put("default", text.encode())
        return Memo(
            record_id=name,
            tenant="default",
            kind="preference",
            title=f"About {subject}",
            text=ref,
            source=f"event-{name}",
            subject=subject,
            why=f"because of {subject}",
        )

    async def fill(self) -> None:
        for name, subject, text in (
            ("a1", ANN, "moves to Zanzibar soon"),
            ("a2", ANN, "owns a quetzal"),
            ("b1", BOB, "likes tea"),
        ):
            await self.store.keep(await self.memo(name, subject, text), NOW)
            self.index.there.add(name)
            change = Change(
                tenant="default", agent="support", subject=subject, event=name, sets={"said": text}
            )
            await self.beliefs.change(change)
        while await self.store.index_pending():
            pass

        async def answer() -> str:
            return "Zanzibar"

        await self.cache.get(Key("default", ANN, 1, "where"), answer)
        await self.ask("tea", run="run-1")

    async def ask(self, words: str, **more) -> list[str]:
        query = await self.content.put("default", words.encode())
        asked = Recall(tenant="default", query=query, by=Search.HYBRID, limit=50, **more)
        return [hit.record_id for hit in (await self.store.recall(asked)).hits]

    def in_files(self, secret: str) -> list[str]:
        """Files of the database, write-ahead log included, in which a text stands in clear."""
        needle = secret.lower().encode()
        return [path.name for path in self.folder.iterdir() if needle in path.read_bytes().lower()]


@pytest.fixture
async def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    await made.fill()
    yield made
    made.database.close()


async def test_nothing_of_an_erased_subject_is_left_in_any_store_or_file(place):
    assert set(await place.ask("tea")) == {"a1", "a2", "b1"}
    assert all(place.in_files(secret) for secret in SECRETS)
    receipt = await place.erasure.forget("default", ANN, by="dpo@example.test")
    assert receipt.removed == {
        **{"records": 2, "beliefs": 2, "texts": 2, "cached": 1},
        **{"answers": 0, "notices": 0},
    }
    assert set(receipt.left.values()) == {0} and set(receipt.left) >= {"memory", "index", "cache", "texts"}
    assert await place.ask("tea") == ["b1"]
    assert (await place.beliefs.now("default", "support", ANN)).version == 0
    assert (await place.beliefs.now("default", "support", BOB)).version == 1
    assert [secret for secret in SECRETS if place.in_files(secret)] == []


async def test_the_receipt_stands_in_the_ledger_without_spelling_the_subject(place):
    receipt = await place.erasure.forget("default", ANN, by="dpo@example.test")
    events = await LedgerStore(place.database, lambda: NOW).tail("default", 100)
    assert events[-1].event_id == receipt.event_id and events[-1].actor_ref == "dpo@example.test"
    assert events[-1].body["subject"] == receipt.subject_id
    assert all(ANN not in event.model_dump_json() for event in events)


async def test_a_late_retry_does_not_bring_an_erased_record_back(place):
    memo = await place.memo("a1", ANN, "moves to Zanzibar soon")
    await place.erasure.forget("default", ANN, by="dpo")
    again = await place.content.put("default", b"moves to Zanzibar soon")
    assert again == memo.text
    kept = await place.database.write(lambda link: take(link, memo, NOW, Cause()))
    assert kept.what is Kept.KNOWN
    assert await place.ask("tea") == ["b1"]


async def test_an_index_that_is_away_stops_the_erasure_and_trying_again_finishes_it(place):
    place.index.away = True
    with pytest.raises(MemoryUnavailable, match="away"):
        await place.erasure.forget("default", ANN, by="dpo")
    assert "a1" in await place.ask("tea")
    place.index.away, place.index.stubborn = False, True
    with pytest.raises(MemoryUnavailable, match="left"):
        await place.erasure.forget("default", ANN, by="dpo")
    types = [event.type for event in await LedgerStore(place.database, lambda: NOW).tail("default", 100)]
    assert "erasure" not in types
    place.index.stubborn = False
    receipt = await place.erasure.forget("default", ANN, by="dpo")
    assert (receipt.removed["records"], receipt.left["index"]) == (2, 0)


async def test_an_erasure_that_was_stopped_after_all_was_gone_is_ended_by_trying_again(place):
    await place.content.put("default", b"Cleo lives in Lima", subject="cleo")
    erasure = Erasure(place.database, lambda: NOW, patience=1)
    with place.database.engine.connect() as reader:
        reader.execute(select(BLOB.c.digest)).all()
        with pytest.raises(MemoryUnavailable, match="write_ahead_log"):
            await erasure.forget("default", "cleo", by="dpo")
    receipt = await erasure.forget("default", "cleo", by="dpo")
    assert receipt.left["write_ahead_log"] == 0
    with pytest.raises(UnknownName):
        await erasure.forget("default", "cleo", by="dpo")


async def test_a_text_that_another_subject_has_too_stays_for_that_one(place):
    await place.store.keep(await place.memo("a3", ANN, "likes tea"), NOW)
    receipt = await place.erasure.forget("default", ANN, by="dpo")
    assert receipt.shared == 1
    assert await place.ask("tea") == ["b1"]


async def test_the_key_of_a_subject_is_destroyed_in_the_transaction_that_erases_it(place):
    destroyed = []

    def destroy(link, tenant, subject, now) -> None:
        destroyed.append((tenant, subject))
        if len(destroyed) == 1:
            raise RuntimeError("no key store")

    erasure = Erasure(place.database, lambda: NOW, destroy_key=destroy)
    with pytest.raises(RuntimeError):
        await erasure.forget("default", ANN, by="dpo")
    assert set(await place.ask("tea")) == {"a1", "a2", "b1"}
    await erasure.forget("default", ANN, by="dpo")
    assert destroyed == [("default", ANN)] * 2
    assert await place.ask("tea") == ["b1"]


async def test_with_encryption_on_the_subjects_key_is_destroyed_without_asking_for_it(place):
    sealed = guard(Database(str(place.database.engine.url)), Keys("k1", {"k1": b"k" * 32}))
    ref = await ContentStore(sealed).put("default", b"what Ann wrote", "text/plain", subject=ANN)
    assert await ContentStore(sealed).get("default", ref) == b"what Ann wrote"
    await Erasure(sealed, lambda: NOW).forget("default", ANN, by="dpo")
    with pytest.raises(InvalidInput, match="no such content"):
        await ContentStore(sealed).get("default", ref)
    with pytest.raises(KeyDestroyed):
        await ContentStore(sealed).put("default", b"what Ann wrote", "text/plain", subject=ANN)
    sealed.close()


async def test_what_nobody_knows_about_cannot_be_erased(place):
    for subject in ("nobody", "", "ann"):
        with pytest.raises(UnknownName, match="subject"):
            await place.erasure.forget("default", subject, by="dpo")


async def test_a_subject_can_be_believed_in_again_after_it_was_erased(place):
    await place.erasure.forget("default", ANN, by="dpo")
    change = Change(tenant="default", agent="support", subject=ANN, event="new", sets={"said": "hello"})
    assert (await place.beliefs.change(change)).belief.version == 1
    events = await LedgerStore(place.database, lambda: NOW).tail("default", 100)
    assert sum(event.type == "belief" for event in events) == 4


def command(data: Path, *arguments: str):
    kept = data / "settings.json"
    config.snapshot(Settings(data=data, embeddings=None), kept)
    return CliRunner().invoke(app, list(arguments), env={config.SNAPSHOT: str(kept)})


async def test_the_command_line_searches_counts_tells_and_forgets(place):
    await place.beliefs.change(
        Change(tenant="default", agent="support", subject=BOB, event="b2", sets={"said": "likes coffee"})
    )

    draft = Draft(
        event_id="event-b1",
        stream="run-b1",
        type=EventType.REQUEST,
        actor_kind="system",
        actor_ref="intake",
        correlation_id="run-b1",
    )
    await LedgerStore(place.database, lambda: NOW).add("default", draft)

    async def said(*arguments: str):
        return await asyncio.to_thread(command, place.folder, *arguments)

    found = json.loads((await said("memory", "search", "tea", "--json")).stdout)
    assert [hit["record_id"] for hit in found["hits"]] == ["b1"]
    counts = json.loads((await said("memory", "stats", "--json")).stdout)
    assert counts["preference active"] == 3 and counts["vectors"] == 3
    assert "missing  0" in (await said("memory", "diff")).stdout
    assert "nothing to rebuild" in (await said("memory", "rebuild")).stdout
    assert "said: likes coffee" in (await said("beliefs", "show", BOB)).stdout
    assert (await said("beliefs", "diff", BOB, "1")).stdout.strip() == "said: likes tea -> likes coffee"
    versions = json.loads((await said("beliefs", "history", BOB, "--json")).stdout)
    assert [one["belief"]["version"] for one in versions] == [1, 2]
    told = (await said("story", BOB)).stdout
    assert all(word in told for word in ("memory", "belief", "ledger", "request", "About bob"))
    refused = await said("memory", "forget", "--subject", ANN, "--yes")
    assert refused.exit_code == 2 and "--as" in refused.output
    erased = await said("memory", "forget", "--subject", ANN, "--yes", "--as", "dpo")
    assert erased.exit_code == 0 and "2 records" in erased.stdout
    assert (await said("story", ANN)).exit_code == 2
    assert (await said("beliefs", "show", ANN)).exit_code == 2
