"""Which model a tier without a pin is held to, whatever process was started since.

What answered last is what everything else rests on that calls left behind: measurements, calibration and kept
answers. So the record of calls is the acceptance, and another model behind the same tier waits for a person,
after a restart too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sqlalchemy import select

from activities.services.database import Database
from models.tables import ModelCall, table

CALL = table(ModelCall)


def accepted_by_use(database: Database, tier: str) -> Callable[[], Awaitable[str | None]]:
    """What says which model answered last at a tier; `None` if none ever did."""
    query = (
        select(CALL.c.model)
        .where(CALL.c.tier == tier, CALL.c.model != "")
        .order_by(CALL.c.called_at.desc())
        .limit(1)
    )

    async def look() -> str | None:
        return await database.read(lambda link: link.execute(query).scalars().first())

    return look
