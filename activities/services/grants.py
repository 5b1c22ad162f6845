"""Uses of narrow grants, counted in the transaction that binds the intent which takes one."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, update

from activities.services.database import insert_for
from models.loop import Exemption, Use
from models.tables import GrantUse, table

USED = table(GrantUse)


def take_use(link: Connection, tenant: str, agent: str, grant: Exemption) -> Use | None:
    """The next use of a grant; `None` when all of them are taken."""
    insert = insert_for(link.dialect.name)
    fresh = insert(USED).values(tenant=tenant, agent=agent, name=grant.name, used=0)
    link.execute(fresh.on_conflict_do_nothing())
    # One statement decides, so that two intents at once never take one number.
    taken = link.execute(
        update(USED)
        .where(_is(tenant, agent, grant), USED.c.used < grant.max_uses)
        .values(used=USED.c.used + 1)
        .returning(USED.c.used)
    ).scalar_one_or_none()
    return None if taken is None else Use(grant=grant, number=taken)


def give_back(link: Connection, tenant: str, agent: str, use: Use) -> None:
    """Undo `take_use` in the same transaction: the intent it was for does not stand."""
    link.execute(update(USED).where(_is(tenant, agent, use.grant)).values(used=USED.c.used - 1))


def _is(tenant: str, agent: str, grant: Exemption) -> Any:
    return (USED.c.tenant == tenant) & (USED.c.agent == agent) & (USED.c.name == grant.name)
