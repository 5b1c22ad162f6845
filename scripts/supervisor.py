"""Keep child processes running: start in order, wait until ready, restart with back-off, stop in reverse.

A child that fails before it was ever ready fails the start as a whole, with its last log lines; one that
falls over later is started again for ever. No child outlives its launcher, not even a killed one: `leash`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Self

from models.errors import Unavailable

LEASH = Path(__file__).with_name("leash.py")
LOG_BYTES = 5_000_000
LOG_KEPT = 3
TAIL_LINES = 12

Pause = Callable[[float], Awaitable[object]]
Ready = Callable[[int], Awaitable[None]]
"""Gets the child's process id; returns once the child does its work."""


class NotReady(Unavailable):
    """A part ended or stayed silent before it was ready."""


class Phase(StrEnum):
    """Where a child stands."""

    STARTING = "starting"
    READY = "ready"
    ENDED = "ended"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Note:
    """Something that happened to one child."""

    name: str
    phase: Phase
    detail: str = ""


Report = Callable[[Note], None]


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before another start, in seconds."""

    first: float = 0.5
    most: float = 30.0
    stable: float = 60.0
    """A child that lived this long starts over at `first`."""

    def delay(self, failures: int, chance: float) -> float:
        """Doubles per failure up to `most`, less up to half by chance, so that not all rise together."""
        return min(self.most, self.first * 2 ** min(failures - 1, 30)) * (1 - chance / 2)


@dataclass(frozen=True, slots=True)
class Child:
    """One program to keep running."""

    name: str
    argv: tuple[str, ...]
    """The program's absolute path and its arguments."""
    ready: Ready
    after: tuple[str, ...] = ()
    """Children that must be ready first."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables on top of the launcher's own; they show in the process list, so no secrets."""
    timeout: float = 60.0
    """Seconds until it must be ready."""
    grace: float = 15.0
    """Seconds between SIGTERM and SIGKILL."""
    backoff: Backoff = Backoff()


class Supervisor:
    """Runs children for as long as it is entered."""

    def __init__(
        self,
        children: Sequence[Child],
        logs: Path,
        report: Report = lambda note: None,
        pause: Pause = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Take what to run, the folder for logs, whom to tell, how to wait and where luck comes from."""
        names = {child.name: set(child.after) for child in children}
        self._order = tuple(name for name in TopologicalSorter(names).static_order() if name in names)
        self._kept = {
            child.name: _Kept(child, logs / f"{child.name}.log", report, pause, chance) for child in children
        }

    async def __aenter__(self) -> Self:
        """Start everything; leaves nothing running when that fails."""
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop everything, dependants first."""
        await self._stop()

    def pid(self, name: str) -> int | None:
        """The process id of a child, if it runs."""
        return self._kept[name].pid

    def log(self, name: str) -> Path:
        """Where a child writes."""
        return self._kept[name].log

    async def _start(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for kept in self._kept.values():
                    group.create_task(self._start_one(kept))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _start_one(self, kept: _Kept) -> None:
        for name in kept.child.after:
            await self._kept[name].up.wait()
        await kept.start()

    async def _stop(self) -> None:
        done = {name: asyncio.Event() for name in self._kept}
        async with asyncio.TaskGroup() as group:
            for name in reversed(self._order):
                group.create_task(self._stop_one(name, done))

    async def _stop_one(self, name: str, done: Mapping[str, asyncio.Event]) -> None:
        for other in self._kept.values():
            if name in other.child.after:
                await done[other.child.name].wait()
        try:
            await self._kept[name].stop()
        finally:
            done[name].set()


class _Kept:
    """One child over all its lives."""

    def __init__(
        self, child: Child, log: Path, report: Report, pause: Pause, chance: Callable[[], float]
    ) -> None:
        self.child, self.log = child, log
        self.up = asyncio.Event()
        self._report, self._pause, self._chance = report, pause, chance
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._offset = 0

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        process = await self._spawn()
        await self._until_ready(process)
        self._keeper = asyncio.create_task(self._keep(process), name=f"keep {self.child.name}")
        self.up.set()

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            await self._end(process)
        self._tell(Phase.STOPPED)

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        clock, failures = asyncio.get_running_loop().time, 0
        while True:
            began = clock()
            code = await process.wait()
            failures = 1 if clock() - began >= self.child.backoff.stable else failures + 1
            delay = self.child.backoff.delay(failures, self._chance())
            self._tell(Phase.ENDED, f"{_ending(code)}; starting again in {delay:.1f} s, see {self.log}")
            await self._pause(delay)
            try:
                process = await self._spawn()
                await self._until_ready(process)
            except (NotReady, OSError) as error:
                self._tell(Phase.ENDED, str(error).partition("\n")[0])
                await self._end(process)

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._tell(Phase.STARTING)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        _rotate(self.log)
        child = self.child
        variables = [f"{name}={value}" for name, value in child.env.items()]
        leash = (sys.executable, "-I", "-S", str(LEASH), str(os.getpid()))
        with self.log.open("ab") as out:
            self._offset = out.tell()
            # A session of its own: Ctrl-C in the terminal reaches the launcher only, which stops in order.
            self._process = await asyncio.create_subprocess_exec(
                *leash,
                *variables,
                "--",
                *child.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return self._process

    async def _until_ready(self, process: asyncio.subprocess.Process) -> None:
        ready = asyncio.ensure_future(self.child.ready(process.pid))
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((ready, ended), timeout=self.child.timeout, return_when="FIRST_COMPLETED")
            if not ready.done():
                raise NotReady(self._complaint(process.returncode))
            await ready
        except (OSError, ValueError) as error:
            raise NotReady(f"{self.child.name}: looking whether it is ready failed: {error}") from error
        finally:
            for task in (ready, ended):
                task.cancel()
            await asyncio.wait((ready, ended))
        self._tell(Phase.READY, f"pid {process.pid}")

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self.child.grace)
        except TimeoutError:
            # The whole session: what would not stop may have children that would not either.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    def _complaint(self, code: int | None) -> str:
        what = f"was not ready after {self.child.timeout:g} s" if code is None else _ending(code)
        lines = tail(self.log, self._offset)
        return f"{self.child.name} {what} before it was ready; see {self.log}" + "".join(
            f"\n  | {line}" for line in lines
        )

    def _tell(self, phase: Phase, detail: str = "") -> None:
        self._report(Note(self.child.name, phase, detail))


def tail(log: Path, offset: int = 0, lines: int = TAIL_LINES) -> list[str]:
    """The last lines written after `offset`."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - 64_000))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def _ending(code: int) -> str:
    return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def _rotate(log: Path) -> None:
    """Move a full log aside before a child opens it; nobody writes to it then."""
    if not log.exists() or log.stat().st_size < LOG_BYTES:
        return
    for number in range(LOG_KEPT, 0, -1):
        older = log.with_name(f"{log.name}.{number}")
        newer = log if number == 1 else log.with_name(f"{log.name}.{number - 1}")
        if newer.exists():
            newer.replace(older)
