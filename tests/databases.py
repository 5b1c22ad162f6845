"""Databases for tests: migrated once in a process, and copied from there on."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from sqlalchemy import make_url

from activities.services.migrations import migrate


def migrated(url: str) -> str:
    """Leave a database as `migrate` would, but by a copy if it is a new file of SQLite's; returns the URL."""
    file = Path(make_url(url).database or "")
    if not url.startswith("sqlite") or file.exists():
        migrate(url)
    else:
        file.write_bytes(_empty())
    return url


@cache
def _empty() -> bytes:
    # Whole in one file: the last connection that closes takes the write-ahead log in.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "empty.db"
        migrate(f"sqlite:///{file}")
        return file.read_bytes()
