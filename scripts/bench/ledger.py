"""What durable appends cost: `python -m scripts.bench ledger [--postgres] [--kills 100] [--rounds 0]`.

Everything runs beside a floor, a bare driver that commits each event by itself, with the same bytes, the same
tree nodes and the same pragmas, and on SQLite beside the `eventsourcing` library. Rounds alternate in every
order, so that a busy machine slows all of them; ratios are of rounds side by side. Afterwards a writer is
killed again and again, which is all there is with `--rounds 0`. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import cycle, permutations
from pathlib import Path
from typing import Any

from sqlalchemy import func, make_url, select

from activities.services.database import Database, to_micros
from activities.services.envelopes import envelope
from activities.services.ledger_store import EVENT, HEAD, NODE, LedgerStore
from activities.services.merkle import extend, leaf_hash, node_count, pack, root_of, unpack
from activities.services.migrations import migrate
from models.ledger import Append, Draft, EventType

FORKS = multiprocessing.get_context("forkserver")
ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
PEER = ROOT / "scripts" / "bench" / "peers" / "eventsourcing_store.py"
POSTGRES = ROOT / "scripts" / "targets" / "postgres.sh"
HEAD_SQL = "SELECT size, peaks FROM log_head WHERE log_id = ?"
EVENT_SQL = (
    "INSERT INTO event (log_id, seq, event_id, stream, version, type, correlation_id, recorded_at, envelope, "
    "leaf_hash) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
NODE_SQL = "INSERT INTO merkle_node (log_id, level, idx, hash) VALUES (?, ?, ?, ?)"
GROW_SQL = "UPDATE log_head SET size = ?, peaks = ? WHERE log_id = ?"


@dataclass(slots=True)
class Measured:
    """Appends of one round, over all processes."""

    seconds: float = 0
    cpu: float = 0
    """Seconds that its processors worked; less of a matter of what else the machine does."""
    took: list[float] = field(default_factory=list[float])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of a peer: its version and what its connections were set to."""

    @property
    def rate(self) -> float:
        """Appends a second."""
        return len(self.took) / self.seconds


def main(argv: Sequence[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench ledger", description=__doc__)
    parser.add_argument("--database", help="also this one, a SQLAlchemy URL; its tables get new logs")
    parser.add_argument("--postgres", action="store_true", help="also a PostgreSQL started for this")
    parser.add_argument("--seconds", type=float, default=1, help="of one round; short ones see the same disk")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--folder", help="where the files go; the disk decides")
    options = parser.parse_args(argv)
    FORKS.set_forkserver_preload([__name__])
    report: dict[str, Any] = {"eventsourcing": PEERS.exists() or "not measured, `make peers` installs it"}
    with tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as folder:
        report["sqlite"] = measure(f"sqlite:///{Path(folder) / 'ledger.db'}", options)
        if options.database:
            report["given"] = measure(options.database, options)
        if options.postgres:
            with postgres(Path(folder)) as url:
                report["postgresql"] = measure(url, options)
    print(json.dumps(report, indent=2))
    return 0


@contextmanager
def postgres(folder: Path) -> Generator[str]:
    """A PostgreSQL of its own, as it is installed, by its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # The server may run as another account, which reads nothing below a folder of ours.
    folder.chmod(0o755)
    place = str(folder / "postgres")
    argv = [str(POSTGRES), "start", place, port]
    started = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    try:
        yield started.stdout.strip()
    finally:
        subprocess.run([str(POSTGRES), "stop", place], check=True)


def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """All sections on one database."""
    migrate(url)
    report: dict[str, Any] = {"fsync_ms": _fsync(url)}
    if options.rounds:
        report["one_process_64_tasks"] = _beside(url, options, processes=1, tasks=64)
        report["four_processes_16_tasks"] = _beside(url, options, processes=4, tasks=16)
    if options.kills:
        report["killed"] = killed(url, options.kills, random.Random(1))
    return report


def _fsync(url: str) -> float | None:
    """What one flush of a page costs where a SQLite file lies: it is what group commit saves."""
    place = make_url(url).database
    if not url.startswith("sqlite") or place is None:
        return None
    took = list[float]()
    with tempfile.TemporaryFile(dir=Path(place).parent) as file:
        for _ in range(50):
            file.write(os.urandom(4096))
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    return round(statistics.median(took) * 1000, 3)


def _beside(url: str, options: argparse.Namespace, processes: int, tasks: int) -> dict[str, Any]:
    place = Path(make_url(url).database or "")
    ways: dict[str, Callable[[int], Measured]] = {
        "ours": lambda _: _round(url, grouped, processes, (options.seconds, tasks)),
        "one_commit_per_event": lambda _: _round(url, floor, processes, (options.seconds,)),
    }
    if PEERS.exists() and url.startswith("sqlite"):
        ways["eventsourcing"] = lambda number: _peer(
            f"{place}-peer-{processes}-{number}", options.seconds, processes, tasks
        )
    seen = {name: list[Measured]() for name in ways}
    # In every order: a disk that was just written to hard serves the next one worse.
    orders = cycle(permutations(ways))
    for number in range(options.rounds):
        for name in next(orders):
            seen[name].append(ways[name](number))
    others = [name for name in ways if name != "ours"]
    said: dict[str, Any] = {name: _said(seen[name]) for name in ways}
    return said | {f"times_{name}": _times(seen["ours"], seen[name]) for name in others}


def _said(rounds: Sequence[Measured]) -> dict[str, Any]:
    took = sorted(one for measured in rounds for one in measured.took)
    return {
        "appends_per_second": round(statistics.median(measured.rate for measured in rounds)),
        "p50_ms": round(took[len(took) // 2] * 1000, 1),
        "p99_ms": round(took[len(took) * 99 // 100] * 1000, 1),
        "cpu_us": round(statistics.median(measured.cpu / len(measured.took) for measured in rounds) * 1e6, 1),
        **rounds[0].settings,
    }


def _times(ours: Sequence[Measured], theirs: Sequence[Measured]) -> dict[str, Any]:
    """How many times as fast, of rounds side by side."""
    pairs = [(one.rate, other.rate) for one, other in zip(ours, theirs, strict=True)]
    times = [one / other for one, other in pairs]
    said = {"min": min(times), "median": statistics.median(times), "max": max(times)}
    rounds = [f"{one:.0f} to {other:.0f}" for one, other in pairs]
    return {name: round(value, 2) for name, value in said.items()} | {"rounds": rounds}


def _peer(file: str, seconds: float, processes: int, threads: int) -> Measured:
    """A round of the `eventsourcing` library: events as large as ours, as many at once."""
    draft = _draft(_name())
    size = len(envelope(_log(), draft, 1, 1, _now()))
    numbers = [str(value) for value in (seconds, processes, threads, size)]
    argv = [str(PEERS), "-B", str(PEER), file, *numbers]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    said: dict[str, Any] = json.loads(done.stdout)
    parts: list[tuple[float, list[float]]] = said.pop("parts")
    whole = Measured(max(part[0] for part in parts), said.pop("cpu"), settings=said)
    whole.took = [one for part in parts for one in part[1]]
    return whole


def _round(url: str, work: Callable[..., None], processes: int, arguments: tuple[Any, ...]) -> Measured:
    log, results = _log(), FORKS.SimpleQueue()
    ready = FORKS.Barrier(processes)
    started = [
        FORKS.Process(target=work, args=(url, log, ready, results, *arguments)) for _ in range(processes)
    ]
    for process in started:
        process.start()
    parts: list[Measured] = [results.get() for _ in started]
    for process in started:
        process.join()
    check(url, log, sum(len(part.took) for part in parts))
    whole = Measured(max(part.seconds for part in parts), sum(part.cpu for part in parts))
    whole.took = [one for part in parts for one in part.took]
    return whole


def grouped(url: str, log: str, ready: Any, results: Any, seconds: float, tasks: int) -> None:
    """The ledger as it is, in one process."""
    results.put(asyncio.run(_grouped(url, log, ready, seconds, tasks)))


async def _grouped(url: str, log: str, ready: Any, seconds: float, tasks: int) -> Measured:
    database = Database(url)
    store = LedgerStore(database, _now)
    measured = Measured()
    await database.read(lambda link: link.execute(select(HEAD.c.size)).first())
    start, worked = _begin(ready)

    async def one() -> None:
        stream, version = _name(), 0
        while time.perf_counter() - start < seconds:
            began = time.perf_counter()
            wish = Append(tenant=log, stream=stream, expected=version, drafts=(_draft(stream),))
            won = (await store.append(wish)).won
            version += 1
            measured.took.append(time.perf_counter() - began)
            if not won:
                raise RuntimeError(f"stream {stream} has another writer")

    await asyncio.gather(*(one() for _ in range(tasks)))
    measured.seconds, measured.cpu = time.perf_counter() - start, time.process_time() - worked
    database.close()
    return measured


def _begin(ready: Any) -> tuple[float, float]:
    """When everybody is ready: the time, and how long this process has worked."""
    # As workers do once they have started.
    gc.collect()
    gc.freeze()
    ready.wait()
    return time.perf_counter(), time.process_time()


def floor(url: str, log: str, ready: Any, results: Any, seconds: float) -> None:
    """A bare driver, one event after the other, each with its own commit."""
    database = Database(url)
    raw = database.engine.raw_connection()
    measured, stream, version = Measured(), _name(), 0
    append = _bare(raw, database.engine.dialect.name, log)
    start, worked = _begin(ready)
    while (began := time.perf_counter()) - start < seconds:
        version += 1
        append(_draft(stream), version)
        measured.took.append(time.perf_counter() - began)
    measured.seconds, measured.cpu = time.perf_counter() - start, time.process_time() - worked
    raw.close()
    database.close()
    results.put(measured)


def _bare(raw: Any, dialect: str, log: str) -> Callable[[Draft, int], None]:
    """As few statements as an event, its tree nodes and the head can be written in."""
    sqlite, cursor = dialect == "sqlite", raw.cursor()
    event, node, grow, look = (
        sql if sqlite else sql.replace("?", "%s") for sql in (EVENT_SQL, NODE_SQL, GROW_SQL, HEAD_SQL)
    )
    look += "" if sqlite else " FOR UPDATE"
    first = "INSERT INTO log_head (log_id, size, peaks) VALUES (?, 0, ?) ON CONFLICT DO NOTHING"
    cursor.execute(first if sqlite else first.replace("?", "%s"), (log, b""))
    raw.commit()

    def append(draft: Draft, version: int) -> None:
        if sqlite:
            cursor.execute("BEGIN IMMEDIATE")
        size, peaks = cursor.execute(look, (log,)).fetchone()
        now = _now()
        data = envelope(log, draft, size + 1, version, now)
        leaf = leaf_hash(data)
        grown, nodes = extend(size, unpack(size, bytes(peaks)), [leaf])
        known = (log, size + 1, draft.event_id, draft.stream, version, draft.type.value, draft.correlation_id)
        cursor.execute(event, (*known, to_micros(now), data, leaf.hex()))
        for one in nodes:
            cursor.execute(node, (log, one.level, one.index, one.hash))
        cursor.execute(grow, (size + 1, pack(grown), log))
        raw.commit()

    return append


def killed(url: str, times: int, chance: random.Random) -> dict[str, Any]:
    """Kill a writer in the middle of its work, again and again; what it was told is kept must be there."""
    log, told = _log(), 0
    FORKS.set_forkserver_preload([__name__])
    for _ in range(times):
        reader, writer = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=endless, args=(url, log, writer))
        process.start()
        writer.close()
        for _ in range(chance.randrange(1, 60)):
            reader.recv()
            told += 1
        process.kill()
        process.join()
        with suppress(EOFError):
            while True:
                reader.recv()
                told += 1
        reader.close()
    kept = check(url, log, told)
    return {"kills": times, "acknowledged": told, "kept": kept, "gapless": True, "complete": True}


def endless(url: str, log: str, told: Any) -> None:
    """Append on sixteen tasks until killed, and tell of each append that was acknowledged."""
    asyncio.run(_endless(url, log, told))


async def _endless(url: str, log: str, told: Any) -> None:
    store = LedgerStore(Database(url), _now)

    async def one() -> None:
        stream, version = _name(), 0
        while True:
            wish = Append(tenant=log, stream=stream, expected=version, drafts=(_draft(stream),))
            await store.append(wish)
            version += 1
            told.send_bytes(b"\x80\x04N.")

    await asyncio.gather(*(one() for _ in range(16)))


def check(url: str, log: str, told: int) -> int:
    """Assert that a log is whole and holds at least what was acknowledged; returns its size.

    Raises:
        RuntimeError: it is not.
    """
    database = Database(url)
    with database.engine.connect() as link:
        size, peaks = link.execute(select(HEAD.c.size, HEAD.c.peaks).where(HEAD.c.log_id == log)).one()
        rows = link.execute(
            select(EVENT.c.seq, EVENT.c.leaf_hash).where(EVENT.c.log_id == log).order_by(EVENT.c.seq)
        ).all()
        nodes = link.execute(select(func.count()).where(NODE.c.log_id == log)).scalar_one()
    database.close()
    grown, _ = extend(0, [], [bytes.fromhex(row.leaf_hash) for row in rows])
    gapless = [row.seq for row in rows] == list(range(1, size + 1))
    if not (gapless and nodes == node_count(size) and root_of(grown) == root_of(unpack(size, peaks))):
        raise RuntimeError(f"log {log} of {size} events is not whole")
    if size < told:
        raise RuntimeError(f"log {log} lost {told - size} acknowledged events")
    return int(size)


def _draft(stream: str) -> Draft:
    key = f"{random.getrandbits(256):064x}"
    return Draft(
        event_id=f"{random.getrandbits(128):032x}",
        stream=stream,
        type=EventType.APPLY,
        actor_kind="worker",
        actor_ref="act",
        correlation_id=stream,
        body={"key": f"{key}.0", "digest": key, "action": 0, "attempt": 1},
    )


def _log() -> str:
    """As long as tenants' names are: it stands in every index."""
    return f"bench-{uuid.uuid4().hex[:8]}"


def _name() -> str:
    return f"bench-{uuid.uuid4()}"


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
