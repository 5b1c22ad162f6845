"""How a worker writes its log; with encryption on, errors are told by type and place, never by their text.

A text may quote what was refused, and so a datum that is sealed everywhere else.
"""

from __future__ import annotations

import logging
import traceback
from types import TracebackType

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
ASYNCIO = "asyncio"
Raised = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class Discreet(logging.Formatter):
    """Leaves out what exceptions say."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record; exceptions among its arguments become the names of their types."""
        shown = logging.makeLogRecord(record.__dict__ | {"exc_text": None})
        if isinstance(shown.args, tuple):
            shown.args = tuple(_named(argument) for argument in shown.args)
        if shown.name == ASYNCIO and shown.exc_info:
            # Its text spells the task with its error and all that the task was given.
            shown.msg, shown.args = shown.getMessage().partition("\n")[0], None
        return super().format(shown)

    def formatException(self, ei: Raised) -> str:
        """Type and place of an exception and of those behind it."""
        lines: list[str] = []
        error = ei[1]
        while error is not None:
            lines += [f"{type(error).__name__} (text withheld: encryption is on)"]
            lines += [
                f"  {frame.filename}:{frame.lineno} in {frame.name}"
                for frame in traceback.extract_tb(error.__traceback__)
            ]
            error = error.__cause__ or error.__context__
        return "\n".join(lines)


def start(discreet: bool) -> None:
    """Log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(Discreet(FORMAT) if discreet else logging.Formatter(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _named(argument: object) -> object:
    return type(argument).__name__ if isinstance(argument, BaseException) else argument
