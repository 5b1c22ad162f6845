from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from activities.services.database import Database
from activities.services.migrations import migrate, state
from models.tables import SQLModel

BY_HAND = ("memory_words", "memory_vocabulary")
"""Made by statements of their own, which the models do not know."""


def test_the_migrations_lead_to_what_the_models_say(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fresh.db'}"
    migrate(url)
    database = Database(url)
    with database.engine.connect() as link:
        differences = [
            one
            for one in compare_metadata(MigrationContext.configure(link), SQLModel.metadata)
            if not any(name in str(one) for name in BY_HAND)
        ]
    database.close()
    assert differences == []


def test_migrating_again_changes_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'twice.db'}"
    migrate(url)
    migrate(url)
    current, expected = state(url)
    assert current == expected


def test_stacks_that_start_at_once_migrate_one_after_the_other(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'at-once.db'}"
    with ThreadPoolExecutor(3) as stacks:
        list(stacks.map(migrate, [url] * 3))
    current, expected = state(url)
    assert current == expected
