"""Establishing who answered, as a local activity of the `decide` role."""

from __future__ import annotations

from typing import Protocol

from temporalio import activity

from models.gate import Identity
from models.orders import Identification


class Identifying(Protocol):
    """Knows the people."""

    async def identify(self, wanted: Identification) -> Identity:
        """Who gave this answer."""
        ...


class Approvals:
    """What answers need besides the pure rules."""

    def __init__(self, identities: Identifying) -> None:
        """Take who knows the people."""
        self._identities = identities

    @activity.defn(name="identify")
    async def identify(self, wanted: Identification) -> Identity:
        """Who gave this answer, and how surely that is known."""
        return await self._identities.identify(wanted)
