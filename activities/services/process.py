"""Runs another program to its end: no shell, a bare environment, and never longer than it was given."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from models.errors import ConnectorUnavailable

GRACE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended and what it said."""

    code: int
    out: bytes
    err: bytes

    @property
    def complaint(self) -> str:
        """The last line it wrote about itself, short enough for an error text."""
        lines = self.err.decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else f"exit code {self.code}"


def seconds_left(now: datetime, deadline: datetime | None, limit: timedelta) -> float:
    """Seconds a step may still take.

    Raises:
        ConnectorUnavailable: the deadline has passed.
    """
    if deadline is None:
        return limit.total_seconds()
    left = (deadline - now).total_seconds()
    if left <= 0:
        raise ConnectorUnavailable(
            f"the attempt's deadline {deadline.isoformat()} has passed; nothing was sent"
        )
    return min(left, limit.total_seconds())


async def run_program(
    program: str,
    arguments: Sequence[str],
    *,
    seconds: float,
    data: bytes = b"",
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run to the end, or stop it.

    Raises:
        ConnectorUnavailable: it is not installed, or took too long.
    """
    bare = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", **(environment or {})}
    running = _Running((program, *arguments), data, bare, seconds)
    # A thread, not asyncio's own subprocesses: those wait for ever when the loop is closed while one starts.
    try:
        return await asyncio.to_thread(running.to_its_end)
    except asyncio.CancelledError:
        running.cancel()
        raise


class _Running:
    """One program, run in a thread and stopped from another."""

    def __init__(
        self, command: tuple[str, ...], data: bytes, environment: Mapping[str, str], seconds: float
    ) -> None:
        self._command = command
        self._data = data
        self._environment = environment
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._cancelled = False
        self._process: subprocess.Popen[bytes] | None = None

    def to_its_end(self) -> Ended:
        """Start it and wait. Time spent waiting for a thread counts."""
        with self._start() as process:
            try:
                out, err = process.communicate(self._data, max(self._until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                _stop(process)
                raise self._late() from None
        return Ended(process.returncode, out, err)

    def cancel(self) -> None:
        """Stop it, or keep it from starting."""
        with self._lock:
            self._cancelled = True
            if self._process is not None:
                self._process.terminate()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._cancelled or time.monotonic() >= self._until:
                raise self._late()
            pipe = subprocess.PIPE
            try:
                self._process = subprocess.Popen(
                    self._command, stdin=pipe, stdout=pipe, stderr=pipe, env=self._environment
                )
            except FileNotFoundError:
                raise ConnectorUnavailable(
                    f"{self._command[0]}: no such program; install it on this machine"
                ) from None
            return self._process

    def _late(self) -> ConnectorUnavailable:
        return ConnectorUnavailable(f"{Path(self._command[0]).name}: no end within {self._seconds:.1f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask first: a killed git would leave its lock file behind."""
    process.terminate()
    try:
        process.communicate(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
