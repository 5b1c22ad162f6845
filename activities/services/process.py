"""Runs another program to its end: no shell, a bare environment, and never longer than it was given."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

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
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", **(environment or {})},
        )
    except FileNotFoundError:
        raise ConnectorUnavailable(f"{program}: no such program; install it on this machine") from None
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate(data)
    except TimeoutError:
        raise ConnectorUnavailable(f"{program} {arguments[0]}: no end within {seconds:.1f} s") from None
    finally:
        await _stop(process)
    return Ended(process.returncode or 0, out, err)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Ask first: a killed git would leave its lock file behind."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(GRACE_SECONDS):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
