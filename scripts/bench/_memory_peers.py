"""What the memory benchmark runs beside ours: sqlite-vec in a process of its own, and a real Weaviate."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from models.memory import WeaviateSettings

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
SCRIPT = ROOT / "scripts" / "bench" / "peers" / "sqlite_vec_search.py"
WEAVIATE = ROOT / "var" / "bin" / "weaviate-server"
TARGET = ROOT / "scripts" / "targets" / "weaviate.sh"
NO_PEERS = "not installed: make peers"
NO_WEAVIATE = "not installed: scripts/targets/weaviate.sh install"
PORTS = 6
START_SECONDS = 60


class SqliteVec:
    """A plain vec0 table, told what to do a line at a time."""

    def __init__(self, process: asyncio.subprocess.Process, version: dict[str, str]) -> None:
        """Take a process that has said its version."""
        self._process = process
        self.version = version
        self.process_mb = 0.0

    async def fill(self, count: int) -> dict[str, Any]:
        """Have it hold so many rows."""
        return await self._told({"fill": count})

    async def ask(self, number: int) -> tuple[float, list[int]]:
        """Seconds that the query of that number took, and the rows it found."""
        answer = await self._told({"ask": number})
        self.process_mb = float(answer["process_mb"])
        return float(answer["seconds"]), list(answer["found"])

    async def _told(self, order: dict[str, int]) -> dict[str, Any]:
        asked, said = self._process.stdin, self._process.stdout
        assert asked is not None and said is not None
        asked.write(json.dumps(order).encode() + b"\n")
        await asked.drain()
        return json.loads(await said.readline())


@asynccontextmanager
async def sqlite_vec(folder: Path, rows: Path, queries: Path, size: int) -> AsyncGenerator[SqliteVec | None]:
    """sqlite-vec over files of float32; `None` where its environment is not there."""
    if not PYTHON.exists():
        yield None
        return
    arguments = (folder / "sqlite_vec.db", rows, queries, str(size))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(PYTHON, "-B", SCRIPT, *arguments, stdin=pipe, stdout=pipe)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield SqliteVec(process, json.loads(await process.stdout.readline()))
    finally:
        process.stdin.close()
        await process.wait()


@dataclass(frozen=True, slots=True)
class Server:
    """A Weaviate that runs."""

    settings: WeaviateSettings
    folder: Path
    process: subprocess.Popen[bytes]

    def costs(self) -> dict[str, float]:
        """Its memory, and what it keeps on disk."""
        disk = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        resident = psutil.Process(self.process.pid).memory_info().rss
        return {"process_mb": round(resident / 1e6, 1), "disk_mb": round(disk / 1e6, 1)}


@asynccontextmanager
async def weaviate(folder: Path) -> AsyncGenerator[Server | None]:
    """A real server on free ports of this machine; `None` where it is not built."""
    if not WEAVIATE.exists():
        yield None
        return
    port = _free_block()
    process = _started(folder, port)
    try:
        await _ready(process, port, folder / "log")
        yield Server(WeaviateSettings(port=port, grpc_port=port + 1), folder, process)
    finally:
        process.kill()
        process.wait()


def _started(folder: Path, port: int) -> subprocess.Popen[bytes]:
    folder.mkdir()
    with open(folder / "log", "wb") as log:
        argv = ("sh", str(TARGET), "run", str(folder), str(port))
        # The script becomes the server, so that its process id is the server's.
        return subprocess.Popen(argv, stdout=log, stderr=log)


async def _ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    url = f"http://127.0.0.1:{port}/v1/.well-known/ready"
    give_up = time.monotonic() + START_SECONDS
    async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
        while process.poll() is None and time.monotonic() < give_up:
            try:
                if (await client.get(url)).is_success:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.1)
    raise RuntimeError(f"weaviate did not start: {log.read_text()[-2000:]}")


def _free_block() -> int:
    """The first of the ports it wants, all of them free now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        if first + PORTS < 65536 and all(_free(port) for port in range(first, first + PORTS)):
            return first


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
