"""Exit codes of `countersign`, and which error ends with which."""

from __future__ import annotations

from enum import IntEnum

from sqlalchemy.exc import DBAPIError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from models.errors import InvalidInput, KeyMissing, PolicyDenied, Unavailable, UnknownName

EXPLAINED = (
    "Exit codes: 0 done, 1 something unexpected, 2 the input was refused, 3 not ready or not reachable, "
    "4 refused by the gate (the answer did not count, or the run ended rejected or expired)."
)
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
        case Unavailable() | KeyMissing() | DBAPIError():
            return Exit.NOT_READY
        case RPCError(status=status) if status in AWAY:
            return Exit.NOT_READY
        case _:
            return Exit.UNEXPECTED


def text_of(error: Exception) -> str:
    """What it says, in lines for a person."""
    match error:
        case ApplicationError() | KeyMissing():
            return error.message
        case Refused():
            return str(error)
        case DBAPIError():
            return f"database: {type(error.orig).__name__}: {error.orig}; start `countersign up` to mend it"
        case RPCError(status=status) if status in AWAY:
            return f"Temporal does not answer ({error.message}); start `countersign up`"
        case _:
            return f"unexpected {type(error).__name__}: {error}; --debug shows where"
