"""What stands between several decisions of one transaction, and how each of them is put on record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from activities.services.budget import Hold
from models.budget import Account
from models.routing import RouteRecord


class Balances:
    """Accounts as they stand, while one decision after another draws on them."""

    def __init__(self, accounts: Iterable[Account]) -> None:
        """Take them locked."""
        self._now = {one.name: one for one in accounts}

    def of(self, accounts: Iterable[Account]) -> tuple[Account, ...]:
        """What is left of these now."""
        return tuple(
            one.model_copy(update={"held": self._now[one.name].held, "spent": self._now[one.name].spent})
            for one in accounts
        )

    def hold(self, hold: Hold) -> None:
        """Let those that come later see that this is taken."""
        for name in hold.accounts:
            before = self._now[name]
            self._now[name] = before.model_copy(update={"held": before.held + hold.worst})


def body_of(record: RouteRecord, seen: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON, given its snapshot as JSON: route and needs in full, else what is not a default."""
    body = record.model_dump(mode="json", exclude_defaults=True, exclude={"snapshot", "route", "needs"})
    if seen:
        body["snapshot"] = seen
    return body | {
        "route": record.route.model_dump(mode="json"),
        "needs": record.needs.model_dump(mode="json"),
    }
