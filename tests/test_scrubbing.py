"""Whatever is changed in a log is found by going round it, and nothing else is."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from activities.services import scrubbing
from activities.services.database import Database
from activities.services.ledger_store import add_all_in
from activities.services.merkle import leaf_hash
from activities.services.scrubbing import Scrub, check_slice
from models.errors import LedgerBroken
from tests.databases import migrated
from tests.ledgers import asked, unguard

NOW = datetime(2026, 5, 1, tzinfo=UTC)
COLUMNS = ("event_id", "stream", "version", "type", "correlation_id", "recorded_at", "leaf_hash")
MOST = 45


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four events each, so that small logs have many."""
    monkeypatch.setattr(scrubbing, "LEVEL", 2)
    monkeypatch.setattr(scrubbing, "WIDTH", 4)


@contextmanager
def log_of(size: int) -> Iterator[Database]:
    with tempfile.TemporaryDirectory() as folder:
        url = migrated(f"sqlite:///{Path(folder) / 'ledger.db'}")
        database = Database(url)
        drafts = [asked(f"e{number}", f"s{number % 3}", number=number) for number in range(size)]
        with database.engine.begin() as link:
            add_all_in(link, [("acme", draft) for draft in drafts], NOW)
            unguard(link)
        yield database
        database.close()


def go_round(link: Connection) -> int:
    """How many slices there are."""
    start, count = 0, 0
    while True:
        start, count = check_slice(link, "acme", start), count + 1
        if start == 0:
            return count


def forge(link: Connection, seq: int) -> None:
    """Another event, its hash beside it, and every subtree above made to fit: only the head is left."""
    row = link.execute(text("SELECT envelope FROM event WHERE seq = :seq"), {"seq": seq}).scalar_one()
    data = bytes(row).replace(b'"number":', b'"number":7')
    leaf = leaf_hash(data)
    values = {"data": data, "leaf": leaf.hex(), "seq": seq}
    link.execute(text("UPDATE event SET envelope = :data, leaf_hash = :leaf WHERE seq = :seq"), values)
    link.execute(text("UPDATE merkle_node SET hash = randomblob(32) WHERE (:seq - 1) >> level = idx"), values)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(0, MOST))
def test_a_log_of_any_size_that_nobody_changed_is_sound(size: int) -> None:
    with log_of(size) as database, database.engine.connect() as link:
        assert go_round(link) == max(1, -(-size // 4))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), size=st.integers(1, MOST))
def test_any_change_to_an_event_is_found_and_named_by_its_slice(data: st.DataObject, size: int) -> None:
    seq = data.draw(st.integers(1, size))
    change = data.draw(st.sampled_from((*COLUMNS, "envelope", "gone", "forged", "moved")))
    with log_of(size) as database:
        with database.engine.begin() as link:
            where = {"seq": seq}
            if change == "gone":
                link.execute(text("DELETE FROM event WHERE seq = :seq"), where)
            elif change == "moved":
                link.execute(text("UPDATE event SET seq = 1000 WHERE seq = :seq"), where)
            elif change == "forged":
                forge(link, seq)
            elif change in ("version", "recorded_at"):
                link.execute(text(f"UPDATE event SET {change} = {change} + 1000 WHERE seq = :seq"), where)
            elif change == "envelope":
                put = "UPDATE event SET envelope = CAST(envelope || ' ' AS BLOB) WHERE seq = :seq"
                link.execute(text(put), where)
            else:
                link.execute(text(f"UPDATE event SET {change} = {change} || 'x' WHERE seq = :seq"), where)
        with database.engine.connect() as link:
            for start in range(0, size, 4):
                if start < seq <= start + 4:
                    with pytest.raises(LedgerBroken, match="log acme, event"):
                        check_slice(link, "acme", start)
                elif change != "forged":
                    check_slice(link, "acme", start)


def test_a_head_that_was_changed_is_found_by_any_slice() -> None:
    with log_of(9) as database, database.engine.begin() as link:
        link.execute(text("UPDATE log_head SET peaks = randomblob(64)"))
        for start in (0, 4, 8):
            with pytest.raises(LedgerBroken):
                check_slice(link, "acme", start)


async def test_rounds_go_on_where_they_ended_and_stay_where_something_is_wrong() -> None:
    with log_of(20) as database:
        scrub, seen = Scrub(database), list[int]()
        for _ in range(4):
            await scrub.go_on("acme")
            seen.append(scrub._next["acme"])
        assert seen == [8, 16, 0, 8]
        with database.engine.begin() as link:
            link.execute(text("UPDATE event SET type = 'receipt' WHERE seq = 10"))
        for _ in range(2):
            with pytest.raises(LedgerBroken, match="event 10: "):
                await scrub.go_on("acme")


async def test_a_log_that_grows_meanwhile_is_no_matter() -> None:
    with log_of(5) as database:
        scrub = Scrub(database)

        def grow(link: Connection, number: int) -> None:
            add_all_in(link, [("acme", asked(f"more{number}"))], NOW)

        for number in range(30):
            await asyncio.gather(
                database.write(lambda link, number=number: grow(link, number)), scrub.go_on("acme")
            )
