"""Bringing a database to the schema this code expects; run once before the workers of a stack start."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from activities.services.database import Database


def migrate(url: str) -> None:
    """Upgrade to the newest schema; does nothing when it is there already."""
    database = Database(url)
    try:
        # In its turn, like all that writes: two stacks that start at once would trip over each other.
        database.submit(_upgrade).result()
    finally:
        database.close()


def state(url: str) -> tuple[str | None, str | None]:
    """The revision a database is at, and the one this code expects."""
    database = Database(url)
    try:
        with database.engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
    finally:
        database.close()
    return current, ScriptDirectory.from_config(_config()).get_current_head()


def _upgrade(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config
