"""What memory costs as it grows: `python -m scripts.bench memory --sizes 1000 10000 100000 [--weaviate]`.

Clustered unit vectors and short texts; every answer of the store is judged by a float64 search that shares no
code with it. Writes are whole: text, record, words and contract, durable, without a model. With `--weaviate`
the same vectors are followed into a real server, asked through the store and asked directly. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from sqlalchemy import Connection, insert

from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.keeping import keep
from activities.services.leases import Leases
from activities.services.memory_store import MemoryStore
from activities.services.migrations import migrate
from activities.services.vectors import EMBEDDING, MEMORY, ExactVectors, next_position
from activities.services.words import put_words
from models.memory import Memo, Recall, Search
from models.settings import WeaviateSettings
from workers.compose import utc_now

TENANT, MODEL, TOP = "bench", "bench-vectors", 10
CLUSTERS, SPREAD = 200, 0.6
VOCABULARY = 5000
WORDS_EACH = 12
FILL = 5000
Matrix = NDArray[np.float32]


class Known:
    """An embedder that costs nothing: the last word of a query is its number."""

    model = MODEL

    def __init__(self, queries: Matrix) -> None:
        """Take the vectors that the numbers stand for."""
        self._queries = queries

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Look the numbers up."""
        return [self._queries[int(text.split()[-1][1:])].tolist() for text in texts]


def main(argv: Sequence[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench memory", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--writes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--weaviate", type=int, metavar="PORT", help="HTTP port; gRPC is the next one")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'memory.db'}"
        migrate(url)
        print(json.dumps(asyncio.run(_measure(options, url)), indent=2))
    return 0


async def _measure(options: argparse.Namespace, url: str) -> dict[str, Any]:
    generator = np.random.default_rng(options.seed)
    centres = generator.standard_normal((CLUSTERS, options.dimensions), dtype=np.float32)
    sizes = sorted(options.sizes)
    matrix = _near(generator, centres, sizes[-1])
    queries = _near(generator, centres, options.queries)
    database = Database(url)
    try:
        vectors = ExactVectors(database, options.dimensions)
        store = MemoryStore(database, ContentStore(database), Known(queries), vectors)
        curve: list[dict[str, Any]] = []
        filled = 0
        for size in sizes:
            _say(f"filling up to {size}")
            await _fill(database, matrix, filled, size)
            filled = size
            curve.append(await _at(options, database, store, vectors, matrix[:size], queries))
        return {
            "dimensions": options.dimensions,
            "queries": options.queries,
            "load_average": round(psutil.getloadavg()[0], 1),
            "sqlite_vec": _sqlite_vec(),
            "curve": curve,
        }
    finally:
        database.close()


async def _at(
    options: argparse.Namespace,
    database: Database,
    store: MemoryStore,
    vectors: ExactVectors,
    matrix: Matrix,
    queries: Matrix,
) -> dict[str, Any]:
    _say(f"searching {len(matrix)}")
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    await vectors.nearest(TENANT, MODEL, queries[0], (), TOP)
    loaded = time.perf_counter() - started
    used = psutil.Process().memory_info().rss - before
    truth = [_brute_force(matrix, query) for query in queries]
    found: list[list[str]] = []

    async def meaning(number: int) -> None:
        near = await vectors.nearest(TENANT, MODEL, queries[number], (), TOP)
        found.append([one.record_id for one in near])

    content = ContentStore(database)
    asked = [await content.put(TENANT, _text(number).encode()) for number in range(len(queries))]

    def recall(by: Search) -> Callable[[int], Awaitable[object]]:
        return lambda number: store.recall(Recall(tenant=TENANT, query=asked[number], by=by, limit=TOP))

    count = len(queries)
    result: dict[str, Any] = {
        "records": len(matrix),
        "vectors_ms": await _times(meaning, count),
        "recall_at_10": _recall(found, truth),
        "meaning_ms": await _times(recall(Search.MEANING), count),
        "words_ms": await _times(recall(Search.WORDS), count),
        "hybrid_ms": await _times(recall(Search.HYBRID), count),
        "write_without_model_ms": await _writes(database, len(matrix), options.writes),
        "load_more_seconds": round(loaded, 2),
        "load_more_mb": round(used / 1e6, 1),
        "process_mb": round(psutil.Process().memory_info().rss / 1e6, 1),
    }
    if options.weaviate:
        result["weaviate"] = await _weaviate(options, database, queries, truth)
    return result


async def _writes(database: Database, size: int, count: int) -> dict[str, float]:
    """One durable write after another: text, record and words in two commits, as an agent would."""
    content = ContentStore(database)

    async def write(number: int) -> None:
        text = await content.put(TENANT, f"{_text(number)} written at {size}".encode())
        name = f"w{size}-{number}"
        memo = Memo(record_id=name, tenant=TENANT, kind="episode", title=name, text=text, source=name)
        await database.write(lambda link: keep(link, memo, datetime.now(UTC)))

    return await _times(write, count)


async def _weaviate(
    options: argparse.Namespace, database: Database, queries: Matrix, truth: list[list[str]]
) -> dict[str, Any]:
    from activities.services.weaviate_store import WeaviateVectors, collection_name, connected

    _say("following into weaviate")
    settings = WeaviateSettings(port=options.weaviate, grpc_port=options.weaviate + 1)
    async with connected(settings) as client:
        store = WeaviateVectors(database, client, Leases(database, "bench", utc_now), options.dimensions)
        started = time.perf_counter()
        followed = await store.follow(MODEL)
        seconds = time.perf_counter() - started
        found: list[list[str]] = []
        direct: list[list[str]] = []

        async def through(number: int) -> None:
            near = await store.nearest(TENANT, MODEL, queries[number], (), TOP)
            found.append([one.record_id for one in near])

        mine: Any = client.collections.use(collection_name(MODEL)).with_tenant(TENANT)

        async def directly(number: int) -> None:
            answer = await mine.query.near_vector(near_vector=queries[number].tolist(), limit=TOP)
            direct.append([str(one.properties["record_id"]) for one in answer.objects])

        return {
            "followed": followed,
            "follow_seconds": round(seconds, 1),
            "through_store_ms": await _times(through, len(queries)),
            "recall_at_10": _recall(found, truth),
            "directly_ms": await _times(directly, len(queries)),
            "recall_at_10_directly": _recall(direct, truth),
        }


def _sqlite_vec() -> str:
    known = importlib.util.find_spec("sqlite_vec")
    return "importable, not measured here" if known else "not importable here; not measured"


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
        put_words(connection, first + row, _text(row))


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


def _brute_force(matrix: Matrix, query: NDArray[np.float32]) -> list[str]:
    wide = query.astype(np.float64)
    scores = np.concatenate(
        [matrix[at : at + 10_000].astype(np.float64) @ wide for at in range(0, len(matrix), 10_000)]
    )
    return [_name(int(row)) for row in np.argsort(-scores)[:TOP]]


def _recall(found: list[list[str]], truth: list[list[str]]) -> float:
    right = sum(len(set(got) & set(wanted)) for got, wanted in zip(found, truth, strict=True))
    return round(right / sum(map(len, truth)), 4)


async def _times(work: Callable[[int], Awaitable[object]], count: int) -> dict[str, float]:
    took: list[float] = []
    for number in range(count):
        started = time.perf_counter()
        await work(number)
        took.append(time.perf_counter() - started)
    p50, p95 = np.percentile(took, [50, 95])
    return {name: round(1000 * float(v), 2) for name, v in (("p50", p50), ("p95", p95), ("max", max(took)))}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
