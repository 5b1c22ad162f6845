"""Statements that run so often that SQLAlchemy's own way of running them costs more than the database does.

Written once for both databases, compiled once, then given to the driver as they are. Values must be what the
driver takes: no type of SQLAlchemy's converts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ClauseElement, Connection, Dialect, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

Values = Mapping[str, Any]
PG = postgresql.dialect()


class Statement:
    """One statement with named values."""

    def __init__(self, clause: ClauseElement) -> None:
        """Compile nothing yet."""
        self._clause = clause
        self._compiled = dict[str, tuple[str, tuple[str, ...] | None]]()

    def rows(self, connection: Connection, values: Values) -> list[Any]:
        """All rows, as tuples."""
        return self._run(connection, values).fetchall()

    def run(self, connection: Connection, values: Values) -> None:
        """Run it once."""
        self._run(connection, values).close()

    def _run(self, connection: Connection, values: Values) -> Any:
        sql, names = self._sql(connection.dialect)
        cursor = _cursor(connection)
        try:
            cursor.execute(sql, _placed(values, names))
        except Exception as error:
            raise _wrapped(connection, sql, error) from error
        return cursor

    def _sql(self, dialect: Dialect) -> tuple[str, tuple[str, ...] | None]:
        """The text, and the order of its values where they go by position."""
        known = self._compiled.get(dialect.name)
        if known is None:
            made: Any = self._clause.compile(dialect=dialect)
            known = str(made), tuple(made.positiontup) if made.positiontup is not None else None
            self._compiled[dialect.name] = known
        return known


class Insertion:
    """Rows of one table, as tuples in the order of its columns, added by one statement."""

    def __init__(self, into: Table) -> None:
        """Write the statement for both databases."""
        names = ", ".join(column.name for column in into.columns)
        marks = ", ".join("?" for _ in into.columns)
        arrays = ", ".join(f"%s::{column.type.compile(PG)}[]" for column in into.columns)
        self._each = f"INSERT INTO {into.name} ({names}) VALUES ({marks})"
        self._all = f"INSERT INTO {into.name} ({names}) SELECT * FROM unnest({arrays})"

    def run(self, connection: Connection, rows: Sequence[tuple[Any, ...]]) -> None:
        """Add them; none are none."""
        if not rows:
            return
        cursor, sql = _cursor(connection), self._each
        try:
            if connection.dialect.name == "sqlite":
                cursor.executemany(sql, rows)
            else:
                # One message there and back, however many rows there are.
                sql = self._all
                cursor.execute(sql, [list(column) for column in zip(*rows, strict=True)])
        except Exception as error:
            raise _wrapped(connection, sql, error) from error
        cursor.close()


def run_plain(connection: Connection, sql: str) -> None:
    """A statement without values, also one that begins a transaction."""
    try:
        connection.connection.cursor().execute(sql)
    except Exception as error:
        raise _wrapped(connection, sql, error) from error


def _cursor(connection: Connection) -> Any:
    # The driver knows nothing of transactions that SQLAlchemy begins by itself.
    if not connection.in_transaction():
        connection.begin()
    return connection.connection.cursor()


def _placed(values: Values, names: tuple[str, ...] | None) -> Any:
    return values if names is None else tuple([values[name] for name in names])


def _wrapped(connection: Connection, sql: str, error: Exception) -> Exception:
    """The driver's error as SQLAlchemy's, which the rest of the code knows."""
    driver: Any = connection.dialect.dbapi
    if not isinstance(error, driver.Error):
        return error
    lost = connection.dialect.is_disconnect(error, None, None)  # pyright: ignore[reportArgumentType]
    made: Any = DBAPIError.instance(sql, None, error, driver.Error, connection_invalidated=lost)
    return made
