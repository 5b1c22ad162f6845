"""Whether everything that is gone was ordered to go, and every receipt of an erasure answers an order.

An order names the payloads and the key that it is about. Nothing but an erasure removes what an event names,
since it was stored in the commit that logged the event: what is gone without an order was taken away.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from models.ledger import Event, EventType


class Erased:
    """Follows orders to erase through one log."""

    def __init__(self) -> None:
        """Nothing is ordered yet."""
        self._ordered = dict[str, datetime]()
        self._open = dict[str, str]()
        self._gone = list[tuple[int, str, str | None, str | None]]()

    def take(self, event: Event) -> Iterator[str]:
        """What is wrong with the next event, given those before it."""
        if event.type is EventType.ERASURE_ORDER:
            self._open[event.event_id] = event.stream
            for name in _named(event.body):
                self._ordered.setdefault(name, event.recorded_at)
        elif event.type is EventType.ERASURE and self._open.pop(_order(event), None) != event.stream:
            yield "it is the receipt of an erasure, and no order to erase stands before it"

    def miss(self, seq: int, name: str, key: str | None, at: str | None) -> None:
        """Something is gone that event `seq` names, or a key that was destroyed at some time."""
        self._gone.append((seq, name, key, at))

    def end(self) -> Iterator[tuple[int, str]]:
        """What is gone without an order, each with the event concerned."""
        for seq, name, key, at in self._gone:
            ordered = [self._ordered[one] for one in (name, key) if one in self._ordered]
            if not ordered:
                yield seq, f"{_what(at)} {name} is gone, and nobody ordered it to be erased"
            elif at is not None and datetime.fromisoformat(at) < min(ordered):
                yield seq, f"key {name} was destroyed at {at}, before that was ordered"


def _named(body: dict[str, Any]) -> Iterator[str]:
    yield from (str(one) for one in body.get("payloads", ()))
    if body.get("key"):
        yield str(body["key"])


def _order(event: Event) -> str:
    return str(event.body.get("order"))


def _what(at: str | None) -> str:
    return "payload" if at is None else "key"
