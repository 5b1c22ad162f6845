"""Exit codes of `countersign`, and which error ends with which."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from sqlalchemy.exc import DBAPIError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from models.card import visible
from models.errors import InvalidInput, KeyMissing, PolicyDenied, Unavailable, UnknownName

EXPLAINED = (
    "Exit codes: 0 done, 1 something unexpected, 2 the input was refused, 3 not ready or not reachable, "
    "4 refused by the gate (the answer did not count, or the run ended rejected or expired)."
)
MEND: Mapping[str, str] = {
    "SQLITE_BUSY": "another process holds it; try again, or stop that one",
    "SQLITE_READONLY": "let whoever runs this write it and its folder",
    "SQLITE_CANTOPEN": "let whoever runs this read and write it and its folder",
    "SQLITE_FULL": "make room on its disk",
    "SQLITE_IOERR": "make room on its disk, or look after the disk",
    "SQLITE_CORRUPT": "restore it from a backup",
    "SQLITE_NOTADB": "it is no database; restore it, or name another",
}
"""What to do, by the beginning of SQLite's own name of an error; anything else `countersign up` may mend."""
POSTGRES = {
    None: "see that PostgreSQL runs, and that `database` names one of its databases and roles",
    "25": "it only reads: let `database` name the primary",
    "53": "make room on its disk, or let it take more connections",
    "55": "others keep it busy; try again",
    "57": "others keep it busy, or it is being stopped; try again",
}
"""The same by the class of PostgreSQL's own state of an error; nothing where no server answered."""
SHOWN = 2000
"""Characters of an error; of a longer one the middle is left out, since the remedy stands at its end."""
AWAY = (RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED)


class Exit(IntEnum):
    """How a command ended."""

    DONE = 0
    UNEXPECTED = 1
    REFUSED = 2
    NOT_READY = 3
    GATE = 4


class Refused(Exception):
    """The gate said no; the text is for the person."""


def code_of(error: Exception) -> Exit:
    """The exit code of an error."""
    match error:
        case Refused():
            return Exit.GATE
        case InvalidInput() | UnknownName() | PolicyDenied():
            return Exit.REFUSED
        case Unavailable() | KeyMissing() | DBAPIError() | OSError():
            return Exit.NOT_READY
        case RPCError(status=status) if status in AWAY:
            return Exit.NOT_READY
        case _:
            return Exit.UNEXPECTED


def text_of(error: Exception) -> str:
    """What it says, in lines for a person, with nothing in them that a terminal would obey."""
    text = "\n".join(visible(line) for line in _words(error).split("\n"))
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"


def _words(error: Exception) -> str:
    match error:
        case ApplicationError() | KeyMissing():
            return error.message
        case Refused():
            return str(error)
        case DBAPIError():
            return f"database: {type(error.orig).__name__}: {error.orig}; {_mend(error)}"
        case RPCError(status=status) if status in AWAY:
            return f"Temporal does not answer ({error.message}); start `countersign up`"
        case OSError():
            what = error.filename or "writing"
            return f"{what}: {error.strerror or error}; see that it is there and yours to use, and has room"
        case _:
            return f"unexpected {type(error).__name__}: {error}; --debug shows where"


def _mend(error: DBAPIError) -> str:
    name = "_".join(str(getattr(error.orig, "sqlite_errorname", "")).split("_")[:2])
    state = getattr(error.orig, "sqlstate", "")
    return MEND.get(name) or POSTGRES.get(state and state[:2], "start `countersign up` to mend it")
