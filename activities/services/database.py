"""One database for everything that must last: group-committed writes on one thread, reads beside it.

Every write of a process goes through its single writer, which puts whatever has queued up meanwhile into one
transaction: one fsync for many appends. Work functions must be pure towards the outside, since a batch whose
commit fails is reported to all of its members as failed, and one in which a job fails is run again.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

T = TypeVar("T")
BATCH = 128
BUSY_MILLISECONDS = 30_000

Job = tuple[Callable[[Connection], Any], "Future[Any]"]
Done = tuple["Future[Any]", Any, BaseException | None]


class Database:
    """A database by SQLAlchemy URL; SQLite and PostgreSQL."""

    def __init__(self, url: str) -> None:
        """Open nothing yet; the first use connects."""
        self.engine = _engine(url)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a durable transaction, together with what others queued; all or nothing for each."""
        return await asyncio.wrap_future(self.submit(work))

    def submit(self, work: Callable[[Connection], T]) -> Future[T]:
        """Queue `work` for the writer from any thread."""
        self._start()
        future: Future[T] = Future()
        self._jobs.put((work, future))
        return future

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` on a connection of its own, outside the writer's queue."""
        return await asyncio.to_thread(self.read_now, work)

    def read_now(self, work: Callable[[Connection], T]) -> T:
        """The same for code that runs in a thread already."""
        with self.engine.connect() as connection:
            return work(connection)

    def close(self) -> None:
        """Finish what is queued and give connections back."""
        with self._lock:
            self._closed, writer = True, self._writer
        if writer is not None:
            self._jobs.put(None)
            writer.join()
        self.engine.dispose()

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the database is closed")
            if self._writer is None:
                self._writer = threading.Thread(target=self._run, name="database-writer", daemon=True)
                self._writer.start()

    def _run(self) -> None:
        while (first := self._jobs.get()) is not None:
            batch, last = [first], False
            with suppress(queue.Empty):
                while len(batch) < BATCH and not last:
                    job = self._jobs.get_nowait()
                    last = job is None
                    if job is not None:
                        batch.append(job)
            self._commit([job for job in batch if job[1].set_running_or_notify_cancel()])
            if last:
                return

    def _commit(self, batch: list[Job]) -> None:
        done: list[Done] = []
        try:
            try:
                done = self._together(batch)
            except _OneFailed:
                done = self._apart(batch)
        except BaseException as error:
            done = [(future, None, error) for _, future in batch]
        for future, result, failure in done:
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _together(self, batch: list[Job]) -> list[Done]:
        """All jobs in one transaction; savepoints cost more than the jobs do, and are seldom needed."""
        with self.engine.begin() as connection:
            done: list[Done] = []
            for work, future in batch:
                try:
                    done.append((future, work(connection), None))
                except Exception as error:
                    if len(batch) == 1:
                        raise
                    raise _OneFailed from error
        return done

    def _apart(self, batch: list[Job]) -> list[Done]:
        """The same, so that a job that fails leaves the others alone."""
        with self.engine.begin() as connection:
            return [(future, *_attempt(connection, work)) for work, future in batch]


class _OneFailed(Exception):
    """A job of a batch failed; nothing of the batch was kept."""


def _attempt(connection: Connection, work: Callable[[Connection], Any]) -> tuple[Any, BaseException | None]:
    """Run one job in a savepoint, so that its failure does not undo its neighbours."""
    savepoint = connection.begin_nested()
    try:
        result = work(connection)
        savepoint.commit()
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        savepoint.rollback()
        return None, error
    except Exception as error:
        savepoint.rollback()
        return None, error
    return result, None


def to_micros(moment: datetime) -> int:
    """Aware time to integer microseconds since 1970."""
    delta = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def from_micros(value: int) -> datetime:
    """Integer microseconds since 1970 to aware UTC."""
    seconds, micros = divmod(value, 1_000_000)
    return datetime.fromtimestamp(seconds, tz=UTC).replace(microsecond=micros)


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(
        url, connect_args={"timeout": BUSY_MILLISECONDS / 1000, "check_same_thread": False}
    )

    @event.listens_for(engine, "connect")
    def _pragmas(raw: Any, _record: object) -> None:  # pyright: ignore[reportUnusedFunction]
        raw.isolation_level = None
        # Recursive triggers make the guards of the ledger see what INSERT OR REPLACE takes away.
        for pragma in ("journal_mode=wal", "synchronous=full", "foreign_keys=on", "recursive_triggers=on"):
            raw.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        # A deferred transaction that turns into a writer later can fail at once instead of waiting.
        writer = threading.current_thread().name == "database-writer"
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")

    return engine
