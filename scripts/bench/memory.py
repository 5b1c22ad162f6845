"""What memory costs as it grows, beside sqlite-vec and Weaviate: `python -m scripts.bench memory`.

Clustered unit vectors and short texts; every answer is judged by a float64 search that shares no code with
the product. Ours and the peers hold the same vectors and take turns, query by query. Writes are whole: text,
record, words and contract in one durable commit, without a model. Prints JSON, and draws the curve.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from sqlalchemy import Connection, insert

from activities.services.content import ContentStore, put_blob
from activities.services.database import Database
from activities.services.keeping import keep
from activities.services.leases import Leases
from activities.services.memory_store import MemoryStore
from activities.services.migrations import migrate
from activities.services.vectors import EMBEDDING, MEMORY, ExactVectors, next_position
from activities.services.words import put_words
from models.inference import DataClass
from models.memory import Memo, Recall, Search
from scripts.bench import _memory_peers as peers
from workers.compose import utc_now

TENANT, MODEL, TOP = "bench", "bench-vectors", 10
CURVE, COMPARED = (1000, 3000, 10_000, 30_000, 100_000), (10_000, 100_000)
CLUSTERS, SPREAD = 200, 0.6
VOCABULARY = 5000
WORDS_EACH = 12
FILL = 5000
BARS = 50
Matrix = NDArray[np.float32]
Way = Callable[[int], Awaitable[tuple[float, list[str]]]]
"""One way to search: by the number of a query, the seconds it took and what it found."""


class Known:
    """An embedder that costs nothing: the last word of a query is its number."""

    model = MODEL
    sees = frozenset(DataClass)

    def __init__(self, queries: Matrix) -> None:
        """Take the vectors that the numbers stand for."""
        self._queries = queries

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Look the numbers up."""
        return [self._queries[int(text.split()[-1][1:])].tolist() for text in texts]


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, over which data."""

    options: argparse.Namespace
    database: Database
    file: Path
    matrix: Matrix
    queries: Matrix
    sqlite_vec: peers.SqliteVec | None
    weaviate: peers.Server | None


def main(argv: Sequence[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench memory", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=CURVE)
    parser.add_argument("--compare", type=int, nargs="*", default=COMPARED, help="sizes to ask the peers at")
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--writes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without", nargs="*", default=(), choices=("sqlite-vec", "weaviate"))
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(_measured(options, Path(folder)))
    _draw(result["curve"])
    print(json.dumps(result, indent=2))
    return 0


async def _measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    load = [round(psutil.getloadavg()[0], 1)]
    async with _opened(options, folder) as bench:
        curve: list[dict[str, Any]] = []
        for size in sorted(options.sizes):
            _say(f"filling up to {size}")
            await _fill(bench.database, bench.matrix, curve[-1]["records"] if curve else 0, size)
            curve.append(await _at(bench, size))
        load.append(round(psutil.getloadavg()[0], 1))
        return {
            "dimensions": options.dimensions,
            "queries": options.queries,
            "cores": os.cpu_count(),
            "load_average_before_and_after": load,
            "sqlite_vec": bench.sqlite_vec.version if bench.sqlite_vec else peers.NO_PEERS,
            "weaviate": "measured" if bench.weaviate else peers.NO_WEAVIATE,
            "promised": _promised(curve[-1]),
            "curve": curve,
        }


@asynccontextmanager
async def _opened(options: argparse.Namespace, folder: Path) -> AsyncGenerator[Bench]:
    generator = np.random.default_rng(options.seed)
    centres = generator.standard_normal((CLUSTERS, options.dimensions), dtype=np.float32)
    matrix = _near(generator, centres, max(options.sizes))
    queries = _near(generator, centres, options.queries)
    files = folder / "rows.f32", folder / "queries.f32"
    for file, rows in zip(files, (matrix, queries), strict=True):
        rows.tofile(file)
    file = folder / "memory.db"
    migrate(f"sqlite:///{file}")
    database = Database(f"sqlite:///{file}")
    async with AsyncExitStack() as stack:
        stack.callback(database.close)
        vec = server = None
        if options.compare and "sqlite-vec" not in options.without:
            vec = await stack.enter_async_context(peers.sqlite_vec(folder, *files, options.dimensions))
        if options.compare and "weaviate" not in options.without:
            server = await stack.enter_async_context(peers.weaviate(folder / "weaviate"))
        yield Bench(options, database, file, matrix, queries, vec, server)


def _promised(last: dict[str, Any]) -> dict[str, bool]:
    """What the default store has to reach at the largest size."""
    searches = (last["search_ms"], last["meaning_ms"], last["words_ms"])
    return {
        "recall_at_10_is_1": last["recall_at_10"] == 1.0,
        "p95_of_search_under_40_ms": all(one["p95"] < 40 for one in searches),
        "p95_of_a_write_without_a_model_under_50_ms": last["write_without_model_ms"]["p95"] < 50,
    }


async def _at(bench: Bench, size: int) -> dict[str, Any]:
    """Everything at one size: a store that was just opened, and the peers at the sizes to compare."""
    options, database = bench.options, bench.database
    _say(f"searching {size}")
    truth = _brute_force(bench.matrix[:size], bench.queries)
    vectors = ExactVectors(database, options.dimensions)
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    await vectors.nearest(TENANT, MODEL, bench.queries[0], (), TOP)
    loaded, after = time.perf_counter() - started, psutil.Process().memory_info().rss
    async with AsyncExitStack() as stack:
        ways = await _ours(bench, vectors)
        about: dict[str, Any] = {}
        if size in options.compare:
            about = await _others(bench, size, ways, stack)
        took, found = await _turns(ways, options.queries)
        if bench.sqlite_vec and "sqlite_vec" in about:
            about["sqlite_vec"]["process_mb"] = bench.sqlite_vec.process_mb
    return {
        "records": size,
        "recall_at_10": _recall(found["meaning"], truth),
        **{f"{name}_ms": _summary(took[name]) for name in ("search", "meaning", "words", "vectors")},
        **(await _writes(bench, size)),
        "load_seconds": round(loaded, 2),
        "memory_mb": round((after - before) / 1e6, 1),
        "vectors_mb": round(bench.matrix[:size].nbytes / 1e6, 1),
        "disk_mb": round(sum(p.stat().st_size for p in bench.file.parent.glob("memory.db*")) / 1e6, 1),
        **{
            name: {"search_ms": _summary(took[name]), "recall_at_10": _recall(found[name], truth), **facts}
            for name, facts in about.items()
        },
    }


async def _turns(
    ways: dict[str, Way], queries: int
) -> tuple[dict[str, list[float]], dict[str, list[list[str]]]]:
    """Every query by every way, each time beginning with another; the first query warms up."""
    names = list(ways)
    took: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, list[list[str]]] = {name: [] for name in names}
    for name in names:
        await ways[name](0)
    for number in range(queries):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            seconds, ids = await ways[name](number)
            took[name].append(seconds)
            found[name].append(ids)
    return took, found


# Ways to search.


async def _ours(bench: Bench, vectors: ExactVectors) -> dict[str, Way]:
    """The whole of `MemoryStore.recall` with a ready query vector, and the vectors by themselves."""
    content = ContentStore(bench.database)
    store = MemoryStore(bench.database, content, Known(bench.queries), vectors)
    asked = [await content.put(TENANT, _text(number).encode()) for number in range(len(bench.queries))]

    def recall(by: Search) -> Way:
        async def way(number: int) -> list[str]:
            request = Recall(tenant=TENANT, query=asked[number], by=by, limit=TOP)
            return [hit.record_id for hit in (await store.recall(request)).hits]

        return _timed(way)

    async def bare(number: int) -> list[str]:
        near = await vectors.nearest(TENANT, MODEL, bench.queries[number], (), TOP)
        return [one.record_id for one in near]

    return {
        "search": recall(Search.HYBRID),
        "meaning": recall(Search.MEANING),
        "words": recall(Search.WORDS),
        "vectors": _timed(bare),
    }


async def _others(bench: Bench, size: int, ways: dict[str, Way], stack: AsyncExitStack) -> dict[str, Any]:
    """Fill the peers, and add them to the ways; what filling cost them."""
    about: dict[str, Any] = {}
    if vec := bench.sqlite_vec:
        _say(f"filling sqlite-vec up to {size}")
        about["sqlite_vec"] = await vec.fill(size)

        async def ask(number: int) -> tuple[float, list[str]]:
            seconds, rows = await vec.ask(number)
            return seconds, [_name(row) for row in rows]

        ways["sqlite_vec"] = ask
    if bench.weaviate:
        about |= await _weaviate(bench, bench.weaviate, ways, stack)
    return about


async def _weaviate(
    bench: Bench, server: peers.Server, ways: dict[str, Way], stack: AsyncExitStack
) -> dict[str, Any]:
    """Let the real server follow SQL; it is asked directly, and through the store."""
    from activities.services.weaviate_store import WeaviateVectors, collection_name, connected

    _say("letting weaviate follow")
    client = await stack.enter_async_context(connected(server.settings))
    leases = Leases(bench.database, "bench", utc_now)
    store = WeaviateVectors(bench.database, client, leases, bench.options.dimensions)
    started = time.perf_counter()
    followed = await store.follow(MODEL)
    seconds = round(time.perf_counter() - started, 1)
    mine: Any = client.collections.use(collection_name(MODEL)).with_tenant(TENANT)

    async def directly(number: int) -> list[str]:
        query = bench.queries[number].tolist()
        answer = await mine.query.near_vector(near_vector=query, limit=TOP, return_properties=["record_id"])
        return [str(one.properties["record_id"]) for one in answer.objects]

    async def through(number: int) -> list[str]:
        near = await store.nearest(TENANT, MODEL, bench.queries[number], (), TOP)
        return [one.record_id for one in near]

    ways |= {"weaviate_directly": _timed(directly), "weaviate_through_store": _timed(through)}
    facts = {"followed": followed, "seconds": seconds, **server.costs()}
    return {"weaviate_directly": facts, "weaviate_through_store": {}}


def _timed(way: Callable[[int], Awaitable[list[str]]]) -> Way:
    async def timed(number: int) -> tuple[float, list[str]]:
        started = time.perf_counter()
        found = await way(number)
        return time.perf_counter() - started, found

    return timed


# Writes.


async def _writes(bench: Bench, size: int) -> dict[str, Any]:
    """Durable writes as an agent would make them, in turn with the bare fsync of a file beside them."""
    wrote: list[float] = []
    synced: list[float] = []
    floor = bench.file.parent / "floor"
    for number in range(bench.options.writes):
        started = time.perf_counter()
        await bench.database.write(lambda link, n=number: _kept(link, f"w{size}-{n}"))
        wrote.append(time.perf_counter() - started)
        synced.append(await asyncio.to_thread(_fsync, floor))
    return {"write_without_model_ms": _summary(wrote), "one_fsync_ms": _summary(synced)}


def _fsync(file: Path) -> float:
    with open(file, "ab") as floor:
        started = time.perf_counter()
        floor.write(b"\0" * 4096)
        floor.flush()
        os.fsync(floor.fileno())
        return time.perf_counter() - started


def _kept(connection: Connection, name: str) -> bool:
    text = put_blob(connection, TENANT, f"{_text(len(name))} {name}".encode(), "text/plain")
    memo = Memo(record_id=name, tenant=TENANT, kind="episode", title=name, text=text, source=name)
    return keep(connection, memo, datetime.now(UTC))


async def _fill(database: Database, matrix: Matrix, start: int, end: int) -> None:
    for first in range(start, end, FILL):
        rows = range(first, min(first + FILL, end))
        await database.write(lambda link, r=rows: _put(link, matrix, r))


def _put(connection: Connection, matrix: Matrix, rows: range) -> None:
    blank = dict(title="", text_digest="0" * 64, text_size=0, media_type="text/plain", source="bench")
    first = next_position(connection, MEMORY.c.position) - rows.start
    names = [dict(tenant=TENANT, record_id=_name(row), position=first + row) for row in rows]
    more = dict(kind="episode", recorded_at=1, data_class="internal", links="[]")
    connection.execute(insert(MEMORY), [name | blank | more for name in names])
    vectors = [
        name | dict(model=MODEL, vector=matrix[row].tobytes()) for name, row in zip(names, rows, strict=True)
    ]
    connection.execute(insert(EMBEDDING), vectors)
    for row in rows:
        put_words(connection, first + row, _text(row), TENANT)


# Data and judgement.


def _near(generator: np.random.Generator, centres: Matrix, count: int) -> Matrix:
    rows = centres[generator.integers(len(centres), size=count)]
    rows = rows + SPREAD * generator.standard_normal(rows.shape, dtype=np.float32)
    wide = rows.astype(np.float64)
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)


def _text(number: int) -> str:
    """Words whose frequencies fall off as in language; the last one names the number."""
    generator = np.random.default_rng(number)
    words = np.minimum(generator.zipf(1.3, WORDS_EACH), VOCABULARY)
    return " ".join(f"word{word}" for word in words) + f" n{number}"


def _name(row: int) -> str:
    return f"r{row:07}"


def _brute_force(matrix: Matrix, queries: Matrix) -> list[list[str]]:
    wide = queries.astype(np.float64).T
    parts = [matrix[at : at + 10_000].astype(np.float64) @ wide for at in range(0, len(matrix), 10_000)]
    best = np.argsort(-np.concatenate(parts), axis=0)[:TOP].T
    return [[_name(int(row)) for row in rows] for rows in best]


def _recall(found: list[list[str]], truth: list[list[str]]) -> float:
    right = sum(len(set(got) & set(wanted)) for got, wanted in zip(found, truth, strict=True))
    return round(right / sum(map(len, truth)), 4)


def _summary(took: list[float]) -> dict[str, float]:
    p50, p95 = np.percentile(took, [50, 95])
    return {name: round(1000 * float(v), 2) for name, v in (("p50", p50), ("p95", p95), ("max", max(took)))}


def _draw(curve: list[dict[str, Any]]) -> None:
    """p95 over size, a bar a line."""
    for name in ("search_ms", "write_without_model_ms"):
        longest = max(one[name]["p95"] for one in curve)
        _say(f"\n{name}: p50, p95")
        for one in curve:
            bar = "#" * max(1, round(BARS * one[name]["p95"] / longest))
            _say(f"{one['records']:>8} {one[name]['p50']:>7.2f} {one[name]['p95']:>7.2f} {bar}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
