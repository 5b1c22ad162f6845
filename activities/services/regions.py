"""Where a region's texts are: in a database of its own, which only its own processes open.

A process of a region writes content there first, and then its name and size at the centre, in the transaction
that speaks of it: what the centre names is there to be read in the region, whichever process is killed when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from sqlalchemy import Connection, select

from activities.services.database import Database, insert_for, to_micros
from models.errors import InvalidInput, RegionBound
from models.loop import Ref
from models.tables import RegionalContent, table

T = TypeVar("T")
OPTION = "countersign_region"
NAMES = table(RegionalContent)


@dataclass(frozen=True, slots=True)
class Home:
    """The region that this process serves, and the database that keeps its texts."""

    region: str
    database: Database

    def read(self, work: Callable[[Connection], T]) -> T:
        """Look into the region's database, from inside a transaction at the centre."""
        return self.database.read_now(work)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Commit to the region's database, before the centre's transaction that names it goes on.

        What a batch at the centre writes may be run again, so `work` must come to the same twice.
        """
        return self.database.submit(work).result()


def bind(database: Database, home: Home) -> Database:
    """Let everything that is put into this database of the centre's go to a region instead."""
    # On the engine, so that every transaction has it: a function that put here would be a leak.
    database.engine.update_execution_options(**{OPTION: home})
    # A region's database that has fallen silent must not hold up the centre and other regions.
    database.first = lambda: home.read(lambda link: None)
    return database


def home_of(connection: Connection) -> Home | None:
    """The region whose process this is; `None` at the centre."""
    return connection.get_execution_options().get(OPTION)


def home_behind(database: Database) -> Home | None:
    """The same of a whole database."""
    return database.engine.get_execution_options().get(OPTION)


def name_in(connection: Connection, tenant: str, ref: Ref, region: str) -> None:
    """Write down at the centre that a region holds this."""
    row = dict(
        tenant=tenant,
        digest=ref.digest,
        region=region,
        size=ref.size,
        media_type=ref.media_type,
        stored_at=to_micros(datetime.now(UTC)),
    )
    insert = insert_for(connection.dialect.name)
    connection.execute(insert(NAMES).values(**row).on_conflict_do_nothing())


def absent(connection: Connection, tenant: str, digest: str) -> InvalidInput:
    """Why content cannot be had here: a region has it, or nobody."""
    held = select(NAMES.c.region).where(NAMES.c.tenant == tenant, NAMES.c.digest == digest)
    region = connection.execute(held.order_by(NAMES.c.region)).scalars().first()
    home = home_of(connection)
    if region is None or (home is not None and home.region == region):
        return InvalidInput.field("ref", digest, "no such content is stored; store it first")
    here = "the centre" if home is None else f"region {home.region}"
    return RegionBound(
        f"content {digest[:12]}… is bound to region {region!r}, and this process serves {here}; ask a worker "
        f'or command of that region (region = "{region}" in its countersign.toml)'
    )
