"""Every error a step may raise, as one tree.

The Temporal error type is the class name, so a workflow branches on `err.cause.type`. A text says what
failed, on which id, and what to do next; it never holds payload or secrets. Rejected, expired and
cancelled are outcomes, not errors.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import ClassVar

from pydantic import ValidationError
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory


class CountersignError(ApplicationError):
    """Root of the tree; subclasses only choose whether Temporal may retry."""

    retryable: ClassVar[bool] = True
    benign: ClassVar[bool] = False

    def __init__(self, message: str, *details: object, next_retry_delay: timedelta | None = None) -> None:
        """Take the text for people, JSON details, and how long Temporal should wait before retrying."""
        super().__init__(
            message,
            *details,
            type=type(self).__name__,
            non_retryable=not self.retryable,
            next_retry_delay=next_retry_delay,
            category=(
                ApplicationErrorCategory.BENIGN if self.benign else ApplicationErrorCategory.UNSPECIFIED
            ),
        )


class KeyMissing(RuntimeError):
    """Data were sealed under a key that this process does not have; once it has, trying again helps.

    Outside the tree on purpose: an error of Temporal's, raised while a workflow reads its payloads, would end
    the run for good. Any other makes Temporal try the task again, until the key is there.
    """

    @property
    def message(self) -> str:
        """The text for people."""
        return str(self)


class Final(CountersignError):
    """Trying again cannot help."""

    retryable = False


class InvalidInput(Final):
    """A value breaks its schema; use `InvalidInput.field` so that the remedy is never forgotten."""

    @classmethod
    def field(cls, name: str, value: object, remedy: str) -> InvalidInput:
        """Name the field, show at most 80 characters of the value, and say what to write instead."""
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return cls(f"{name}: {shown} is not accepted; {remedy}")

    @classmethod
    def first(cls, error: ValidationError, whole: str, wrapped: Collection[str] = ()) -> InvalidInput:
        """Name the first field that does not fit; `whole` is what all of it is called.

        The path leaves out `wrapped`, which whoever wrote the value did not write.
        """
        found = error.errors()[0]
        name = ".".join(str(part) for part in found["loc"] if part not in wrapped) or whole
        return cls.field(name, found["input"], found["msg"])


class RegionBound(InvalidInput):
    """Content that only the processes of one region hold was asked for elsewhere."""


class UnknownName(Final):
    """No agent, connector, operation or tier of that name."""


class PolicyDenied(Final):
    """The action lies outside what the agent or the gate allows."""


class BudgetExceeded(Final):
    """The spend or token cap of the run or day is used up."""

    benign = True


class DeadlineMissed(Final):
    """The answer cannot be, or was not, had in the time somebody waits for it."""

    benign = True


class Declined(Final):
    """The agent has nothing to propose, and says why; the run ends without an intent."""

    benign = True


class CredentialsRejected(Final):
    """The target answered 401 or 403."""


class ConnectorRejected(Final):
    """The target refused the action for good."""


class PreconditionLost(ConnectorRejected):
    """What the plan was made against has changed since."""


class OutputInvalid(Final):
    """A model's answer failed its schema after one repair."""


class IdentityChanged(Final):
    """Another model than the accepted one answers at a tier; a person accepts it in the settings."""


class AllTiersFailed(CountersignError):
    """Every permitted tier is open or failed."""


class LedgerBroken(Final):
    """Stored bytes and their hashes disagree; nothing may act on them."""


class KeyDestroyed(Final):
    """A subject was erased by destroying its key; what was sealed under it cannot be read again."""


class RateLimited(CountersignError):
    """The other side asked us to come back later."""


class Unavailable(CountersignError):
    """No answer, or one that says to try again."""


class ConnectorUnavailable(Unavailable):
    """The target system is away."""


class TierUnavailable(Unavailable):
    """The model server is away."""


class MemoryUnavailable(Unavailable):
    """The memory store or its embedding server is away."""


class LedgerConflict(CountersignError):
    """Another writer won the expected version; read and decide again."""
