"""Contestants that take turns: what each took, at one concurrency and another, and how they compare."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

Once = Callable[[], Awaitable[None]]
ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
LONG = 1 << 26
"""A turn's line of measurements is longer than a stream's usual limit."""


@dataclass(frozen=True, slots=True)
class Took:
    """One turn."""

    milliseconds: list[float]
    per_second: float
    cpu_milliseconds: float
    """Of the contestant's own process, per request."""


Turn = Callable[[int, int], Awaitable[Took]]
"""So many requests, so many at once."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way of asking."""

    name: str
    turn: Turn


@dataclass(slots=True)
class Timed:
    """What one contestant took at one concurrency, over all turns."""

    turns: list[Took] = field(default_factory=list[Took])

    def report(self) -> dict[str, float]:
        """Medians over turns and quantiles over requests."""
        seen = [one for turn in self.turns for one in turn.milliseconds]
        return spread(seen) | {
            "per_second": round(median(turn.per_second for turn in self.turns), 1),
            "cpu_ms": round(median(turn.cpu_milliseconds for turn in self.turns), 3),
        }


Seen = Mapping[str, Mapping[int, Timed]]


def spread(milliseconds: Sequence[float]) -> dict[str, float]:
    """The middle, and all but one in a hundred."""
    return {
        "p50_ms": round(median(milliseconds), 4),
        "p99_ms": round(quantiles(milliseconds, n=100)[98], 4),
    }


def local(once: Once) -> Turn:
    """Turns in this process."""

    async def turn(requests: int, concurrency: int) -> Took:
        seen: list[float] = []
        left = iter(range(requests))

        async def run() -> None:
            for _ in left:
                began = time.perf_counter()
                await once()
                seen.append((time.perf_counter() - began) * 1000)

        began, busy = time.perf_counter(), time.process_time()
        await asyncio.gather(*(run() for _ in range(concurrency)))
        took = time.perf_counter() - began
        return Took(seen, requests / took, (time.process_time() - busy) * 1000 / requests)

    return turn


class Peer:
    """A contestant in a process and an environment of its own, told its turns a line at a time."""

    def __init__(self, process: asyncio.subprocess.Process, version: Mapping[str, str]) -> None:
        """Take a process that has said its version."""
        self._process = process
        self.version = version

    async def turn(self, requests: int, concurrency: int) -> Took:
        """Have it take a turn."""
        return Took(**await self._told({"requests": requests, "concurrency": concurrency}))

    async def _told(self, order: dict[str, Any]) -> dict[str, Any]:
        asked, said = self._process.stdin, self._process.stdout
        assert asked is not None and said is not None
        asked.write(json.dumps(order).encode() + b"\n")
        await asked.drain()
        return json.loads(await said.readline())


@asynccontextmanager
async def peer(script: str, *arguments: str) -> AsyncGenerator[Peer | None]:
    """A peer from `scripts/bench/peers`; `None` where its environment is not there (`make peers`)."""
    if not PEERS.exists():
        yield None
        return
    path = ROOT / "scripts" / "bench" / "peers" / script
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        PEERS, "-B", path, *arguments, stdin=pipe, stdout=pipe, limit=LONG
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield Peer(process, json.loads(await process.stdout.readline()))
    finally:
        process.stdin.close()
        await process.wait()


async def compared(contestants: Sequence[Contestant], requests: int, turns: int) -> Seen:
    """All contestants in turn, several times over, at concurrency 1 and 50."""
    seen = {one.name: {1: Timed(), 50: Timed()} for one in contestants}
    for one in contestants:
        await one.turn(200, 10)
    # As our workers and the peer's process do: what is there by now is not looked through again.
    gc.collect()
    gc.freeze()
    for _ in range(turns):
        for one in contestants:
            seen[one.name][1].turns.append(await one.turn(requests // 4, 1))
            seen[one.name][50].turns.append(await one.turn(requests, 50))
    return seen


def lines(seen: Seen) -> dict[str, dict[str, dict[str, float]]]:
    """One line per contestant and concurrency, with what it adds to the first one's."""
    first = next(iter(seen))
    report = {
        name: {f"concurrency_{at}": times.report() for at, times in by.items()} for name, by in seen.items()
    }
    for by in report.values():
        for at, line in by.items():
            for cut in ("p50_ms", "p99_ms"):
                line[f"added_{cut}"] = round(line[cut] - report[first][at][cut], 3)
    return report


def ratios(seen: Seen, ours: str, other: str, concurrency: int) -> dict[str, float]:
    """How many times as many requests per second, of turns side by side, and how little CPU for each."""
    pairs = list(zip(seen[ours][concurrency].turns, seen[other][concurrency].turns, strict=True))
    each = [mine.per_second / its.per_second for mine, its in pairs]
    cpu = [its.cpu_milliseconds / mine.cpu_milliseconds for mine, its in pairs]
    return {
        "median": round(median(each), 2),
        "least": round(min(each), 2),
        "most": round(max(each), 2),
        "in_cpu_time": round(median(cpu), 2),
    }
