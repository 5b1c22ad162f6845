"""One database for everything that must last: group-committed writes on one thread, reads beside it.

Every write of a process goes through its single writer, which puts whatever has queued up meanwhile into one
transaction: one fsync for many appends, and one pass for those that can share even more (`Shared`). Work
functions must be pure towards the outside, since a batch whose commit fails is reported to all of its members
as failed, and one in which a job fails is run again.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Generic, NamedTuple, TypeVar, cast

from sqlalchemy import Connection, Table, create_engine, event
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.dialects.sqlite import Insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from activities.services.statements import run_plain
from activities.services.turns import Turns
from models.errors import InvalidInput

Item = TypeVar("Item")
T = TypeVar("T")
BATCH = 128
LINGER_SECONDS = 0.0005
CROWD_SECONDS = 0.002
PRAGMAS = (
    "journal_mode=wal",
    "synchronous=full",
    # A batch of appends writes much the same pages of the indexes as the one before. SQLite's own 1000 pages
    # hold five batches, and then all of them are written once more, by a commit that others wait for.
    "wal_autocheckpoint=4000",
    "foreign_keys=on",
    # So that the guards of the ledger see what INSERT OR REPLACE takes away.
    "recursive_triggers=on",
)
BUSY_MILLISECONDS = 30_000
TURN = (
    "SELECT set_config('idle_in_transaction_session_timeout', '10s', true), "
    "pg_advisory_xact_lock(427071729268)"
)
"""PostgreSQL has as many writers as there are processes. Their batches hold rows in the order in which jobs
came, so that they would wait for each other: it gets one at a time, as SQLite has. One that is stopped in its
turn loses it."""
ALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
"""For PostgreSQL (libpq): a link that died without a word holds the writer for 25 seconds, not for hours."""


class Shared(NamedTuple, Generic[Item, T]):
    """Work that costs less when it is done at once for all who want it."""

    many: Callable[[Connection, Sequence[Item]], Sequence[T]]
    """Does it for each, in this order; one failure fails all, which are then done one by one."""
    item: Item

    def __call__(self, connection: Connection) -> T:
        """Do it for this one alone."""
        return self.many(connection, [self.item])[0]


class _Job(NamedTuple):
    work: Callable[[Connection], Any]
    future: Future[Any] | asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop | None
    """Where the future lives, if it is asyncio's."""


class _Failed(NamedTuple):
    """What a job came to that raised."""

    error: BaseException


class Database:
    """A database by SQLAlchemy URL; SQLite and PostgreSQL."""

    def __init__(self, url: str) -> None:
        """Open nothing yet; the first use connects."""
        self.engine = _engine(url)
        self.first: Callable[[], object] | None = None
        """What has to answer before this process takes its turn, since others wait for the end of that."""
        self._turns = Turns(_turns_of(self.engine))
        self._jobs: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._arrived = dict[asyncio.AbstractEventLoop, list[_Job]]()
        """What came in one turn of a loop, until it is handed over all at once."""
        self._crowd = 1
        """How many were served last time; they are likely to come back."""

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a durable transaction, together with what others queued; all or nothing for each."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        job = _Job(work, future, loop)
        with self._lock:
            arrived = self._arrived.get(loop)
            if arrived is None:
                self._start()
                # Whoever is woken by one commit comes back in one turn of the loop. A writer that is woken by
                # the first of them contends with all the others for the interpreter.
                arrived = self._arrived[loop] = []
                loop.call_soon(self._hand_over, loop)
            arrived.append(job)
        return await future

    def submit(self, work: Callable[[Connection], T]) -> Future[T]:
        """Queue `work` for the writer from any thread."""
        future: Future[T] = Future()
        with self._lock:
            self._start()
            self._jobs.put([_Job(work, future, None)])
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
            self._closed, writer, loops = True, self._writer, list(self._arrived)
        for loop in loops:
            self._hand_over(loop)
        if writer is not None:
            self._jobs.put(None)
            writer.join()
        self._turns.close()
        self.engine.dispose()

    def _start(self) -> None:
        if self._closed:
            raise RuntimeError("the database is closed")
        if self._writer is None:
            self._writer = threading.Thread(target=self._run, name="database-writer", daemon=True)
            self._writer.start()

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            jobs = self._arrived.pop(loop, [])
            for start in range(0, len(jobs), BATCH):
                self._jobs.put(jobs[start : start + BATCH])

    def _run(self) -> None:
        going = True
        while going and (batch := self._jobs.get()) is not None:
            going = self._gather(batch, time.monotonic() + CROWD_SECONDS)
            try:
                if self.first is not None:
                    self.first()
                with self._turns:
                    # Others may have come while another process had its turn.
                    going = going and self._gather(batch, 0)
                    batch = [job for job in batch if _is_wanted(job)]
                    outcomes = self._commit(batch)
            except BaseException as error:
                outcomes = [_Failed(error)] * len(batch)
            self._crowd = len(batch)
            _deliver(batch, outcomes)

    def _gather(self, batch: list[_Job], until: float) -> bool:
        """Take what has queued up, and linger for those who came along last time; False at the end."""
        with suppress(queue.Empty):
            while len(batch) < BATCH:
                lingers = len(batch) < self._crowd and time.monotonic() < until
                jobs = self._jobs.get(lingers, LINGER_SECONDS)
                if jobs is None:
                    return False
                batch += jobs
        return True

    def _commit(self, batch: list[_Job]) -> list[Any]:
        """What each job came to, in order."""
        try:
            return self._together(batch)
        except _OneFailed:
            return self._apart(batch)

    def _together(self, batch: list[_Job]) -> list[Any]:
        """All jobs in one transaction; savepoints cost more than the jobs do, and are seldom needed."""
        if not batch:
            return []
        with self.engine.begin() as connection:
            try:
                return [one for _, some in groupby(batch, _kind) for one in _do(connection, list(some))]
            except Exception as error:
                if len(batch) == 1:
                    raise
                raise _OneFailed from error

    def _apart(self, batch: list[_Job]) -> list[Any]:
        """The same, so that a job that fails leaves the others alone."""
        with self.engine.begin() as connection:
            return [_attempt(connection, job) for job in batch]


class _OneFailed(Exception):
    """A job of a batch failed; nothing of the batch was kept."""


def _kind(job: _Job) -> object:
    return job.work.many if isinstance(job.work, Shared) else None


def _do(connection: Connection, jobs: list[_Job]) -> Sequence[Any]:
    """Run neighbours of one kind."""
    first = jobs[0].work
    if not isinstance(first, Shared):
        return [job.work(connection) for job in jobs]
    many: Shared[Any, Any] = first
    items = [job.work.item for job in jobs]  # pyright: ignore[reportFunctionMemberAccess]
    results = many.many(connection, items)
    if len(results) != len(items):
        raise ValueError(f"{len(results)} results for {len(items)} jobs; work that is shared answers each")
    return results


def _attempt(connection: Connection, job: _Job) -> Any:
    """Run one job in a savepoint, so that its failure does not undo its neighbours."""
    savepoint = connection.begin_nested()
    try:
        result = job.work(connection)
        savepoint.commit()
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        savepoint.rollback()
        return _Failed(error)
    except Exception as error:
        savepoint.rollback()
        return _Failed(error)
    return result


def _is_wanted(job: _Job) -> bool:
    future = job.future
    return future.set_running_or_notify_cancel() if isinstance(future, Future) else not future.cancelled()


def _deliver(batch: list[_Job], outcomes: list[Any]) -> None:
    """Hand results over; waking a loop once per batch and not once per job saves much of a batch's time."""
    for loop in {job.loop for job in batch}:
        part = [(job.future, what) for job, what in zip(batch, outcomes, strict=True) if job.loop is loop]
        if loop is None:
            _settle(part)
        else:
            # A loop that was closed has nobody who waits.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, part)


def _settle(done: list[tuple[Future[Any] | asyncio.Future[Any], Any]]) -> None:
    for future, what in done:
        if future.done():
            continue
        if isinstance(what, _Failed):
            future.set_exception(what.error)
        else:
            future.set_result(what)


def _turns_of(engine: Engine) -> str | None:
    """Where processes meet that share a file."""
    file = engine.url.database
    shared = engine.dialect.name == "sqlite" and file and file != ":memory:"
    return f"{file}-turns" if shared else None


def insert_for(dialect: str) -> Callable[[Table], Insert]:
    """The INSERT of a dialect, which knows `on_conflict_…`; typed as SQLite's, PostgreSQL's has the same."""
    return sqlite_insert if dialect == "sqlite" else cast("Callable[[Table], Insert]", pg_insert)


def to_micros(moment: datetime) -> int:
    """Aware time to integer microseconds since 1970."""
    delta = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def from_micros(value: int) -> datetime:
    """Integer microseconds since 1970 to aware UTC."""
    seconds, micros = divmod(value, 1_000_000)
    return datetime.fromtimestamp(seconds, tz=UTC).replace(microsecond=micros)


def _engine(url: str) -> Engine:
    sqlite = url.startswith("sqlite")
    engine = _sqlite(url) if sqlite else _postgres(url)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        # A deferred transaction that turns into a writer later can fail at once instead of waiting.
        writer = threading.current_thread().name == "database-writer"
        # Half of what a short transaction costs would be SQLAlchemy's own way of running this one statement.
        if sqlite:
            run_plain(connection, "BEGIN IMMEDIATE" if writer else "BEGIN")
        elif writer:
            run_plain(connection, TURN)

    return engine


def _postgres(url: str) -> Engine:
    engine = create_engine(url, pool_pre_ping=True, connect_args=ALIVE | {"client_encoding": "utf8"})

    @event.listens_for(engine, "connect")
    def _encoding(raw: Any, _record: object) -> None:  # pyright: ignore[reportUnusedFunction]
        kept = raw.info.parameter_status("server_encoding")
        if kept != "UTF8":
            remedy = "it cannot keep every text; make one with ENCODING 'UTF8' TEMPLATE template0"
            raise InvalidInput.field("database", f"{raw.info.dbname} in {kept}", remedy)

    return engine


def _sqlite(url: str) -> Engine:
    engine = create_engine(
        url, connect_args={"timeout": BUSY_MILLISECONDS / 1000, "check_same_thread": False}
    )

    @event.listens_for(engine, "connect")
    def _pragmas(raw: Any, _record: object) -> None:  # pyright: ignore[reportUnusedFunction]
        raw.isolation_level = None
        for pragma in PRAGMAS:
            raw.execute(f"PRAGMA {pragma}").close()

    return engine
