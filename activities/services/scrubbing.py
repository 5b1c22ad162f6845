"""Going round a log all the time, so that what was changed in it is found before anybody asks.

A slice of events is hashed, and climbed from to the head, which every checkpoint signs. Storage does the same
with disks, and calls it scrubbing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, select

from activities.services import merkle
from activities.services.database import Database
from activities.services.ledger_export import columns
from activities.services.ledger_store import EVENT, HEAD, NODE
from models.errors import LedgerBroken
from models.ledger import Event

LEVEL = 10
WIDTH = 1 << LEVEL
"""Events of a slice: the leaves of one subtree."""
SLICES = 2
"""Of a log in one round."""


class Scrub:
    """Where it is in each log of a database."""

    def __init__(self, database: Database) -> None:
        """Begin at the first event of each."""
        self._database = database
        self._next = dict[str, int]()

    async def go_on(self, tenant: str) -> None:
        """Check the next slices of a log; after the last comes the first.

        Raises:
            LedgerBroken: an event is not what the head says. The same slice is looked at again next time.
        """
        for _ in range(SLICES):
            start = self._next.get(tenant, 0)
            self._next[tenant] = await self._database.read(
                lambda link, start=start: check_slice(link, tenant, start)
            )
            if self._next[tenant] == 0:
                return


def check_slice(link: Connection, tenant: str, start: int) -> int:
    """Check the events after `start`, a multiple of `WIDTH`; returns where the next slice begins, or 0.

    Raises:
        LedgerBroken: what stands there is not what the head says.
    """
    head = link.execute(select(HEAD.c.size, HEAD.c.peaks).where(HEAD.c.log_id == tenant)).first()
    if head is None or head.size <= start:
        return 0
    try:
        peaks = merkle.unpack(head.size, bytes(head.peaks))
    except ValueError as error:
        raise _broken(tenant, start, head.size, str(error)) from None
    end = min(start + WIDTH, head.size)
    leaves = _leaves(link, tenant, start, end)
    if end - start < WIDTH:
        before = (head.size >> LEVEL).bit_count()
        right = merkle.extend(start, peaks[:before], leaves)[0] == peaks
    else:
        right = _climb(link, tenant, start, leaves, head.size) in peaks
    if not right:
        raise _broken(tenant, start, end, "they are not what the head of the log was made of")
    return end if end < head.size else 0


def _leaves(link: Connection, tenant: str, start: int, end: int) -> list[bytes]:
    """The hashes of a slice's events, which stand where they should with what stands beside them."""
    mine = (EVENT.c.log_id == tenant) & EVENT.c.seq.between(start + 1, end)
    rows = link.execute(select(EVENT).where(mine).order_by(EVENT.c.seq)).all()
    found = list[bytes]()
    for seq, row in enumerate(rows, start + 1):
        leaf = merkle.leaf_hash(bytes(row.envelope))
        if row.seq != seq or not _fits(row, tenant, leaf):
            raise _broken(tenant, seq - 1, seq, "what stands there does not fit its bytes")
        found.append(leaf)
    if len(found) != end - start:
        raise _broken(tenant, start + len(found), end, "they are missing")
    return found


def _fits(row: Row[Any], tenant: str, leaf: bytes) -> bool:
    try:
        event = Event.model_validate(json.loads(row.envelope) | {"leaf_hash": leaf.hex()})
    except (ValueError, TypeError):
        return False
    return event.log_id == tenant and all(
        getattr(row, name) == value for name, value in columns(event).items()
    )


def _climb(link: Connection, tenant: str, start: int, leaves: Sequence[bytes], size: int) -> bytes:
    """The peak of a log of this size that a whole slice is below, by its neighbours."""
    (node,), _ = merkle.extend(0, [], leaves)
    level, index = LEVEL, start >> LEVEL
    while not (size >> level & 1 and index == (size >> level) - 1):
        mine = (NODE.c.log_id == tenant) & (NODE.c.level == level) & (NODE.c.idx == index ^ 1)
        beside = link.execute(select(NODE.c.hash).where(mine)).scalar_one_or_none()
        if beside is None:
            raise _broken(tenant, start, start + WIDTH, f"subtree {level}/{index ^ 1} is missing")
        pair = (bytes(beside), node) if index & 1 else (node, bytes(beside))
        level, index, node = level + 1, index >> 1, merkle.node_hash(*pair)
    return node


def _broken(tenant: str, start: int, end: int, why: str) -> LedgerBroken:
    events = f"event {end}" if end == start + 1 else f"events {start + 1} to {end}"
    return LedgerBroken(
        f"log {tenant}, {events}: {why}; `countersign ledger verify` says more: stop all workers, restore "
        "the database"
    )
