"""`countersign up`: everything on this machine, until Ctrl-C.

Exit codes: 0 stopped cleanly, 1 something nobody expected, 2 refused before anything started (data folder in
use, port taken, wrong setting), 3 a part did not become ready.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from models.errors import InvalidInput, Unavailable
from models.settings import Settings
from scripts.stack import Migrate, Stack, run_stack, stack
from scripts.supervisor import Note, Phase
from workers import config

__all__ = ["Progress", "run_stack", "serve", "stack", "up"]

STOPPED, REFUSED, NOT_READY = 0, 2, 3
WORDS = {
    Phase.STARTING: ("…", "dim"),
    Phase.READY: ("✓", "green"),
    Phase.ENDED: ("✗", "red"),
    Phase.STOPPED: ("·", "dim"),
}


def up(
    data: Annotated[Path | None, typer.Option(help="Folder for everything that is kept.")] = None,
) -> None:
    """Start Temporal, the models and the workers; Ctrl-C stops them in order."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        settings = config.load()
        if data is not None:
            settings = settings.model_copy(update={"data": data})
        code = asyncio.run(serve(settings, console))
    except (InvalidInput, Unavailable) as error:
        console.print(error.message, style="red", markup=False)
        code = REFUSED if isinstance(error, InvalidInput) else NOT_READY
    raise typer.Exit(code)


async def serve(settings: Settings, console: Console, migrate: Migrate | None = None) -> int:
    """Run the stack until SIGINT or SIGTERM, also while it is still starting; returns the exit code."""
    progress = Progress(console)
    asked = _stop_on_signals()
    with suppress(asyncio.CancelledError):
        async with stack(settings, progress.take, migrate) as running:
            progress.ready(running)
            await asyncio.Event().wait()
    if not asked.is_set():
        raise asyncio.CancelledError
    console.print("stopped")
    return STOPPED


class Progress:
    """Tells a person or a log what the processes do, a line each."""

    def __init__(self, console: Console) -> None:
        """Write to `console`; without a terminal the lines are plain."""
        self._console = console

    def take(self, note: Note) -> None:
        """One thing that happened; starting alone is no news without a terminal."""
        if note.phase is Phase.STARTING and not self._console.is_terminal:
            return
        mark, style = WORDS[note.phase]
        line = f"{mark} {note.name:<18} {note.phase} {note.detail}".rstrip()
        # Losing the terminal is no reason to stop serving.
        with suppress(OSError):
            self._console.print(line, style=style, markup=False)

    def ready(self, running: Stack) -> None:
        """Everything runs; say where."""
        for name, address in running.addresses.items():
            self._console.print(f"{name:<20} {address}", markup=False)
        self._console.print("ready; Ctrl-C stops it")


def _stop_on_signals() -> asyncio.Event:
    asked, loop, work = asyncio.Event(), asyncio.get_running_loop(), asyncio.current_task()

    def stop() -> None:
        # Only once: a second cancel would interrupt the orderly stop, which has limits of its own.
        if not asked.is_set() and work is not None:
            asked.set()
            work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    return asked
