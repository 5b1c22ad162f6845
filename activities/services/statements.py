"""Statements that run so often that SQLAlchemy's own way of running them costs more than the database does.

Written once for both databases, compiled once, then given to the driver as they are. Values must be what the
driver takes: no type of SQLAlchemy's converts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ClauseElement, Connection, Dialect
from sqlalchemy.exc import DBAPIError

Values = Mapping[str, Any]


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

    def run_many(self, connection: Connection, values: Sequence[Values]) -> None:
        """Run it for each."""
        sql, names = self._sql(connection.dialect)
        cursor = _cursor(connection)
        try:
            cursor.executemany(sql, [_placed(one, names) for one in values])
        except Exception as error:
            raise _wrapped(connection, sql, error) from error
        cursor.close()

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
