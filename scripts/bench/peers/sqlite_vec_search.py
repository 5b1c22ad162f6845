"""sqlite-vec as a peer: `.venv-peers/bin/python sqlite_vec_search.py DATABASE ROWS QUERIES SIZE`.

ROWS and QUERIES are files of little-endian float32, SIZE numbers to a vector. Reads a line of JSON per turn:
`{"fill": 1000}` has it hold that many rows, `{"ask": 7}` has it look for the ten nearest to a query; it
answers each with a line. A plain vec0 table, as its documentation shows. Imports nothing of the product.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

TOP = 10
BATCH = 5000
NEAREST = "SELECT id FROM nearest WHERE vector MATCH ? AND k = ? ORDER BY distance"


class Table:
    """One vec0 table in a file."""

    def __init__(self, database: str, rows: str, size: int) -> None:
        """Load the extension and make the table."""
        apsw: Any = importlib.import_module("apsw")
        extension: Any = importlib.import_module("sqlite_vec")
        self._path = Path(database)
        self._link: Any = apsw.Connection(database)
        self._link.enable_load_extension(True)
        self._link.load_extension(extension.loadable_path())
        self._link.execute("PRAGMA journal_mode=wal").fetchall()
        columns = f"id INTEGER PRIMARY KEY, vector FLOAT[{size}] distance_metric=cosine"
        self._link.execute(f"CREATE VIRTUAL TABLE nearest USING vec0({columns})")
        self._rows, self._held, self._bytes = Path(rows), 0, 4 * size
        self.version = {"sqlite_vec": extension.__version__, "sqlite": apsw.sqlite_lib_version()}

    def fill(self, count: int) -> dict[str, Any]:
        """Hold so many of the rows."""
        began = time.perf_counter()
        with open(self._rows, "rb") as rows:
            rows.seek(self._held * self._bytes)
            for first in range(self._held, count, BATCH):
                numbers = range(first, min(first + BATCH, count))
                pairs = [(number, rows.read(self._bytes)) for number in numbers]
                with self._link:
                    self._link.executemany("INSERT INTO nearest(id, vector) VALUES (?, ?)", pairs)
        self._held = count
        disk = sum(path.stat().st_size for path in self._path.parent.glob(f"{self._path.name}*"))
        return {"seconds": round(time.perf_counter() - began, 2), "disk_mb": round(disk / 1e6, 1)}

    def ask(self, query: bytes) -> dict[str, Any]:
        """The nearest rows, and what it took to find them."""
        began = time.perf_counter()
        found = [int(row[0]) for row in self._link.execute(NEAREST, (query, TOP))]
        took = time.perf_counter() - began
        return {"seconds": took, "found": found, "process_mb": round(_resident() / 1e6, 1)}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if os.path.exists("/proc") else 0
    return pages * resource.getpagesize()


def main(database: str, rows: str, queries: str, size: str) -> None:
    """Answer a line for every line."""
    table = Table(database, rows, int(size))
    asked, length = Path(queries).read_bytes(), 4 * int(size)
    print(json.dumps(table.version), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "fill" in order:
            answer = table.fill(order["fill"])
        else:
            answer = table.ask(asked[order["ask"] * length :][:length])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
