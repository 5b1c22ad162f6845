"""Reading from the ledger what became of each class of actions."""

from __future__ import annotations

import json

from sqlalchemy import Connection, select

from activities.services.database import Database
from activities.services.ledger_store import EVENT
from models.autonomy import TOLD, ActionClass, Record, Tally
from models.ledger import Event

PAGE = 5_000


async def records_of(database: Database, tenant: str) -> dict[ActionClass, Record]:
    """The records of a tenant, by class; nothing is written."""
    counted, after = Tally(), 0
    while page := await database.read(lambda link, after=after: _page(link, tenant, after)):
        for event in page:
            counted.take(event)
        after = page[-1].seq
    return counted.records


def _page(connection: Connection, tenant: str, after: int) -> list[Event]:
    wanted = (EVENT.c.log_id == tenant, EVENT.c.seq > after, EVENT.c.type.in_([one.value for one in TOLD]))
    query = select(EVENT.c.envelope, EVENT.c.leaf_hash).where(*wanted).order_by(EVENT.c.seq).limit(PAGE)
    rows = connection.execute(query).all()
    return [Event.model_validate(json.loads(row.envelope) | {"leaf_hash": row.leaf_hash}) for row in rows]
