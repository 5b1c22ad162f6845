"""What a connector is: five verbs on one target, and an honest statement of what the target guarantees."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from models.loop import Change, Cost, Guarantee, Reversibility


@dataclass(frozen=True, slots=True)
class Work:
    """An action with its arguments read."""

    operation: str
    arguments: dict[str, Any]
    tenant: str = ""
    """Whose run it is; for targets that are the tenant's own records."""


@dataclass(frozen=True, slots=True)
class Dry:
    """A dry run: what would change, against which version, and how it would be taken back."""

    target: str
    version: str
    diff: str
    reversibility: Reversibility
    undo: str
    cost: Cost = field(default_factory=Cost)
    changes: tuple[Change, ...] = ()
    """Every number that would be moved, read from the target and the arguments, never from the agent's words,
    and no earlier than `version`. Limits of the gate go by them; where they are not known, none covers it."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What the target says happened."""

    reference: str
    version: str
    links: tuple[str, ...] = ()
    detail: str = ""


class Connector(Protocol):
    """One target. Methods raise the errors of `models/errors.py` and retry nothing themselves."""

    @property
    def name(self) -> str:
        """The name actions use."""
        ...

    @property
    def guarantee(self) -> Guarantee:
        """What the target promises about a key used twice."""
        ...

    @property
    def settle(self) -> timedelta:
        """How long after an attempt's deadline a request may still land."""
        ...

    async def plan(self, work: Work) -> Dry:
        """Say what `apply` would do, without doing it.

        Raises:
            InvalidInput: an argument is wrong; names field, value and remedy.
        """
        ...

    async def find(self, key: str, work: Work) -> Applied | None:
        """Look the key up at the target."""
        ...

    async def apply(self, key: str, work: Work, expected: str, deadline: datetime) -> Applied:
        """Do it, once per key, if the target still stands at version `expected`.

        Raises:
            PreconditionLost: what the action reads or overwrites has changed.
            ConnectorUnavailable: no answer, or the deadline passed before sending.
        """
        ...

    async def verify(self, work: Work, applied: Applied) -> Applied:
        """Look at the target as a reader would; returns `applied` with links and detail filled in.

        Raises:
            ConnectorUnavailable: what was applied cannot be seen yet.
        """
        ...

    async def undo(self, key: str, work: Work, applied: Applied, deadline: datetime) -> Applied:
        """Take an applied action back, once per key.

        Raises:
            ConnectorRejected: it cannot be taken back.
        """
        ...
