"""The `eventsourcing` library's SQLite store as a peer: appends of events that are given as sizes.

`.venv-peers/bin/python scripts/bench/peers/eventsourcing_store.py FILE SECONDS PROCESSES THREADS BYTES` says
in one line of JSON what each process took, and the pragmas that its connections had. One recorder per
process, one event per `insert_events`, each thread its own aggregate. Imports nothing of the product.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import random
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
PATIENCE = 60
"""A writer waits that long for its turn, and no longer."""


def recorder(file: str) -> Any:
    """A store as durable as ours: journal in WAL mode, flushed with every commit."""
    store: Any = importlib.import_module("eventsourcing.sqlite")

    class Durable(store.SQLiteConnectionPool):
        """Connections that flush, whatever SQLite was built to do."""

        def _create_connection(self) -> Any:
            made = super()._create_connection()
            made.cursor().execute("PRAGMA synchronous=full")
            return made

    datastore = store.SQLiteDatastore(file)
    datastore.pool = Durable(db_name=file, lock_timeout=PATIENCE, pool_timeout=PATIENCE)
    made = store.SQLiteApplicationRecorder(datastore)
    made.create_table()
    return made


def pragmas(made: Any) -> dict[str, Any]:
    """What its connections are set to."""
    with made.datastore.transaction(commit=False) as cursor:
        said = dict[str, Any]()
        for name in ("journal_mode", "synchronous"):
            cursor.execute(f"PRAGMA {name}")
            said[name] = cursor.fetchone()[0]
        return said


def work(file: str, seconds: float, threads: int, size: int, ready: Any, results: Any) -> None:
    """One process of appenders."""
    stored: Any = importlib.import_module("eventsourcing.persistence").StoredEvent
    made, took = recorder(file), list[float]()
    gc.collect()
    gc.freeze()
    ready.wait()
    start, worked = time.perf_counter(), time.process_time()

    def one(_: int) -> None:
        aggregate, version = uuid.uuid4(), 0
        while (began := time.perf_counter()) - start < seconds:
            version += 1
            made.insert_events([stored(aggregate, version, "apply", random.randbytes(size))])
            took.append(time.perf_counter() - began)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(threads)))
    results.put((time.perf_counter() - start, took, time.process_time() - worked))


def main(file: str, seconds: str, processes: str, threads: str, size: str) -> None:
    """Run one round."""
    made = recorder(file)
    said = pragmas(made) | {"eventsourcing": importlib.metadata.version("eventsourcing")}
    results, ready = FORKS.SimpleQueue(), FORKS.Barrier(int(processes))
    given = (file, float(seconds), int(threads), int(size), ready, results)
    started = [FORKS.Process(target=work, args=given) for _ in range(int(processes))]
    for process in started:
        process.start()
    told = [results.get() for _ in started]
    for process in started:
        process.join()
    kept = made.max_notification_id()
    if kept < sum(len(took) for _, took, _ in told):
        raise SystemExit(f"{file}: {kept} events stand, more were acknowledged")
    said |= {"parts": [part[:2] for part in told], "cpu": sum(part[2] for part in told)}
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
