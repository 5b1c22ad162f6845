"""How fast and how exact memory is: `python -m scripts.bench recall --vectors 100000`.

Random unit vectors with exact duplicates and near ties, three kinds, and a second tenant that holds the same
vectors; judged by a float64 search that shares no code with the product. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from sqlalchemy import Connection, insert

from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.memory_store import MemoryStore
from activities.services.vectors import EMBEDDING, MEMORY, ExactVectors
from models.inference import DataClass
from models.memory import Memo, Recall

TENANT, OTHER, MODEL = "bench", "other", "bench-vectors"
KINDS = ("post", "idea", "outcome")
TOP = 10
NEWCOMER = "newcomer"


@dataclass(frozen=True, slots=True)
class Data:
    """The records of the tenant under test; row i is record `r{i}`, of kind i mod 3."""

    matrix: NDArray[np.float32]
    recorded: NDArray[np.int64]
    queries: NDArray[np.float32]


class Known:
    """An embedder that costs nothing: the text of a query is its number."""

    model = MODEL
    sees = frozenset(DataClass)

    def __init__(self, queries: NDArray[np.float32]) -> None:
        """Take the vectors that the numbers stand for."""
        self._queries = queries

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Look the numbers up."""
        return [self._queries[int(text.split()[-1])].tolist() for text in texts]


def main(argv: Sequence[str]) -> int:
    """Run the benchmark, or be the other process of it."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench recall", description=__doc__)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--all-cores", action="store_true", help="do not stay on one core")
    parser.add_argument("--write-into", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.write_into:
        return asyncio.run(_write_newcomer(options))
    if not options.all_cores:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'memory.db'}"
        print(json.dumps(asyncio.run(_measure(options, url)), indent=2))
    return 0


async def _measure(options: argparse.Namespace, url: str) -> dict[str, Any]:
    data = _data(options)
    with _database(url) as database:
        _say(f"writing {len(data.matrix)} vectors")
        await database.write(lambda connection: _fill(connection, data))
        content = ContentStore(database)
        vectors = ExactVectors(database, options.dimensions)
        store = MemoryStore(database, content, Known(data.queries), vectors)
        loading = await _loading(store, content, data)
        _say("searching")
        asked = [await _request(content, number) for number in range(len(data.queries))]
        search = await _times(lambda n: vectors.nearest(TENANT, MODEL, data.queries[n], (), TOP), len(asked))
        whole = await _times(lambda n: store.recall(asked[n]), len(asked))
        _say("comparing with float64 over everything")
        return {
            "vectors": len(data.matrix),
            "dimensions": options.dimensions,
            "queries": len(asked),
            "cores": len(os.sched_getaffinity(0)),
            "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE", ""),
            "search_ms": search,
            "recall_without_embedding_ms": whole,
            "bare_numpy_ms": _bare(data),
            "exactness": await _exactness(vectors, data),
            **loading,
            "other_process": await _other_process(options, url, vectors, data),
        }


def _data(options: argparse.Namespace) -> Data:
    """One record in a hundred is a copy of another, one in a hundred differs from another by one rounding."""
    generator = np.random.default_rng(options.seed)
    count, size = options.vectors, options.dimensions
    matrix = _units(generator.standard_normal((count, size), dtype=np.float32))
    groups = generator.permutation(count)[: count // 50 * 2].reshape(2, -1)
    # Few originals for many copies: more equals than fit into an answer.
    originals = groups[0][: max(1, groups.shape[1] // 25)] if groups.size else groups[0]
    for number, row in enumerate(groups[1]):
        matrix[row] = matrix[originals[number % len(originals)]]
        if number % 2:
            place = int(generator.integers(size))
            matrix[row, place] = np.nextafter(matrix[row, place], np.float32(2 * (number % 4) - 4))
    recorded = generator.integers(1, 50, count) * 1_000_000
    queries = generator.standard_normal((options.queries, size), dtype=np.float32)
    if groups.size:
        near = originals[generator.integers(len(originals), size=options.queries)]
        queries[::2] = matrix[near][::2] + 0.02 * queries[::2]
    return Data(matrix, recorded, _units(queries))


def _units(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    wide = rows.astype(np.float64)
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)


def _fill(connection: Connection, data: Data) -> None:
    blank = dict(title="", text_digest="0" * 64, text_size=0, media_type="text/plain", source="bench")
    position = 0
    for tenant in (OTHER, TENANT):
        # The other tenant has one in ten of the same vectors; finding one of its records is a leak.
        rows = range(0, len(data.matrix), 10 if tenant == OTHER else 1)
        memories: list[dict[str, Any]] = []
        embeddings: list[dict[str, Any]] = []
        for row in rows:
            position += 1
            name = dict(tenant=tenant, record_id=_name(tenant, row), position=position)
            kind, recorded = KINDS[row % len(KINDS)], int(data.recorded[row])
            memories.append(
                name | blank | dict(kind=kind, recorded_at=recorded, data_class="internal", links="[]")
            )
            embeddings.append(name | dict(model=MODEL, vector=data.matrix[row].tobytes()))
        connection.execute(insert(MEMORY), memories)
        connection.execute(insert(EMBEDDING), embeddings)


def _name(tenant: str, row: int) -> str:
    return f"{tenant[0]}{row:07}"


async def _loading(store: MemoryStore, content: ContentStore, data: Data) -> dict[str, Any]:
    """What the first search costs, which reads everything."""
    request = await _request(content, 0)
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    recalled = await store.recall(request)
    seconds, used = time.perf_counter() - started, psutil.Process().memory_info().rss - before
    if recalled.degraded:
        raise RuntimeError(f"recall was degraded: {recalled.degraded}")
    return {
        "load_seconds": round(seconds, 2),
        "memory_mb": round(used / 1e6, 1),
        "vectors_mb": round(data.matrix.nbytes / 1e6, 1),
        "memory_per_vector_byte": round(used / data.matrix.nbytes, 2),
    }


async def _request(content: ContentStore, number: int) -> Recall:
    return Recall(tenant=TENANT, query=await content.put(TENANT, f"query {number}".encode()), limit=TOP)


async def _times(work: Callable[[int], Awaitable[object]], count: int) -> dict[str, float]:
    took: list[float] = []
    for number in range(count):
        started = time.perf_counter()
        await work(number)
        took.append(time.perf_counter() - started)
    return _summary(took)


def _summary(took: list[float]) -> dict[str, float]:
    p50, p95 = np.percentile(took, [50, 95])
    return {name: round(1000 * float(v), 2) for name, v in (("p50", p50), ("p95", p95), ("max", max(took)))}


def _bare(data: Data) -> dict[str, dict[str, float]]:
    """The floor: one float32 product over everything and a partition, with no promise about ties."""
    ways: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
        "einsum": lambda query: np.einsum("ij,j->i", data.matrix, query),
        "matmul": lambda query: data.matrix @ query,
    }
    results: dict[str, dict[str, float]] = {}
    for name, product in ways.items():
        took: list[float] = []
        for query in data.queries:
            started = time.perf_counter()
            np.argpartition(product(query), -TOP)
            took.append(time.perf_counter() - started)
        results[name] = _summary(took)
    return results


async def _exactness(vectors: ExactVectors, data: Data) -> dict[str, Any]:
    """Recall@10 and whole lists in order, over all kinds and over one; leaks of the other tenant."""
    right, same, total, leaks = 0, 0, 0, 0
    for number, query in enumerate(data.queries):
        kinds = () if number % 4 else (KINDS[number % len(KINDS)],)
        near = await vectors.nearest(TENANT, MODEL, query, kinds, TOP)
        got = [one.record_id for one in near]
        wanted = _brute_force(data, query, kinds)
        right, total = right + len(set(got) & set(wanted)), total + len(wanted)
        same += got == wanted
        leaks += sum(record_id.startswith(OTHER[0]) for record_id in got)
    return {
        "recall_at_10": right / total,
        "same_order": same / len(data.queries),
        "other_tenant_hits": leaks,
    }


def _brute_force(data: Data, query: NDArray[np.float32], kinds: tuple[str, ...]) -> list[str]:
    rows = np.arange(len(data.matrix))
    if kinds:
        rows = rows[np.isin(rows % len(KINDS), [KINDS.index(kind) for kind in kinds])]
    wide, scores = query.astype(np.float64), np.empty(len(rows))
    for start in range(0, len(rows), 10_000):
        scores[start : start + 10_000] = data.matrix[rows[start : start + 10_000]].astype(np.float64) @ wide
    # Float64 sums differ in the last digits by their order, so what is that close is summed exactly.
    tenth = np.sort(scores)[-min(TOP, len(scores))]
    close = rows[scores >= tenth - 1e-9]

    def key(row: int) -> tuple[float, int, str]:
        cosine = math.fsum(float(a) * float(b) for a, b in zip(data.matrix[row], query, strict=True))
        return -cosine, -int(data.recorded[row]), _name(TENANT, row)

    return [name for _, _, name in sorted(key(int(row)) for row in close)[:TOP]]


async def _other_process(
    options: argparse.Namespace, url: str, vectors: ExactVectors, data: Data
) -> dict[str, float]:
    """Another process keeps, indexes and forgets a record while this one searches without pause."""
    _say("another process writes")
    arguments = ["--write-into", url, "--dimensions", str(options.dimensions), "--seed", str(options.seed)]
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "scripts.bench", "recall", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin and child.stdout
    query = _newcomer(options)
    answer: dict[str, float] = {}
    for step, present in (("write_seen_ms", True), ("forget_seen_ms", False)):
        child.stdin.write(b"go\n")
        seen = await _until(vectors, query, present)
        committed = float(await child.stdout.readline())
        answer[step] = round(max(0.0, seen - committed) * 1000, 2)
    await child.wait()
    return answer


async def _until(vectors: ExactVectors, query: NDArray[np.float32], present: bool) -> float:
    """The time at which the newcomer is there, or gone."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        near = await vectors.nearest(TENANT, MODEL, query, (), 1)
        if any(one.record_id == NEWCOMER for one in near) == present:
            return time.time()
    raise RuntimeError("the other process's write was not seen within a minute")


def _newcomer(options: argparse.Namespace) -> NDArray[np.float32]:
    generator = np.random.default_rng(options.seed + 1)
    return _units(generator.standard_normal((1, options.dimensions), dtype=np.float32))[0]


async def _write_newcomer(options: argparse.Namespace) -> int:
    """The other process: on each line of standard input one write; prints when it was committed."""
    with _database(options.write_into) as database:
        content = ContentStore(database)
        embedder = Known(_newcomer(options)[np.newaxis])
        store = MemoryStore(database, content, embedder, ExactVectors(database, options.dimensions))
        text = await content.put(TENANT, b"text 0")
        memo = Memo(record_id=NEWCOMER, tenant=TENANT, kind="post", title="new", text=text, source="bench")
        await asyncio.to_thread(sys.stdin.readline)
        await store.keep(memo, datetime.now(UTC))
        while await store.index_pending():
            pass
        print(repr(time.time()), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await store.forget(TENANT, NEWCOMER)
        print(repr(time.time()), flush=True)
    return 0


@contextmanager
def _database(url: str) -> Generator[Database]:
    database = Database(url)
    try:
        MEMORY.metadata.create_all(database.engine)
        yield database
    finally:
        database.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
