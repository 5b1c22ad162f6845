"""What SQL says to a vector index outside it: which vectors there are, and how far the index has followed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, select, update

from activities.services.database import insert_for
from activities.services.leases import check_in
from activities.services.vectors import EMBEDDING, MEMORY
from models.tables import IndexCursor, table

CURSOR = table(IndexCursor)
STORE = "weaviate"
NUMBERS = ("position", "recorded_at", "active_at", "valid_from", "valid_to", "expires_at")


def _all() -> Any:
    e, m = EMBEDDING.c, MEMORY.c
    same = (m.tenant == e.tenant) & (m.record_id == e.record_id)
    columns = [m[name] for name in NUMBERS if name != "position"]
    return select(e.tenant, e.record_id, e.position, e.vector, m.kind, m.agent, *columns).join_from(
        EMBEDDING, MEMORY, same
    )


def beyond(connection: Connection, model: str, limit: int) -> Sequence[Row[Any]]:
    """The oldest changes that the index has not followed."""
    after = connection.execute(select(CURSOR.c.position).where(*cursor_of(model))).scalar_one_or_none() or 0
    e = EMBEDDING.c
    wanted = _all().where(e.model == model, e.position > after).order_by(e.position).limit(limit)
    return connection.execute(wanted).all()


def behind(connection: Connection, model: str) -> int:
    """How many changes the index has not followed."""
    after = connection.execute(select(CURSOR.c.position).where(*cursor_of(model))).scalar_one_or_none() or 0
    e = EMBEDDING.c
    wanted = select(func.count()).where(e.model == model, e.position > after)
    return int(connection.execute(wanted).scalar_one())


def changed_since(connection: Connection, model: str, rows: Sequence[Row[Any]]) -> list[Row[Any]]:
    """Those of these rows that SQL says something else about by now, as it says it."""
    seen, ids = {(row.tenant, row.record_id): row.position for row in rows}, defaultdict[str, list[str]](list)
    for tenant, record_id in seen:
        ids[tenant].append(record_id)
    now = [row for tenant, mine in ids.items() for row in rows_of(connection, tenant, model, mine)]
    return [row for row in now if row.position != seen[row.tenant, row.record_id]]


def start_over(connection: Connection, model: str) -> None:
    """Remember that the index has followed nothing."""
    connection.execute(update(CURSOR).where(*cursor_of(model)).values(position=0))


def rows_of(connection: Connection, tenant: str, model: str, ids: Sequence[str]) -> Sequence[Row[Any]]:
    """Records of a tenant as they stand."""
    e = EMBEDDING.c
    return connection.execute(_all().where(e.model == model, e.tenant == tenant, e.record_id.in_(ids))).all()


def positions(connection: Connection, tenant: str, model: str) -> dict[str, int]:
    """Where the vectors of a tenant stand, by record; emptied ones are none."""
    e = EMBEDDING.c
    full = select(e.record_id, e.position).where(
        e.tenant == tenant, e.model == model, func.length(e.vector) > 0
    )
    return {row.record_id: row.position for row in connection.execute(full)}


def cursor_of(model: str) -> tuple[Any, Any]:
    """Which row says how far the index of a model is."""
    return CURSOR.c.store == STORE, CURSOR.c.model == model


def move(connection: Connection, model: str, rows: Sequence[Row[Any]], lease: str, epoch: int) -> None:
    """Remember how far the index is; a former holder of the lease may not."""
    check_in(connection, lease, epoch)
    kind = insert_for(connection.dialect.name)
    start = kind(CURSOR).values(store=STORE, model=model, position=0).on_conflict_do_nothing()
    connection.execute(start)
    connection.execute(update(CURSOR).where(*cursor_of(model)).values(position=rows[-1].position))
