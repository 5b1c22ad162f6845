"""No room: what was acknowledged stands, nothing stands by half, and all goes on once there is room again."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from activities.connectors.base import Work
from activities.connectors.null import Null
from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.erasure import Erasure
from activities.services.ledger_store import LedgerStore
from activities.services.vault import load_keys
from activities.services.witness_state import EVIDENCE, Seen, State
from models.errors import MemoryUnavailable
from models.ledger import Draft, EventType
from models.settings import EncryptionSettings

NOW = datetime(2026, 5, 1, tzinfo=UTC)
KEY = f"{'a' * 64}.0"


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_note_that_finds_no_room_does_not_stand_by_half(tmp_path: Path) -> None:
    target, work = Null(tmp_path, lambda: NOW), Work("note", {"text": "x" * 5000})
    deadline = NOW + timedelta(minutes=1)
    with room_for(1000), pytest.raises(OSError):
        await target.apply(KEY, work, "0", deadline)
    assert await target.find(KEY, work) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    await target.apply(KEY, work, "0", deadline)
    assert target.standing() == (KEY,)


def test_evidence_that_finds_no_room_is_kept_whole_when_it_is_shown_again(tmp_path: Path) -> None:
    state = State(tmp_path, "witness.example.com/w1")
    state.remember("log", Seen(note="a note\n" * 100))
    with room_for(200), pytest.raises(OSError):
        state.keep_evidence("log", "another note\n")
    state.keep_evidence("log", "another note\n")
    kept = [path.read_text() for path in (tmp_path / EVIDENCE).glob("*.txt")]
    assert kept == ["a note\n" * 100 + "\nanother note\n"]
    state.close()


def test_a_key_that_finds_no_room_is_not_there_by_half(tmp_path: Path) -> None:
    settings = EncryptionSettings(enabled=True)
    with room_for(10), pytest.raises(OSError):
        load_keys(settings, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    load_keys(settings, tmp_path)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


async def test_an_erasure_that_finds_no_room_says_so_and_is_ended_once_there_is(
    database: Database, tmp_path: Path
) -> None:
    content, erasure = ContentStore(database), Erasure(database, lambda: NOW)
    await content.put("default", b"mine", subject="ann")
    await content.put("default", b"others" * 100_000)
    await database.read(lambda link: link.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all())
    with room_for(300_000), pytest.raises(MemoryUnavailable, match="make room"):
        await erasure.forget("default", "ann", "ops")
    assert sum((await erasure.forget("default", "ann", "ops")).left.values()) == 0


async def test_what_was_logged_before_the_disk_was_full_stands_and_the_log_goes_on_after(
    database: Database, tmp_path: Path
) -> None:
    ledger = LedgerStore(database, lambda: NOW)
    logged = list[str]()

    async def log(number: int) -> None:
        draft = Draft(
            event_id=f"event-{number}",
            stream="run",
            type=EventType.REFUSAL,
            actor_kind="person",
            actor_ref="ann",
            correlation_id="run",
            body={"remedy": "x" * 2000},
        )
        await ledger.add("default", draft)
        logged.append(draft.event_id)

    await log(0)
    largest = max(path.stat().st_size for path in tmp_path.iterdir())
    with room_for(largest + 50_000):
        with pytest.raises(OperationalError, match="full|I/O"):
            for number in range(1, 1000):
                await log(number)
        assert 1 < len(logged) < 1000
        with pytest.raises(OperationalError, match="full|I/O"):
            await log(1000)
    for number in range(len(logged), len(logged) + 5):
        await log(number)
    assert [event.event_id for event in await ledger.tail("default", 2000)] == logged
    again = Database(str(database.engine.url))
    events = await LedgerStore(again, lambda: NOW).tail("default", 2000)
    assert [event.event_id for event in events] == logged
    again.close()
