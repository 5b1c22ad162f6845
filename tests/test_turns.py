"""Processes that share a file take turns, and nobody waits for ever for one that stopped."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from activities.services.database import Database
from activities.services.turns import Turns

LONG = 60


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "turns")


@pytest.fixture
def stopped(path: str) -> Iterator[int]:
    """Another process that has its turn and does not go on."""
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    yield file
    os.close(file)


def is_free(path: str) -> bool:
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def test_only_one_has_its_turn_at_a_time(path: str) -> None:
    inside, seen, several = 0, list[int](), [Turns(path, LONG) for _ in range(4)]

    def often(turns: Turns) -> None:
        nonlocal inside
        for _ in range(50):
            with turns:
                inside += 1
                seen.append(inside)
                inside -= 1

    threads = [threading.Thread(target=often, args=(turns,)) for turns in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 200
    for turns in several:
        turns.close()
    assert is_free(path)


def test_a_turn_ends_with_what_was_done_in_it(path: str) -> None:
    turns = Turns(path)
    with pytest.raises(ValueError, match="failed"), turns:
        assert not is_free(path)
        raise ValueError("failed")
    assert is_free(path)
    turns.close()


def test_a_holder_that_stopped_is_passed_over(path: str, stopped: int) -> None:
    turns = Turns(path, courtesy=0.01)
    for _ in range(3):
        with turns:
            assert not is_free(path)
    turns.close()


def test_who_gave_up_gives_back_a_turn_that_comes_late(path: str, stopped: int) -> None:
    turns, again = Turns(path, courtesy=0.01), Turns(path, LONG)
    with turns:
        pass
    fcntl.flock(stopped, fcntl.LOCK_UN)
    with again, turns:
        assert not is_free(path)
    again.close()
    turns.close()


def test_who_dies_in_its_turn_leaves_it_to_the_next(path: str) -> None:
    dying, turns = Turns(path), Turns(path, LONG)
    entered, done = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        with turns:
            done.set()

    dying.__enter__()
    thread = threading.Thread(target=wait)
    thread.start()
    assert entered.wait(LONG)
    # The kernel takes back what a process held when it ends, as it does when a file is closed.
    dying.close()
    thread.join(LONG)
    assert done.is_set()
    turns.close()


def test_a_memory_and_a_server_need_no_turns() -> None:
    turns = Turns(None)
    for _ in range(2):
        with turns:
            pass
    turns.close()


async def test_writes_go_on_beside_a_process_that_stopped_in_its_turn(tmp_path: Path) -> None:
    file = os.open(tmp_path / "a.db-turns", os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    await database.write(lambda link: link.execute(text("CREATE TABLE t (a)")) and None)
    await database.write(lambda link: link.execute(text("INSERT INTO t VALUES (1)")) and None)
    assert await database.read(lambda link: link.execute(text("SELECT a FROM t")).scalar_one()) == 1
    database.close()
    os.close(file)


async def test_a_file_that_stays_locked_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activities.services.database.BUSY_MILLISECONDS", 1)
    url = f"sqlite:///{tmp_path / 'locked.db'}"
    ours, theirs = Database(url), Database(url)
    with theirs.engine.connect() as link:
        link.connection.cursor().execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            await ours.write(lambda connection: connection.execute(text("CREATE TABLE t (n INTEGER)")))
        link.connection.rollback()
    await ours.write(lambda connection: connection.execute(text("CREATE TABLE t (n INTEGER)")))
    for one in (ours, theirs):
        one.close()
