"""How `countersign doctor` says what it found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Health(StrEnum):
    """How one thing stands."""

    OK = "ok"
    ABSENT = "absent"
    """Not there, and something else is used."""
    FAILED = "failed"
    """`countersign up` cannot start like this."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    health: Health
    found: str
    use: str = ""
    """What will be used, or what to do."""
