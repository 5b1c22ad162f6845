"""Rows that are added unless their key stands there already; the database says which were new."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Table, text

from activities.services.statements import Statement

Key = tuple[Any, ...]


class Addition:
    """Adds rows to one table."""

    def __init__(self, into: Table) -> None:
        """Write the statement, the same for both databases."""
        names = [column.name for column in into.columns]
        marks = ", ".join(f":{name}" for name in names)
        keys = ", ".join(column.name for column in into.primary_key.columns)
        add = f"INSERT INTO {into.name} ({', '.join(names)}) VALUES ({marks})"
        self._statement = Statement(text(f"{add} ON CONFLICT DO NOTHING RETURNING {keys}"))

    def run(self, connection: Connection, rows: Iterable[Mapping[str, Any]]) -> set[Key]:
        """Add what is not there; returns the keys of what was new."""
        return {tuple(key) for row in rows for key in self._statement.rows(connection, row)}
