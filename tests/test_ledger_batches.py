"""What stands does not depend on which appends happened to share a commit, and neither do its bytes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, event, select

from activities.services.database import Database, Shared
from activities.services.envelopes import envelope
from activities.services.ledger_store import EVENT, LedgerStore, entries_in, in_runs
from models.canonical import canonical
from models.errors import LedgerBroken
from models.ledger import Append, Draft, EventType
from scripts.bench.ledger import check
from tests.test_ledger_tree import draft, plain

NOW = datetime(2026, 5, 1, tzinfo=UTC)
odd = st.recursive(
    plain | st.floats() | st.integers(2**53, 2**70) | st.sampled_from(EventType) | st.just(NOW),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=4), inner)
    ),
    max_leaves=6,
)


class Held:
    """Lets nothing be written until everything has queued up, so that it shares one commit."""

    def __init__(self, database: Database) -> None:
        self._running, self._go = threading.Event(), threading.Event()
        self._database = database
        self.commits = 0
        event.listen(database.engine, "commit", self._count)

    async def __aenter__(self) -> Held:
        self._blocking = self._database.submit(lambda _: self._running.set() or self._go.wait(60))
        assert await asyncio.to_thread(self._running.wait, 60)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._go.set()
        await asyncio.wrap_future(self._blocking)

    def _count(self, _: Connection) -> None:
        self.commits += 1


async def at_once(database: Database, *wishes: Append) -> tuple[list[Any], int]:
    """Outcomes in order, and how many transactions were committed for them."""
    return await at_once_in(LedgerStore(database, lambda: NOW), database, *wishes)


async def at_once_in(store: LedgerStore, database: Database, *wishes: Append) -> tuple[list[Any], int]:
    """The same in a store that is there already."""
    async with Held(database) as held:
        waiting = [asyncio.ensure_future(store.append(wish)) for wish in wishes]
        await asyncio.sleep(0)
    return await asyncio.gather(*waiting, return_exceptions=True), held.commits - 1


def wish(stream: str, expected: int, *names: str, tenant: str = "default", comment: str = "") -> Append:
    drafts = tuple(draft(name, stream) for name in names)
    return Append(tenant=tenant, stream=stream, expected=expected, drafts=drafts, comment=comment)


async def test_appends_that_wait_together_share_one_commit(database: Database, url: str) -> None:
    told, commits = await at_once(database, *(wish(f"s{n}", 0, f"a{n}", f"b{n}") for n in range(40)))
    assert all(one.won for one in told) and commits == 1
    assert check(url, "default", 80) == 80


async def test_one_commit_may_hold_a_stream_several_times_in_several_logs(
    database: Database, url: str
) -> None:
    steps = [wish("s", n, f"{log}{n}", tenant=log) for n in range(5) for log in ("one", "other")]
    told, commits = await at_once(database, *steps)
    assert all(one.won for one in told) and commits == 1
    assert [check(url, log, 5) for log in ("one", "other")] == [5, 5]


async def test_of_one_commits_appends_at_one_version_the_first_wins_and_all_learn_of_it(
    database: Database, url: str
) -> None:
    told, commits = await at_once(
        database, wish("s", 0, "one"), wish("t", 0, "free"), wish("s", 0, "other"), wish("s", 0, "one")
    )
    assert [one.won for one in told] == [True, True, False, True] and commits == 1
    assert [entry.body for entry in told[2].entries] == [{"name": "one"}]
    assert check(url, "default", 2) == 2


async def test_an_append_that_fails_hurts_only_itself(database: Database, url: str) -> None:
    await at_once(database, wish("s", 0, "first"))
    good = [wish(f"t{n}", 0, f"e{n}") for n in range(6)]
    told, _ = await at_once(database, *good[:3], wish("u", 0, "first"), wish("v", 4, "gap"), *good[3:])
    assert [one.won for one in told[:3] + told[5:]] == [True] * 6
    assert "UNIQUE" in str(told[3]) and isinstance(told[4], LedgerBroken)
    assert check(url, "default", 7) == 7


async def test_words_of_a_person_are_named_where_they_share_a_commit(database: Database, url: str) -> None:
    wishes = [wish(f"s{n}", 0, f"e{n}", comment="why" if n % 2 else "") for n in range(6)]
    told, commits = await at_once(database, *wishes)
    assert [bool(one.entries) for one in told] == [False, True] * 3 and commits == 1
    assert "comment" in told[1].entries[0].body
    assert check(url, "default", 6) == 6


async def test_shared_work_keeps_its_place_among_other_work(database: Database) -> None:
    seen = list[object]()

    def many(_: Connection, items: Sequence[int]) -> list[int]:
        seen.append(list(items))
        return [item * 10 for item in items]

    def alone(_: Connection) -> None:
        seen.append("alone")

    work = [Shared(many, 1), Shared(many, 2), alone, Shared(many, 3)]
    async with Held(database):
        waiting = [asyncio.wrap_future(database.submit(one)) for one in work]
    assert await asyncio.gather(*waiting) == [10, 20, None, 30]
    assert seen == [[1, 2], "alone", [3]]


async def test_whoever_gave_up_waiting_is_left_out(database: Database) -> None:
    store = LedgerStore(database, lambda: NOW)
    async with Held(database):
        waiting = [asyncio.ensure_future(store.append(wish("s", 0, name))) for name in ("one", "other")]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
    assert (await waiting[1]).won
    standing = await database.read(lambda link: entries_in(link, "default", "s"))
    assert [entry.body for entry in standing] == [{"name": "other"}]


@given(
    st.dictionaries(st.text(max_size=5), odd, max_size=5),
    st.lists(st.text(max_size=6), min_size=8, max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_an_envelope_is_the_canonical_bytes_of_its_event(body: dict[str, Any], texts: list[str]) -> None:
    log, event_id, stream, kind, ref, correlation, trace, span = texts
    made = Draft(
        event_id=event_id,
        stream=stream,
        type=EventType.INTENT,
        actor_kind=kind,
        actor_ref=ref,
        correlation_id=correlation,
        causation_id=None if len(log) % 2 else log,
        trace_id=trace,
        span_id=span,
        body=body,
    )
    place: dict[str, Any] = {"log_id": log, "seq": 7, "version": 2**52, "recorded_at": NOW.isoformat()}
    try:
        expected = canonical(made.model_dump(mode="json") | place)
    except ValueError:
        with pytest.raises(ValueError):
            envelope(log, made, 7, 2**52, NOW)
    else:
        assert envelope(log, made, 7, 2**52, NOW) == expected


async def test_writes_of_one_turn_of_the_loop_share_one_commit_without_anything_to_wait_for(
    database: Database, url: str
) -> None:
    store, commits = LedgerStore(database, lambda: NOW), list[Connection]()
    await store.append(wish("first", 0, "first"))
    event.listen(database.engine, "commit", commits.append)
    told = await asyncio.gather(*(store.append(wish(f"s{n}", 0, f"e{n}")) for n in range(100)))
    assert all(one.won for one in told) and len(commits) == 1
    assert check(url, "default", 101) == 101


async def test_a_database_that_is_closed_in_the_turn_that_wrote_has_written(url: str) -> None:
    database = Database(url)
    waiting = [
        asyncio.ensure_future(LedgerStore(database, lambda: NOW).append(wish(f"s{n}", 0, f"e{n}")))
        for n in range(3)
    ]
    await asyncio.sleep(0)
    await asyncio.to_thread(database.close)
    assert [one.won for one in await asyncio.gather(*waiting)] == [True] * 3
    with pytest.raises(RuntimeError, match="closed"):
        await database.write(lambda _: None)


async def test_shared_work_that_does_not_answer_everybody_fails(database: Database) -> None:
    with pytest.raises(ValueError, match="0 results for 1"):
        await database.write(Shared(lambda _, items: list[int](), 1))


async def test_what_a_writer_remembers_of_streams_ends_where_another_process_appends(
    database: Database, url: str
) -> None:
    other = Database(url)
    here, there = (LedgerStore(one, lambda: NOW) for one in (database, other))
    for number in range(0, 6, 2):
        assert (await here.append(wish("s", number, f"e{number}"))).won
        assert (await there.append(wish("s", number + 1, f"e{number + 1}"))).won
        lost = await here.append(wish("s", number + 1, "late"))
        assert not lost.won and [entry.version for entry in lost.entries] == [number + 2]
    other.close()
    assert check(url, "default", 6) == 6


async def test_what_a_writer_remembers_of_streams_is_forgotten_with_a_transaction_that_is_undone(
    database: Database, url: str
) -> None:
    store = LedgerStore(database, lambda: NOW)
    assert (await store.append(wish("s", 0, "first"))).won
    for number in range(1, 4):
        told, _ = await at_once_in(store, database, wish("s", number, f"e{number}"), wish("u", 0, "first"))
        assert told[0].won and "UNIQUE" in str(told[1])
    assert (await store.append(wish("s", 4, "last"))).won
    assert check(url, "default", 5) == 5


async def test_a_run_is_found_in_its_own_stream_and_in_those_of_others(database: Database) -> None:
    store = LedgerStore(database, lambda: NOW)
    others = [("run/act", "run"), ("run", "another"), ("calibration/draft", "run"), ("another", "another")]
    for number, (stream, run) in enumerate([("run", "run"), *others]):
        one = draft(f"e{number}", stream).model_copy(update={"correlation_id": run})
        await store.add("default", one)
        await store.add("elsewhere", one)
    assert [one.event_id for one in await store.of_run("default", "run")] == ["e0", "e1", "e3"]


def test_a_run_is_found_by_indexes(database: Database) -> None:
    query = select(EVENT.c.seq).where(in_runs("default", ["run"])).order_by(EVENT.c.seq)
    said = query.compile(database.engine, compile_kwargs={"literal_binds": True})
    plan = database.read_now(
        lambda link: [row.detail for row in link.exec_driver_sql(f"EXPLAIN QUERY PLAN {said}")]
    )
    searches = [step for step in plan if "event" in step]
    assert len(searches) == 3 and all(step.startswith("SEARCH") for step in searches)
    assert all(any(name in step for name in ("seq=?", "stream=?", "correlation_id=?")) for step in searches)


def test_rows_are_written_in_the_order_of_the_tables_columns() -> None:
    assert [column.name for column in EVENT.columns] == [
        *("log_id", "seq", "event_id", "stream", "version", "type", "correlation_id"),
        *("recorded_at", "envelope", "leaf_hash"),
    ]
