from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.ledger_store import LedgerStore, add_in, append_in, entries_in
from models.canonical import derived_id
from models.errors import LedgerBroken
from models.ledger import Append, Appended, Draft, Event, EventType
from models.loop import Ref
from tests.conftest import a_key
from tests.databases import migrated

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = migrated(f"sqlite:///{tmp_path_factory.mktemp('ledger') / 'countersign.db'}")
    return made


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = Database(url)
    yield made
    made.close()


def a_draft(stream: str, step: object, body: dict[str, Any] | None = None) -> Draft:
    return Draft(
        event_id=derived_id("event", stream, str(step)),
        stream=stream,
        type=EventType.REFUSAL,
        actor_kind="person",
        actor_ref="ann",
        correlation_id=stream,
        body=body if body is not None else {"step": str(step)},
    )


def a_wish(tenant: str, stream: str, expected: int, *steps: object) -> Append:
    return Append(
        tenant=tenant, stream=stream, expected=expected, drafts=tuple(a_draft(stream, step) for step in steps)
    )


async def tail(database: Database, tenant: str) -> tuple[Event, ...]:
    return await LedgerStore(database, lambda: NOW).tail(tenant, 1_000_000)


async def whole(database: Database, tenant: str) -> tuple[Event, ...]:
    """The log, with what must hold of every log."""
    events = await tail(database, tenant)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    for stream in {event.stream for event in events}:
        versions = [event.version for event in events if event.stream == stream]
        assert versions == list(range(1, len(versions) + 1))
    assert len({event.event_id for event in events}) == len(events)
    return events


def write(database: Database, wish: Append) -> Appended:
    return database.submit(lambda link: append_in(link, wish, NOW)).result()


WISHES = st.lists(
    st.tuples(st.sampled_from("AB"), st.integers(0, 3), st.integers(1, 3), st.integers(0, 2)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WISHES, st.integers(1, 4))
def test_however_writers_interleave_the_first_at_a_version_wins_and_all_are_told_the_same(
    url: str, wanted: list[tuple[str, int, int, int]], threads: int
) -> None:
    tenant = f"t{a_key()}"
    databases = [Database(url) for _ in range(2)]
    told: list[tuple[Append, Appended]] = []
    lock = threading.Lock()

    def one(at: int) -> None:
        stream, ahead, count, writer = wanted[at]
        stream = f"{tenant}-{stream}"
        own = databases[at % 2]
        known = len(own.read_now(lambda link: entries_in(link, tenant, stream)))
        expected = max(0, known - ahead)
        # Event ids hold their writer: two writers at one version mean different events.
        steps = [f"{writer}-{expected + n}" for n in range(1, count + 1)]
        wish = a_wish(tenant, stream, expected, *steps)
        try:
            answer = write(own, wish)
        except Exception as error:  # an id that stands elsewhere in the stream, by construction of this test
            assert "UNIQUE" in str(error)
            return
        with lock:
            told.append((wish, answer))

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(len(wanted))))
        events = asyncio.run(whole(databases[0], tenant))
        assert [e.model_dump() for e in asyncio.run(tail(databases[1], tenant))] == [
            e.model_dump() for e in events
        ]
        for wish, answer in told:
            standing = [event for event in events if event.stream == wish.stream]
            there = standing[wish.expected :]
            if answer.won:
                assert [d.body for d in wish.drafts] == [e.body for e in there[: len(wish.drafts)]]
            else:
                # It was told a true beginning of what stands from that version on.
                assert answer.entries
                told_of = [(entry.version, entry.body) for entry in answer.entries]
                assert told_of == [(e.version, e.body) for e in there[: len(told_of)]]
    finally:
        for own in databases:
            own.close()


def test_many_writers_at_one_version_agree_on_one_event(url: str) -> None:
    tenant, stream = f"t{a_key()}", a_key()
    databases = [Database(url) for _ in range(3)]
    start = threading.Barrier(12)

    def one(writer: int) -> Appended:
        start.wait()
        return write(databases[writer % 3], a_wish(tenant, stream, 0, f"writer {writer}"))

    try:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(one, range(12)))
        [event] = asyncio.run(whole(databases[0], tenant))
        winners = [n for n, answer in enumerate(answers) if answer.won]
        assert event.body == {"step": f"writer {winners[0]}"} and len(winners) == 1
        losers = [answer for answer in answers if not answer.won]
        assert all([entry.body for entry in answer.entries] == [event.body] for answer in losers)
    finally:
        for own in databases:
            own.close()


async def test_a_repeated_append_changes_nothing_and_has_won_again(database: Database) -> None:
    tenant, wish = f"t{a_key()}", a_wish(f"t{a_key()}", "s", 0, 1, 2)
    wish = wish.model_copy(update={"tenant": tenant})
    store = LedgerStore(database, lambda: NOW)
    first = await store.append(wish)
    again = await LedgerStore(database, lambda: NOW.replace(year=2027)).append(wish)
    assert first.won and again.won
    events = await whole(database, tenant)
    assert [event.recorded_at for event in events] == [NOW, NOW]


async def test_a_repeated_append_learns_what_came_after_it(database: Database) -> None:
    tenant = f"t{a_key()}"
    store = LedgerStore(database, lambda: NOW)
    await store.append(a_wish(tenant, "s", 0, 1))
    await store.append(a_wish(tenant, "s", 1, 2))
    again = await store.append(a_wish(tenant, "s", 0, 1))
    assert (again.won, [entry.version for entry in again.entries]) == (False, [1, 2])
    assert len(await whole(database, tenant)) == 2


async def test_half_of_an_append_is_never_seen(database: Database) -> None:
    tenant = f"t{a_key()}"
    good, twice = a_draft("s", 1), a_draft("s", 1)
    wish = Append(tenant=tenant, stream="s", expected=0, drafts=(good, twice))
    with pytest.raises(Exception, match="UNIQUE"):
        await LedgerStore(database, lambda: NOW).append(wish)
    assert await whole(database, tenant) == ()
    await LedgerStore(database, lambda: NOW).append(a_wish(tenant, "s", 0, 1))
    assert len(await whole(database, tenant)) == 1


async def test_one_failing_write_does_not_undo_its_neighbours(database: Database) -> None:
    tenant = f"t{a_key()}"
    wishes = [a_wish(tenant, f"s{n}", 0 if n != 5 else 7, n) for n in range(12)]
    store = LedgerStore(database, lambda: NOW)
    results = await asyncio.gather(*(store.append(wish) for wish in wishes), return_exceptions=True)
    assert [n for n, result in enumerate(results) if isinstance(result, LedgerBroken)] == [5]
    assert len(await whole(database, tenant)) == 11


async def test_a_stream_that_is_shorter_than_its_writer_knows_stops_everything(database: Database) -> None:
    with pytest.raises(LedgerBroken, match="ends at version 0, its writer saw 3"):
        await LedgerStore(database, lambda: NOW).append(a_wish(f"t{a_key()}", "s", 3, 1))


async def test_an_addition_stands_once_however_often_it_is_made(database: Database) -> None:
    tenant = f"t{a_key()}"
    store = LedgerStore(database, lambda: NOW)
    await asyncio.gather(*(store.add(tenant, a_draft("s", n % 3)) for n in range(12)))
    assert sorted(event.body["step"] for event in await whole(database, tenant)) == ["0", "1", "2"]


async def test_tenants_have_logs_of_their_own(database: Database) -> None:
    one, two = f"t{a_key()}", f"t{a_key()}"
    store = LedgerStore(database, lambda: NOW)
    for n in range(3):
        await store.append(a_wish(one, "s", n, n))
        await store.append(a_wish(two, "s", n, n))
    assert [len(await whole(database, tenant)) for tenant in (one, two)] == [3, 3]
    assert [event.log_id for event in await tail(database, one)] == [one] * 3


async def test_a_persons_words_are_kept_beside_the_ledger_and_named_in_it(database: Database) -> None:
    tenant = f"t{a_key()}"
    wish = a_wish(tenant, "s", 0, 1).model_copy(update={"comment": "because é"})
    appended = await LedgerStore(database, lambda: NOW).append(wish)
    assert appended.won
    [event] = await whole(database, tenant)
    assert "because" not in str(event.body)
    ref = appended.entries[0].body["comment"]
    assert event.body["comment"] == ref
    stored = await ContentStore(database).get(tenant, Ref.model_validate(ref))
    assert stored.decode() == "because é"
    assert (await LedgerStore(database, lambda: NOW).append(wish)).won


async def test_changed_bytes_are_noticed_by_every_reader(database: Database) -> None:
    tenant = f"t{a_key()}"
    store = LedgerStore(database, lambda: NOW)
    await store.append(a_wish(tenant, "s", 0, 1))

    def forge(link: Any) -> None:
        for trigger in _guards(link):
            link.execute(text(f'DROP TRIGGER "{trigger}"'))
        link.execute(
            text(
                "UPDATE event SET envelope = CAST(replace(envelope, 'ann', 'bob') AS BLOB) WHERE log_id = :t"
            ),
            {"t": tenant},
        )

    # Nothing else may be in this file afterwards; it is a copy of its own.
    copy = Database(await _copied(database))
    try:
        await copy.write(forge)
        with pytest.raises(LedgerBroken):
            await tail(copy, tenant)
        with pytest.raises(LedgerBroken):
            await copy.write(lambda link: append_in(link, a_wish(tenant, "s", 0, 1), NOW))
    finally:
        copy.close()


def test_an_event_and_what_it_speaks_of_are_one_commit(database: Database) -> None:
    tenant = f"t{a_key()}"

    def broken(link: Any) -> None:
        add_in(link, tenant, a_draft("s", 1), NOW)
        raise RuntimeError("the rest failed")

    with pytest.raises(RuntimeError, match="the rest failed"):
        database.submit(broken).result()
    assert asyncio.run(whole(database, tenant)) == ()


def _guards(link: Any) -> list[str]:
    rows = link.execute(text("SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'event'"))
    return [row.name for row in rows]


async def _copied(database: Database) -> str:
    path = Path(str(database.engine.url.database)).with_name(f"{a_key()}.db")
    source = sqlite3.connect(str(database.engine.url.database))
    target = sqlite3.connect(path)
    source.backup(target)
    source.close()
    target.close()
    return f"sqlite:///{path}"
