"""Memory: kept once, found by meaning, honest when meaning cannot be asked, and forgotten for good."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from sqlalchemy import select, update
from temporalio.testing import ActivityEnvironment

from activities.memory import Memory
from activities.services.content import BLOB, ContentStore, put_blob
from activities.services.database import Database
from activities.services.indexing import keep_indexed, keep_swept
from activities.services.keeping import TEXT_BYTES
from activities.services.leases import Leases
from activities.services.memory_store import (
    AWAY,
    LAGGING,
    NO_MODEL,
    REFUSED,
    UNUSABLE,
    MemoryStore,
    fused,
    keep,
)
from activities.services.vectors import EMBEDDING, MEMORY, ExactVectors
from models.errors import InvalidInput, MemoryUnavailable, UnknownName
from models.inference import DataClass
from models.loop import Ref
from models.memory import Cause, Kept, Memo, Origin, Recall, Search, Standing
from models.tables import MemorySupport
from tests.databases import migrated

NOW = datetime(2026, 5, 1, tzinfo=UTC)
SIZE = 16


class Hashed:
    """Same text, same vector; counts calls; can be away, and refuses what it is told to."""

    model = "hashed"
    sees = frozenset(DataClass)

    def __init__(self) -> None:
        self.away = False
        self.longest = 10**9
        self.garbage: list[list[float]] | None = None
        self.texts: list[str] = []

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        if self.away:
            raise MemoryUnavailable("away")
        if max(map(len, texts)) > self.longest:
            raise InvalidInput("too long")
        self.texts += texts
        return self.garbage if self.garbage is not None else [vector_of(text) for text in texts]


def vector_of(text: str) -> list[float]:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(SIZE)
    return (vector / np.linalg.norm(vector)).tolist()


class Place:
    def __init__(self, url: str) -> None:
        self.database = Database(migrated(url))
        self.content = ContentStore(self.database)
        self.embedder = Hashed()
        self.now = NOW
        self.store = self.open(self.embedder)

    def open(self, embedder: Hashed | None) -> MemoryStore:
        vectors = ExactVectors(self.database, SIZE)
        return MemoryStore(self.database, self.content, embedder, vectors, lambda: self.now)

    async def memo(self, record_id: str | None = None, title: str = "", text: str = "text", **more) -> Memo:
        tenant = more.pop("tenant", "default")
        ref = await self.content.put(tenant, text.encode())
        named = {} if record_id is None else {"record_id": record_id}
        return Memo(
            tenant=tenant,
            title=title,
            text=ref,
            source="event-1",
            **{"kind": "post", **named, **more},
        )

    async def ask(self, query: str, store: MemoryStore | None = None, **more):
        ref = await self.content.put(more.get("tenant", "default"), query.encode())
        return await (store or self.store).recall(Recall(**{"tenant": "default", "query": ref, **more}))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(f"sqlite:///{tmp_path / 'memory.db'}")
    yield made
    made.database.close()


def ids(recalled) -> list[str]:
    return [hit.record_id for hit in recalled.hits]


async def test_a_record_is_found_by_meaning_with_everything_that_was_kept(place):
    memo = await place.memo(
        "a", "Tea", "green", links=("https://site.test/a",), data_class=DataClass.CONFIDENTIAL, kind="idea"
    )
    assert await place.store.keep(memo, NOW)
    assert await place.store.index_pending() == 1
    recalled = await place.ask("Tea\ngreen")
    (hit,) = recalled.hits
    assert (hit.record_id, hit.title, hit.text, hit.version) == ("a", "Tea", memo.text, memo.text.digest)
    assert (hit.kind, hit.links, hit.recorded_at, hit.score_permille) == ("idea", memo.links, NOW, 1000)
    assert hit.data_class == DataClass.CONFIDENTIAL
    assert recalled.degraded == ""
    assert recalled.query_digest == hashlib.sha256(b"Tea\ngreen").hexdigest()


async def test_keeping_twice_keeps_the_first_and_embeds_once(place):
    assert await place.store.keep(await place.memo("a", "first"), NOW)
    assert not await place.store.keep(await place.memo("a", "second"), NOW)
    assert await place.store.keep(await place.memo("a", "other tenant", tenant="other"), NOW)
    while await place.store.index_pending():
        pass
    assert place.embedder.texts == ["first\ntext", "other tenant\ntext"]
    assert [hit.title for hit in (await place.ask("x")).hits] == ["first"]


async def test_records_kept_at_once_get_positions_without_gaps_in_commit_order(place):
    memos = [await place.memo(f"r{number}") for number in range(30)]
    await asyncio.gather(*(place.store.keep(memo, NOW) for memo in memos))
    positions = await place.database.read(lambda c: c.execute(select(MEMORY.c.position)).scalars().all())
    assert sorted(positions) == list(range(1, 31))


async def test_a_record_goes_with_the_transaction_that_it_is_part_of(place):
    memo = await place.memo("a")

    def fails(connection) -> None:
        keep(connection, memo, NOW)
        raise RuntimeError("the outcome was not logged")

    with pytest.raises(RuntimeError):
        await place.database.write(fails)
    assert await place.store.newest() == 0

    def together(connection) -> bool:
        ref = put_blob(connection, "default", b"new text", "text/plain")
        return keep(connection, memo.model_copy(update={"text": ref}), NOW)

    assert await place.database.write(together)


async def test_tenants_and_kinds_are_kept_apart(place):
    for record_id, kind, tenant in [
        ("a", "post", "default"),
        ("b", "idea", "default"),
        ("c", "post", "other"),
    ]:
        await place.store.keep(await place.memo(record_id, kind=kind, tenant=tenant), NOW)
    await place.store.index_pending()
    assert sorted(ids(await place.ask("x"))) == ["a", "b"]
    assert ids(await place.ask("x", kinds=("idea",))) == ["b"]
    assert ids(await place.ask("x", tenant="other")) == ["c"]
    assert ids(await place.ask("x", kinds=("unheard",))) == []
    assert ids(await place.ask("x", tenant="nobody")) == []


async def test_equal_scores_are_ordered_by_newer_time_then_id(place):
    for record_id, days in [("c", 0), ("b", 1), ("d", 0), ("a", 0)]:
        await place.store.keep(await place.memo(record_id, "same"), NOW + timedelta(days=days))
    place.now = NOW + timedelta(days=1)
    await place.store.index_pending()
    assert ids(await place.ask("same", limit=3)) == ["b", "a", "c"]
    assert ids(await place.ask("same", place.open(None), limit=3)) == ["b", "a", "c"]


async def test_words_are_searched_and_it_is_said_so_when_the_embedding_server_is_away(place):
    for record_id, title in [("a", "Grüner Tee aus Japan"), ("b", "Tee"), ("c", "Coffee")]:
        await place.store.keep(await place.memo(record_id, title), NOW)
    place.embedder.away = True
    recalled = await place.ask("TEE, grüner?")
    assert recalled.degraded == AWAY
    assert [(hit.record_id, hit.score_permille) for hit in recalled.hits] == [("a", 707), ("b", 707)]
    assert (await place.ask("tee", place.open(None))).degraded == NO_MODEL
    assert (await place.ask("!?", place.open(None))).hits == ()


@pytest.mark.parametrize("garbage", [[[0.0] * SIZE], [[float("nan")] * SIZE], [[1.0]], [[]]])
async def test_a_useless_query_vector_degrades_instead_of_failing(place, garbage):
    place.embedder.garbage = garbage
    assert (await place.ask("x")).degraded == REFUSED


async def test_a_stored_vector_of_another_size_degrades_the_search_and_holds_up_no_other(place):
    await place.store.keep(await place.memo("old", "Tea one"), NOW)
    await place.store.index_pending()
    await place.database.write(lambda link: link.execute(EMBEDDING.update().values(vector=b"1234")))
    store = place.open(place.embedder)
    await store.keep(await place.memo("new", "Tea two"), NOW)
    assert await store.index_pending() == 1
    found = await place.ask("Tea", store)
    assert (sorted(ids(found)), found.degraded) == (["new", "old"], UNUSABLE)


async def test_records_without_a_vector_yet_are_admitted(place):
    await place.store.keep(await place.memo("a"), NOW)
    await place.store.keep(await place.memo("b", tenant="other"), NOW)
    assert (await place.ask("x")).degraded == LAGGING
    await place.store.index_pending(limit=1)
    assert (await place.ask("x")).degraded == ""
    assert (await place.ask("x", tenant="other")).degraded == LAGGING
    await place.store.index_pending()
    assert (await place.ask("x", tenant="other")).degraded == ""


async def test_a_forgotten_record_is_neither_found_nor_brought_back(place):
    memo = await place.memo("a", "secret title")
    await place.store.keep(memo, NOW)
    await place.store.index_pending()
    assert ids(await place.ask("secret")) == ["a"]
    assert await place.store.forget("default", "a")
    assert not await place.store.forget("default", "a")
    assert not await place.store.forget("default", "never")
    assert not await place.store.keep(memo, NOW)
    assert await place.store.index_pending() == 0
    assert ids(await place.ask("secret")) == []
    assert ids(await place.ask("secret", place.open(None))) == []


async def test_a_record_forgotten_while_it_is_embedded_stays_forgotten(place):
    class Slow(Hashed):
        async def embed(self, texts):
            await place.store.forget("default", "a")
            return await super().embed(texts)

    store = place.open(Slow())
    await place.store.keep(await place.memo("a"), NOW)
    await store.index_pending()
    assert ids(await place.ask("x")) == []
    assert await place.database.read(lambda c: c.execute(select(EMBEDDING)).all()) == []


async def test_a_record_forgotten_between_search_and_look_up_leaves_its_place_to_the_next(place):
    class Interrupted(ExactVectors):
        async def nearest(self, *asked):
            near = await super().nearest(*asked)
            await place.store.forget("default", "a")
            return near

    for record_id in ("a", "b"):
        await place.store.keep(await place.memo(record_id, "same"), NOW)
    await place.store.index_pending()
    vectors = Interrupted(place.database, SIZE)
    store = MemoryStore(place.database, place.content, place.embedder, vectors)
    assert ids(await place.ask("same", store, limit=1)) == ["b"]


async def test_a_text_that_is_too_long_for_the_model_is_embedded_shortened(place):
    place.embedder.longest = 600
    await place.store.keep(await place.memo("long", text="x" * 5000), NOW)
    await place.store.keep(await place.memo("short"), NOW)
    assert await place.store.index_pending() == 2
    assert [len(text) for text in place.embedder.texts] == [500, 5]


async def test_a_record_that_cannot_be_embedded_does_not_hold_up_the_others(place):
    broken = await place.memo("broken", text="will rot")
    await place.store.keep(broken, NOW)
    await place.store.keep(await place.memo("good"), NOW)
    await place.database.write(
        lambda c: c.execute(update(BLOB).where(BLOB.c.digest == broken.text.digest).values(data=b"rotten"))
    )
    while await place.store.index_pending(limit=1):
        pass
    recalled = await place.ask("x")
    assert (ids(recalled), recalled.degraded) == (["good"], LAGGING)


async def test_a_server_that_answers_garbage_leaves_records_waiting(place):
    await place.store.keep(await place.memo("a"), NOW)
    place.embedder.garbage = [[0.0] * SIZE]
    with pytest.raises(InvalidInput):
        await place.store.index_pending()
    place.embedder.garbage = []
    with pytest.raises(MemoryUnavailable):
        await place.store.index_pending()
    place.embedder.garbage = None
    assert await place.store.index_pending() == 1
    assert ids(await place.ask("x")) == ["a"]


async def test_two_indexers_at_once_write_each_vector_once(place):
    for number in range(20):
        await place.store.keep(await place.memo(f"r{number}"), NOW)
    await asyncio.gather(place.store.index_pending(), place.open(Hashed()).index_pending())
    assert len((await place.ask("x", limit=50)).hits) == 20


async def test_what_breaks_a_limit_is_refused_by_name(place):
    with pytest.raises(ValidationError, match="title"):
        await place.memo("a", "x" * 201)
    with pytest.raises(ValidationError, match="title"):
        await place.memo("a", "nul \x00")
    for record_id in ("", "x" * 201):
        with pytest.raises(ValidationError, match="record_id"):
            await place.memo(record_id)
    huge = await place.memo("a", text="x" * (TEXT_BYTES + 1))
    lying = huge.model_copy(update={"text": huge.text.model_copy(update={"size": 1})})
    absent = huge.model_copy(update={"text": Ref(digest="0" * 64, size=1)})
    for memo in (huge, lying, absent):
        with pytest.raises(InvalidInput, match="text"):
            await place.store.keep(memo, NOW)
    small = await place.memo("a")
    with pytest.raises(InvalidInput, match=r"text\.size"):
        await place.store.keep(
            small.model_copy(update={"text": small.text.model_copy(update={"size": 9})}), NOW
        )
    with pytest.raises(InvalidInput, match="query"):
        await place.ask("x" * 20_000)
    with pytest.raises(InvalidInput, match="query"):
        ref = await place.content.put("default", b"\xff\xfe")
        await place.store.recall(Recall(tenant="default", query=ref))


async def test_the_background_loop_indexes_what_comes_and_stops_when_told(place):
    class Telling(Hashed):
        def __init__(self) -> None:
            super().__init__()
            self.told = asyncio.Event()

        async def embed(self, texts):
            self.told.set()
            return await super().embed(texts)

    embedder, stop = Telling(), asyncio.Event()
    embedder.away = True
    store = place.open(embedder)
    loop = asyncio.create_task(keep_indexed(store, stop, pause=0.001, longest=0.01))
    await place.store.keep(await place.memo("a"), NOW)
    await embedder.told.wait()
    embedder.away = False
    while (await place.ask("x")).degraded:
        await asyncio.sleep(0)
    await place.store.keep(await place.memo("b"), NOW)
    while (await place.ask("x")).degraded:
        await asyncio.sleep(0)
    stop.set()
    await loop
    assert sorted(ids(await place.ask("x"))) == ["a", "b"]


async def test_an_idle_background_loop_asks_for_nothing_but_the_newest_position():
    class Idle:
        def __init__(self) -> None:
            self.newest_calls, self.index_calls = 0, 0

        async def newest(self) -> int:
            self.newest_calls += 1
            if self.newest_calls == 20:
                stop.set()
            return 7

        async def index_pending(self, limit: int = 32) -> int:
            self.index_calls += 1
            return 0

    store, stop = Idle(), asyncio.Event()
    await keep_indexed(store, stop, pause=0.001)
    assert (store.newest_calls, store.index_calls) == (20, 1)


async def test_the_activity_answers_what_the_store_answers(place):
    await place.store.keep(await place.memo("a"), NOW)
    await place.store.index_pending()
    ref = await place.content.put("default", b"x")
    request = Recall(tenant="default", query=ref)
    answer = await ActivityEnvironment().run(Memory(place.store).recall, request)
    assert answer == await place.store.recall(request)
    assert [hit.record_id for hit in answer.hits] == ["a"]


async def facts(place, text: str, run: str, event: str, ground: str | None = None, **more):
    """A fact a model inferred from a text that its event holds."""
    grounds = (await place.content.put("default", (ground or text).encode()),)
    given = {"kind": "fact", "origin": Origin.MODEL, "grounds": grounds} | more
    memo = await place.memo(text=text, title=text[:100], **given)
    memo = memo.model_copy(update={"source": event})
    return await place.store.take(memo, place.now, Cause(run=run))


async def test_what_a_model_inferred_counts_only_after_a_second_independent_source(place):
    first = await facts(place, "Ann pays by invoice", "run-1", "e1", "Mail: Ann pays by invoice, she says")
    assert (first.what, first.standing) == (Kept.KEPT, Standing.PROPOSED)
    await place.store.index_pending()
    assert ids(await place.ask("Ann pays by invoice")) == []
    again = await facts(place, "Ann pays by invoice", "run-2", "e2", "Mail: Ann pays by invoice, she says")
    assert (again.what, again.standing) == (Kept.KNOWN, Standing.PROPOSED)
    other = await facts(place, "Ann pays by invoice", "run-3", "e3", "Order 7: Ann, pays by invoice")
    assert (other.what, other.standing) == (Kept.KNOWN, Standing.ACTIVE)
    assert ids(await place.ask("Ann pays by invoice")) == [first.record_id]


async def test_a_person_promotes_and_quarantine_hides_again(place):
    kept = await facts(place, "Ann pays by invoice", "run-1", "e1", "Ann pays by invoice")
    await place.store.index_pending()
    assert await place.store.promote("default", kept.record_id, "verdict-1") is Standing.ACTIVE
    assert ids(await place.ask("Ann")) == [kept.record_id]
    await place.store.quarantine("default", kept.record_id)
    assert ids(await place.ask("Ann")) == [] == ids(await place.ask("Ann", by=Search.WORDS))
    await place.store.promote("default", kept.record_id, "verdict-2")
    assert ids(await place.ask("Ann")) == [kept.record_id]
    with pytest.raises(UnknownName, match="nobody"):
        await place.store.promote("default", "nobody", "verdict-3")


async def test_a_retry_confirms_nothing_and_a_confirmation_renews(place):
    memo = await place.memo("a", kind="outcome")
    assert (await place.store.take(memo, NOW)).what is Kept.KEPT
    place.now = NOW + timedelta(days=20)
    assert (await place.store.take(memo, place.now)).what is Kept.KNOWN
    for _ in range(3):
        await place.ask("text")
    place.now = NOW + timedelta(days=31)
    assert ids(await place.ask("text", by=Search.WORDS)) == []
    place.now = NOW + timedelta(days=25)
    await place.store.take(memo.model_copy(update={"source": "event-2"}), place.now)
    place.now = NOW + timedelta(days=31)
    assert ids(await place.ask("text", by=Search.WORDS)) == ["a"]


@pytest.mark.parametrize("by", list(Search))
@pytest.mark.parametrize("embedding", [True, False])
async def test_what_has_expired_is_never_found_though_nobody_sweeps(place, by, embedding):
    store = place.store if embedding else place.open(None)
    for number in range(20):
        ends = NOW + timedelta(hours=1 + number % 2)
        memo = await place.memo(f"r{number:02}", "same", expires_at=ends)
        await place.store.keep(memo, NOW)
    await place.store.index_pending()
    place.now = NOW + timedelta(hours=1)
    found = ids(await place.ask("same", store, by=by, limit=50))
    assert sorted(found) == [f"r{number:02}" for number in range(20) if number % 2]
    assert ids(await place.ask("same", store, by=by, limit=50, as_of=NOW)) == found
    place.now = NOW + timedelta(hours=2)
    assert ids(await place.ask("same", store, by=by, limit=50)) == []


async def test_the_sweep_empties_the_indexes_and_what_is_learned_again_is_found_again(place):
    memo = await place.memo("a", "same", kind="outcome")
    await place.store.keep(memo, NOW)
    await place.store.index_pending()
    place.now = NOW + timedelta(days=31)
    assert await place.store.sweep() == 1
    assert await place.store.sweep() == 0
    lengths = await place.database.read(lambda c: c.execute(select(EMBEDDING.c.vector)).scalars().all())
    assert lengths == [b""]
    again = await place.store.take(memo.model_copy(update={"source": "event-2"}))
    assert again.what is Kept.KEPT
    assert await place.store.index_pending() == 1
    for by in Search:
        assert ids(await place.ask("same", by=by)) == ["a"]


async def test_a_superseded_record_answers_for_its_own_time(place):
    for record_id in ("old", "new"):
        place.now = NOW if record_id == "old" else NOW + timedelta(days=2)
        await place.store.keep(await place.memo(record_id, "price", record_id), place.now)
    await place.store.index_pending()
    await place.store.supersede("default", "old", "new")
    for by in Search:
        assert ids(await place.ask("price", by=by)) == ["new"]
        assert ids(await place.ask("price", by=by, as_of=NOW + timedelta(days=1))) == ["old"]


async def test_only_what_counts_takes_the_place_of_another_record(place):
    for record_id in ("old", "new"):
        await place.store.keep(await place.memo(record_id, "price", record_id), NOW)
    proposed = await facts(place, PAYS, "run-1", "e1", MAIL)
    for new in ("old", proposed.record_id):
        with pytest.raises(InvalidInput, match="new"):
            await place.store.supersede("default", "old", new)
    await place.store.supersede("default", "old", "new")
    with pytest.raises(InvalidInput, match="new"):
        await place.store.supersede("default", "new", "old")
    assert ids(await place.ask("price", by=Search.WORDS)) == ["new"]


async def test_an_agent_sees_its_own_records_and_everybodys(place):
    for record_id, agent in (("mine", "pricing"), ("theirs", "content"), ("all", None)):
        await place.store.keep(await place.memo(record_id, "same", agent=agent), NOW)
    await place.store.index_pending()
    for by in Search:
        assert sorted(ids(await place.ask("same", by=by, agent="pricing"))) == ["all", "mine"]
        assert len(ids(await place.ask("same", by=by))) == 3


async def test_words_inside_texts_are_found_and_fused_with_meaning(place):
    for record_id, title, text in (
        ("a", "Tee", "Grüner Tee aus Uji"),
        ("b", "Coffee", "dark roast"),
        ("c", "Water", "plain water"),
    ):
        await place.store.keep(await place.memo(record_id, title, text), NOW)
    assert ids(await place.ask("gruner UJI", by=Search.WORDS)) == ["a"]
    assert ids(await place.ask('" OR * NEAR(', by=Search.WORDS)) == []
    await place.store.index_pending()
    hybrid = ids(await place.ask("Coffee\ndark roast", by=Search.HYBRID, limit=3))
    assert hybrid[0] == "b" and len(hybrid) == 3
    assert await place.store.forget("default", "a")
    assert ids(await place.ask("uji", by=Search.WORDS)) == []


def test_fusion_prefers_what_both_lists_have():
    assert fused(["a", "b", "c"], ["c", "d"])[0] == "c"
    assert fused(["a"], ["a"]) == ["a"]
    assert fused([], []) == []


async def test_near_duplicates_of_one_scope_become_proposals_and_are_never_deleted(place):
    for record_id, subject in (("a", "sku-1"), ("b", "sku-1"), ("c", "sku-2")):
        await place.store.keep(await place.memo(record_id, "same", subject=subject), NOW)
    while await place.store.index_pending():
        pass
    assert await place.store.merges("default") == (("a", "b", 1000),)
    assert len(ids(await place.ask("same"))) == 3


async def test_the_same_content_in_the_same_scope_has_one_id_and_any_other_has_another(place):
    given = [
        await place.memo(None, text="one"),
        await place.memo(None, text="two"),
        await place.memo(None, text="one", kind="fact"),
        await place.memo(None, text="one", subject="sku-1"),
        await place.memo(None, text="one", agent="pricing"),
        await place.memo(None, text="one", tenant="other"),
    ]
    assert len({memo.record_id for memo in given}) == len(given)
    assert (await place.memo(None, "other title", text="one")).record_id == given[0].record_id


async def test_what_breaks_the_contract_is_refused_and_nothing_is_written(place):
    with pytest.raises(ValidationError, match="no such kind"):
        await place.memo("a", kind="rumour")
    with pytest.raises(ValidationError, match="valid_to"):
        await place.memo("a", valid_from=NOW, valid_to=NOW)
    with pytest.raises(InvalidInput, match="expires_at"):
        await place.store.keep(await place.memo("a", expires_at=NOW), NOW)
    with pytest.raises(InvalidInput, match="event"):
        await place.store.keep(await place.memo("a", event="never-logged"), NOW)
    assert await place.store.newest() == 0


TURNS = 1000
BOOT = "You are the shop's assistant. Answer in English and never promise a refund without approval."
PROFILES = ("John Doe is a software engineer", "The user lives in San Francisco", "The user has 3 children")


async def test_of_a_thousand_turns_hardly_any_junk_stays_and_recall_never_feeds_itself(place):
    """The failures of one that was 98 % junk: boot text restated, recall learned again, profiles made up."""
    await place.store.shown("default", "", [BOOT])
    kept: dict[str, int] = {"good": 0, "boot": 0, "recall": 0, "invented": 0}
    tried = dict(kept)

    async def learn(kind: str, text: str, number: int, ground: str) -> None:
        answer = await facts(place, text, f"run-{number}", f"event-{number}", ground)
        tried[kind] += 1
        kept[kind] += answer.what is Kept.KEPT

    for number in range(TURNS):
        turn = f"Order {number}: customer {number} wants colour {number % 7} in size {number % 11}"
        match number % 4:
            case 0:
                await learn("good", f"Customer {number} wants colour {number % 7}", number, turn)
            case 1:
                await learn("boot", f"Remember: {BOOT[number % 30 :]}", number, f"{turn}. {BOOT}")
            case 2:
                asked = f"wants colour {(number - 2) % 7} customer {number - 2}"
                found = await place.ask(asked, by=Search.WORDS, run=f"run-{number}", limit=1)
                for hit in found.hits:
                    text = (await place.content.get("default", hit.text)).decode()
                    again = text if number % 8 == 2 else f"It is known that {text}"
                    await learn("recall", again, number, f"{turn}. {text}")
            case _:
                await learn("invented", PROFILES[number % 3], number, turn)
        if number % 4 == 0:
            await place.database.write(lambda c: c.execute(update(MEMORY).values(active_at=0)))
    junk = kept["boot"] + kept["recall"] + kept["invented"]
    assert kept["recall"] == 0 and tried["recall"] == TURNS // 4
    assert junk / sum(kept.values()) < 0.05
    assert kept["good"] == tried["good"]


async def test_of_two_sweeping_loops_one_sweeps_and_both_stop_when_told(place):
    for number in range(7):
        memo = await place.memo(f"r{number}", "same", expires_at=NOW + timedelta(hours=1))
        await place.store.keep(memo, NOW)
    place.now, stop, swept = NOW + timedelta(hours=1), asyncio.Event(), []

    class Counting:
        async def sweep(self, limit: int = 500) -> int:
            swept.append(await place.store.sweep(limit))
            if sum(swept) == 7:
                stop.set()
            return swept[-1]

    holders = [Leases(place.database, name, lambda: place.now) for name in ("one", "two")]
    await asyncio.gather(*(keep_swept(Counting(), one, stop, pause=0.01, part=3) for one in holders))
    assert swept == [3, 3, 1]


MAIL = "Mail: from now on Ann pays into the account at Nordbank"
PAYS = "Ann pays into the account at Nordbank"


@pytest.mark.parametrize("beside", ["another text", "a prompt of the run", "a line break"])
async def test_one_text_is_one_source_whatever_stands_beside_it(place, beside):
    async def told(number: int) -> Standing | None:
        texts = [MAIL]
        if beside == "a line break":
            texts = [MAIL.replace(" ", "\n", number - 1) + "." * number]
        else:
            texts.append(f"Ann, text number {number}")
        if beside == "a prompt of the run":
            await place.store.shown("default", f"run-{number}", texts[1:])
        grounds = tuple([await place.content.put("default", one.encode()) for one in texts])
        kept = await facts(place, PAYS, f"run-{number}", f"e{number}", grounds=grounds)
        return kept.standing

    for number in (1, 2, 3):
        assert await told(number) is Standing.PROPOSED
    other = await facts(place, PAYS, "run-4", "e4", "Order 7: Ann pays into the account at Nordbank")
    assert other.standing is Standing.ACTIVE


async def test_what_an_earlier_version_noted_of_a_source_counts_as_that_source(place):
    kept = await facts(place, PAYS, "run-1", "e1", MAIL)
    support = MemorySupport.__table__
    ref = await place.content.put("default", MAIL.encode())
    old = hashlib.sha256(ref.digest.encode()).hexdigest()
    await place.database.write(lambda link: link.execute(support.update().values(basis=old)))
    again = await facts(place, PAYS, "run-2", "e2", MAIL)
    assert (again.record_id, again.standing) == (kept.record_id, Standing.PROPOSED)


@pytest.mark.parametrize("swept", [False, True])
async def test_what_is_learned_again_past_its_time_is_new_whether_or_not_somebody_swept(place, swept):
    await facts(place, PAYS, "run-1", "e1", MAIL)
    active = await facts(place, PAYS, "run-2", "e2", "Order 7: Ann pays into the account at Nordbank")
    assert active.standing is Standing.ACTIVE
    await place.store.index_pending()
    place.now += timedelta(days=181)
    assert not swept or await place.store.sweep() == 1
    again = await facts(place, PAYS, "run-3", "e3", "Letter: so Ann pays into the account at Nordbank")
    assert (again.what, again.standing) == (Kept.KEPT, Standing.PROPOSED)
    await place.store.index_pending()
    assert ids(await place.ask(PAYS)) == [] == ids(await place.ask(PAYS, by=Search.WORDS))
    assert await place.store.promote("default", again.record_id, "verdict-1") is Standing.ACTIVE
    assert ids(await place.ask(PAYS)) == [again.record_id] == ids(await place.ask(PAYS, by=Search.WORDS))


@pytest.mark.parametrize("swept", [False, True])
async def test_time_does_not_let_out_what_was_quarantined(place, swept):
    memo = await place.memo(text=PAYS, title=PAYS, kind="fact")
    kept = await place.store.take(memo, place.now)
    await place.store.index_pending()
    await place.store.quarantine("default", kept.record_id)
    place.now += timedelta(days=181)
    assert not swept or await place.store.sweep() == 0
    again = await place.store.take(memo.model_copy(update={"source": "event-2"}), place.now)
    assert (again.what, again.standing) == (Kept.KNOWN, Standing.QUARANTINED)
    assert ids(await place.ask(PAYS)) == [] == ids(await place.ask(PAYS, by=Search.WORDS))
    await place.store.promote("default", kept.record_id, "verdict-1")
    assert ids(await place.ask(PAYS)) == [kept.record_id] == ids(await place.ask(PAYS, by=Search.WORDS))
