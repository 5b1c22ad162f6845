"""Whose records stand in a database."""

from __future__ import annotations

from sqlalchemy import select

from activities.services.database import Database
from models.tables import LogHead, table

HEAD = table(LogHead)


async def tenants_of(database: Database) -> dict[str, int]:
    """Every tenant that has a log, and how many events stand in it."""
    query = select(HEAD.c.log_id, HEAD.c.size).order_by(HEAD.c.log_id)
    rows = await database.read(lambda link: link.execute(query).all())
    return {row.log_id: row.size for row in rows}
