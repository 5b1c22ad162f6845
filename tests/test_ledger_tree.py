from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, select, text
from sqlalchemy.exc import DBAPIError

from activities.services.database import Database
from activities.services.ledger_store import EVENT, HEAD, LedgerStore
from models.canonical import canonical
from models.errors import LedgerBroken
from models.ledger import Append, Draft, EventType
from scripts.bench.ledger import check, killed
from tests.databases import migrated
from tests.ledgers import unguard

NOW = datetime(2026, 5, 1, tzinfo=UTC)
GUARDED = [
    "UPDATE event SET envelope = x'00'",
    "DELETE FROM event",
    "INSERT OR REPLACE INTO event SELECT * FROM event",
    "UPDATE merkle_node SET hash = x'00'",
    "DELETE FROM merkle_node",
    "UPDATE checkpoint SET note = ''",
    "DELETE FROM checkpoint",
]
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def draft(name: str, stream: str = "run") -> Draft:
    return Draft(
        event_id=name,
        stream=stream,
        type=EventType.REQUEST,
        actor_kind="agent",
        actor_ref="external",
        correlation_id=stream,
        body={"name": name},
    )


async def fill(database: Database, count: int) -> None:
    store = LedgerStore(database, lambda: NOW)
    for n in range(count):
        await store.add("default", draft(f"e{n}"))


async def test_writers_of_many_streams_leave_no_gap_and_a_complete_tree(database: Database, url: str) -> None:
    store = LedgerStore(database, lambda: NOW)

    async def one(stream: str) -> None:
        for version in range(8):
            drafts = tuple(draft(f"{stream}-{version}-{n}", stream) for n in range(version % 3 + 1))
            expected = (await store.of_run("default", stream))[-1].version if version else 0
            wish = Append(tenant="default", stream=stream, expected=expected, drafts=drafts)
            assert (await store.append(wish)).won

    await asyncio.gather(*(one(f"run{n}") for n in range(12)))
    assert check(url, "default", 12 * 15) == 12 * 15


async def test_two_writers_of_one_version_agree_on_the_first(database: Database) -> None:
    store = LedgerStore(database, lambda: NOW)
    wishes = [
        Append(tenant="default", stream="run", expected=0, drafts=(draft(name),)) for name in ("one", "other")
    ]
    first, second = await asyncio.gather(*map(store.append, wishes))
    assert (first.won, second.won) == (True, False)
    assert [entry.body["name"] for entry in second.entries] == ["one"]
    assert (await store.append(wishes[0])).won


async def test_a_writer_that_knows_of_lost_events_is_told(database: Database) -> None:
    await fill(database, 2)
    wish = Append(tenant="default", stream="run", expected=3, drafts=(draft("late"),))
    with pytest.raises(LedgerBroken, match="ends at version 2, its writer saw 3"):
        await LedgerStore(database, lambda: NOW).append(wish)


async def test_a_failing_job_leaves_those_queued_with_it_alone(database: Database, url: str) -> None:
    store = LedgerStore(database, lambda: NOW)
    wishes = [
        Append(tenant="default", stream=f"s{n}", expected=0, drafts=(draft(f"e{n}", f"s{n}"),))
        for n in range(9)
    ]
    good = [store.append(wish) for wish in wishes]
    bad = [store.append(Append(tenant="default", stream="t", expected=5, drafts=(draft("x", "t"),)))]
    results = await asyncio.gather(*good[:4], *bad, *good[4:], return_exceptions=True)
    assert [type(one).__name__ for one in results] == ["Appended"] * 4 + ["LedgerBroken"] + ["Appended"] * 5
    assert check(url, "default", 9) == 9


@pytest.mark.parametrize("change", GUARDED)
async def test_the_database_refuses_to_change_what_stands(database: Database, change: str) -> None:
    await fill(database, 4)
    note = text("INSERT INTO checkpoint VALUES ('default', 4, x'00', 'note', 'key')")

    def work(link: Connection) -> None:
        link.execute(note)
        link.execute(text(change))

    with pytest.raises(DBAPIError, match="only ever added"):
        await database.write(work)


async def test_a_head_that_does_not_fit_its_size_stops_appends(database: Database) -> None:
    await fill(database, 3)
    await database.write(lambda link: link.execute(HEAD.update().values(size=7)))
    with pytest.raises(LedgerBroken, match="the head of log default"):
        await fill(database, 5)


async def test_logs_from_before_the_tree_get_one(tmp_path: Path) -> None:
    url = migrated(f"sqlite:///{tmp_path / 'old.db'}")
    database = Database(url)
    await fill(database, 11)
    with database.engine.begin() as link:
        expected = link.execute(select(HEAD.c.size, HEAD.c.peaks)).one()
        unguard(link)
        for change in ("DROP TABLE merkle_node", "DROP TABLE checkpoint", "ALTER TABLE log_head DROP peaks"):
            link.execute(text(change))
    from alembic import command

    from activities.services.migrations import _config

    with database.engine.begin() as link:
        config = _config()
        config.attributes["connection"] = link
        command.stamp(config, "0001")
        command.upgrade(config, "0002")
        assert link.execute(select(HEAD.c.size, HEAD.c.peaks)).one() == expected
    database.close()
    assert check(url, "default", 11) == 11


def test_a_writer_killed_twenty_times_loses_nothing_it_acknowledged(url: str) -> None:
    result = killed(url, 20, random.Random(5))
    assert result["kept"] >= result["acknowledged"] >= 20


@given(st.dictionaries(st.text(max_size=5), plain, max_size=5))
@settings(max_examples=300, deadline=None)
def test_canonical_bytes_are_those_of_rfc_8785(value: dict[str, object]) -> None:
    try:
        expected = rfc8785.dumps(value)  # pyright: ignore[reportArgumentType]
    except (ValueError, UnicodeError):
        with pytest.raises(ValueError):
            canonical(value)
    else:
        assert canonical(value) == expected


async def test_events_read_back_are_those_written(database: Database) -> None:
    await fill(database, 3)
    rows = await database.read(lambda link: link.execute(select(EVENT.c.seq, EVENT.c.version)).all())
    assert [tuple(row) for row in rows] == [(1, 1), (2, 2), (3, 3)]
