"""Which request keys were taken before. Reads only; claiming is part of admission."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import select

from activities.services.database import Database
from models.tables import Claim, table

CLAIM = table(Claim)


class Claims:
    """The claims of all tenants, which outlive every Temporal history."""

    def __init__(self, database: Database) -> None:
        """Share the database in which runs are admitted."""
        self._database = database

    async def taken(self, tenant: str, agent: str, keys: Collection[str]) -> frozenset[str]:
        """Those of the keys that a request of this agent has, however it ended."""
        mine = (CLAIM.c.tenant == tenant) & (CLAIM.c.agent == agent)
        query = select(CLAIM.c.key).where(mine & CLAIM.c.key.in_(list(keys)))
        return await self._database.read(lambda connection: frozenset(connection.execute(query).scalars()))
