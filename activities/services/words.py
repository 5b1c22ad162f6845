"""Search by words: FTS5 on SQLite, `tsvector` on PostgreSQL, behind the same three functions.

The index is one row per live record, named by the record's position; it is written and emptied in the
transaction that writes and empties the record.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    DDL,
    ColumnElement,
    Connection,
    Select,
    bindparam,
    column,
    delete,
    event,
    func,
    insert,
    literal_column,
    select,
    text,
)
from sqlalchemy import table as sql_table

from activities.services.vectors import MEMORY

INDEXED_CHARACTERS = 8000
MOST_WORDS = 6
"""The rarest words of a query decide; common ones cost time and tell little."""
COMMON_SHARE = 0.03
"""A word that stands in more of the records than this is not searched for, if there are rarer ones."""
DEEP = 500
"""So many of the best are looked at first."""
WORDS = sql_table("memory_words", column("rowid"), column("position"), column("words"), column("rank"))
VOCABULARY = sql_table("memory_vocabulary", column("term"), column("doc"))
MAKE = {
    "sqlite": (
        "CREATE VIRTUAL TABLE IF NOT EXISTS memory_words USING "
        "fts5(words, tokenize='unicode61 remove_diacritics 2')",
        "CREATE VIRTUAL TABLE IF NOT EXISTS memory_vocabulary USING fts5vocab(memory_words, 'row')",
    ),
    "postgresql": (
        "CREATE TABLE IF NOT EXISTS memory_words (position BIGINT PRIMARY KEY, words TSVECTOR NOT NULL)",
        "CREATE INDEX IF NOT EXISTS memory_words_by_word ON memory_words USING gin (words)",
    ),
}
for _dialect, _statements in MAKE.items():
    for _statement in _statements:
        event.listen(MEMORY, "after_create", DDL(_statement).execute_if(dialect=_dialect))


def make_words(connection: Connection) -> None:
    """Create the index in a database that has none."""
    for statement in MAKE[connection.dialect.name]:
        connection.execute(text(statement))


def put_words(connection: Connection, position: int, words: str) -> None:
    """Index a record's words."""
    shown = words[:INDEXED_CHARACTERS]
    if connection.dialect.name == "sqlite":
        connection.execute(insert(WORDS).values(rowid=position, words=shown))
    else:
        connection.execute(
            insert(WORDS).values(position=position, words=func.to_tsvector("simple", _folded(shown)))
        )


def drop_words(connection: Connection, position: int) -> None:
    """Take a record out of the index."""
    connection.execute(delete(WORDS).where(_key(connection) == position))


def find_words(
    connection: Connection, query: str, conditions: Sequence[ColumnElement[bool]], limit: int
) -> list[str]:
    """Ids of the records that fit the words best, best first; equal ones by newer time, then by id."""
    words = _telling(connection, sorted({*re.findall(r"\w+", _folded(query))}))
    if not words:
        return []
    deep = max(DEEP, 10 * limit)
    found = connection.execute(_best(connection, words, conditions, limit, deep)).scalars().all()
    if len(found) < limit:
        # Whatever stands first may not count, or be another tenant's; then everything is looked at.
        found = connection.execute(_best(connection, words, conditions, limit, None)).scalars().all()
    return list(found)


def _best(
    connection: Connection,
    words: Sequence[str],
    conditions: Sequence[ColumnElement[bool]],
    limit: int,
    deep: int | None,
) -> Select[Any]:
    matches, rank = _ranked(connection, words)
    key = _key(connection)
    near = select(key.label("at"), rank.label("rank")).where(matches).order_by(rank).limit(deep).subquery()
    return (
        select(MEMORY.c.record_id)
        .join_from(near, MEMORY, MEMORY.c.position == near.c.at)
        .where(*conditions)
        .order_by(near.c.rank, MEMORY.c.recorded_at.desc(), MEMORY.c.record_id)
        .limit(limit)
    )


def compact_words(connection: Connection) -> None:
    """Rewrite the index, so that nothing of a dropped record stays in its segments."""
    if connection.dialect.name == "sqlite":
        connection.execute(text("INSERT INTO memory_words(memory_words) VALUES ('optimize')"))


def _key(connection: Connection) -> ColumnElement[int]:
    return WORDS.c.rowid if connection.dialect.name == "sqlite" else WORDS.c.position


def _ranked(connection: Connection, words: Sequence[str]) -> tuple[ColumnElement[bool], Any]:
    if connection.dialect.name == "sqlite":
        wanted = " OR ".join(f'"{word}"' for word in words)
        return literal_column("memory_words").op("MATCH")(bindparam("wanted", wanted)), WORDS.c.rank
    wanted = func.to_tsquery("simple", " | ".join(f"'{word}'" for word in words))
    return WORDS.c.words.op("@@")(wanted), -func.ts_rank(WORDS.c.words, wanted)


def _telling(connection: Connection, words: list[str]) -> list[str]:
    """The rarest words; a word that is unknown costs nothing and may be spelled otherwise in the index."""
    if connection.dialect.name != "sqlite" or not words:
        return words[: 4 * MOST_WORDS]
    known = dict(
        connection.execute(
            select(VOCABULARY.c.term, VOCABULARY.c.doc).where(VOCABULARY.c.term.in_(words))
        ).all()
    )
    rare = sorted(words, key=lambda word: (known.get(word, 0), word))[:MOST_WORDS]
    newest = connection.execute(select(func.coalesce(func.max(MEMORY.c.position), 0))).scalar_one()
    telling = [word for word in rare if 0 < known.get(word, 0) <= max(100, COMMON_SHARE * newest)]
    return telling or [word for word in rare if known.get(word, 0)][:1]


def _folded(words: str) -> str:
    """Lower case without diacritics, as the index spells."""
    apart = unicodedata.normalize("NFKD", words.lower())
    return "".join(letter for letter in apart if not unicodedata.combining(letter))
