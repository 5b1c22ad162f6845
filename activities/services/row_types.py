"""Whether the rows that a log is read from hold what their columns are for.

SQLite takes a text where bytes belong, and both databases take a time that no calendar has. Who reads such
a row would fall over it, and say nothing of the log.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from sqlalchemy import Column, ColumnElement, Connection, Integer, LargeBinary, func, or_, select

from activities.services.checkpoints import CHECKPOINT
from activities.services.content import BLOB
from activities.services.database import to_micros
from activities.services.ledger_store import EVENT, HEAD, NODE
from activities.services.vault import KEY

TABLES = (EVENT, NODE, HEAD, CHECKPOINT, BLOB, KEY)
TIMES = (EVENT.c.recorded_at, KEY.c.destroyed_at)
FIRST, LAST = (to_micros(one.replace(tzinfo=UTC)) for one in (datetime.min, datetime.max))


def misfits(link: Connection, tenant: str) -> Iterator[str]:
    """What stands in which column and cannot be what belongs there."""
    sqlite = link.dialect.name == "sqlite"
    for table in TABLES:
        mine = (table.c.tenant if "tenant" in table.c else table.c.log_id) == tenant
        wrong = {column.name: [_strange(column)] if sqlite else [] for column in table.columns}
        for time in TIMES:
            if time.table is table:
                wrong[time.name].append(~time.between(FIRST, LAST))
        asked = [each for some in wrong.values() for each in some]
        if (
            not asked
            or link.execute(select(1).select_from(table).where(mine, or_(*asked)).limit(1)).first() is None
        ):
            continue
        for name, some in wrong.items():
            query = select(1).select_from(table).where(mine, or_(*some)) if some else None
            if query is not None and link.execute(query.limit(1)).first() is not None:
                yield f"{table.name}.{name} holds what does not belong there"


def _strange(column: Column[object]) -> ColumnElement[bool]:
    """Whether a value is not of its column's kind."""
    kind = column.type
    name = "integer" if isinstance(kind, Integer) else "blob" if isinstance(kind, LargeBinary) else "text"
    kinds = (name, "null") if column.nullable else (name,)
    return func.typeof(column).not_in(kinds)
