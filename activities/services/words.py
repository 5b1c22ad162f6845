"""Search by words: FTS5 on SQLite, `tsvector` on PostgreSQL, behind the same three functions.

The index is one row per live record, named by the record's position; it is written and emptied in the
transaction that writes and empties the record. Each tenant spells its words in its own way, so that what is
common with one tenant costs another one nothing and tells it nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from sqlalchemy import (
    DDL,
    ColumnElement,
    Connection,
    Select,
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

from activities.services.content import vault_of
from activities.services.vectors import MEMORY

INDEXED_CHARACTERS = 8000
MOST_WORDS = 32
"""So many words of a query are looked up, the longest of them."""
MATCHES = 1000
"""Ranking costs time per match: the rarest words that stand in so many records together decide, and words
that stand in more tell little."""
DEEP = 200
"""So many of the best are looked at first."""
WORDS = sql_table("memory_words", column("rowid"), column("position"), column("words"), column("rank"))
MAKE = {
    "sqlite": (
        "CREATE VIRTUAL TABLE IF NOT EXISTS memory_words USING "
        "fts5(words, tokenize='unicode61 remove_diacritics 2')",
    ),
    "postgresql": (
        "CREATE TABLE IF NOT EXISTS memory_words (position BIGINT PRIMARY KEY, words TSVECTOR NOT NULL)",
        "CREATE INDEX IF NOT EXISTS memory_words_by_word ON memory_words USING gin (words)",
    ),
}
COUNT = {
    "sqlite": "(SELECT count(*) FROM "
    "(SELECT rowid FROM memory_words WHERE memory_words MATCH :word{} LIMIT :most))",
    "postgresql": "(SELECT count(*) FROM (SELECT position FROM memory_words "
    "WHERE words @@ phraseto_tsquery('simple', :word{}) LIMIT :most) AS bounded)",
}
for _dialect, _statements in MAKE.items():
    for _statement in _statements:
        event.listen(MEMORY, "after_create", DDL(_statement).execute_if(dialect=_dialect))


def make_words(connection: Connection) -> None:
    """Create the index in a database that has none."""
    for statement in MAKE[connection.dialect.name]:
        connection.execute(text(statement))


def put_words(connection: Connection, position: int, words: str, tenant: str) -> None:
    """Index a record's words; with encryption on as keyed hashes."""
    each = re.findall(r"\w+", folded(words[:INDEXED_CHARACTERS]))
    put_spelled(connection, position, _spelled(connection, tenant, each))


def put_spelled(connection: Connection, position: int, words: Sequence[str]) -> None:
    """Index words that are spelled already."""
    shown = " ".join(words)
    if connection.dialect.name == "sqlite":
        connection.execute(insert(WORDS).values(rowid=position, words=shown))
    else:
        connection.execute(insert(WORDS).values(position=position, words=func.to_tsvector("simple", shown)))


def drop_words(connection: Connection, position: int) -> None:
    """Take a record out of the index."""
    connection.execute(delete(WORDS).where(_key(connection) == position))


def find_words(
    connection: Connection,
    query: str,
    conditions: Sequence[ColumnElement[bool]],
    limit: int,
    tenant: str,
) -> list[str]:
    """Ids of the records that fit the words best, best first; equal ones by newer time, then by id."""
    words = sorted({*re.findall(r"\w+", folded(query))}, key=lambda word: (-len(word), word))
    counts = _counts(connection, _spelled(connection, tenant, words[:MOST_WORDS]))
    telling = _telling(counts)
    if not telling:
        return _newest(connection, sorted(counts, key=lambda word: counts[word]), conditions, limit)
    deep = max(DEEP, 4 * limit)
    found = connection.execute(_best(connection, telling, conditions, limit, deep)).scalars().all()
    if len(found) < limit and sum(counts[word] for word in telling) > deep:
        # Whatever stands first may not count; then everything is looked at.
        found = connection.execute(_best(connection, telling, conditions, limit, None)).scalars().all()
    return list(found)


def _best(
    connection: Connection,
    words: Sequence[str],
    conditions: Sequence[ColumnElement[bool]],
    limit: int,
    deep: int | None,
) -> Select[Any]:
    key, rank = _key(connection), _rank(connection, words)
    matches = _match(connection, words)
    near = select(key.label("at"), rank.label("rank")).where(matches).order_by(rank).limit(deep).subquery()
    return (
        select(MEMORY.c.record_id)
        .join_from(near, MEMORY, MEMORY.c.position == near.c.at)
        .where(*conditions)
        .order_by(near.c.rank, MEMORY.c.recorded_at.desc(), MEMORY.c.record_id)
        .limit(limit)
    )


def _newest(
    connection: Connection, words: Sequence[str], conditions: Sequence[ColumnElement[bool]], limit: int
) -> list[str]:
    """When every word is common: the newest records that have all of them, then those with the rarest."""
    found: list[str] = []
    for wanted in (words, words[:1]) if words else ():
        having = (
            select(MEMORY.c.record_id)
            .join_from(WORDS, MEMORY, MEMORY.c.position == _key(connection))
            .where(_match(connection, wanted, every=True), *conditions)
            .order_by(_key(connection).desc())
            .limit(limit)
        )
        found += connection.execute(having).scalars()
        if len(found) >= limit:
            break
    return list(dict.fromkeys(found))[:limit]


def compact_words(connection: Connection) -> None:
    """Rewrite the index, so that nothing of a dropped record stays in its segments."""
    if connection.dialect.name == "sqlite":
        connection.execute(text("INSERT INTO memory_words(memory_words) VALUES ('optimize')"))


def _key(connection: Connection) -> ColumnElement[int]:
    return WORDS.c.rowid if connection.dialect.name == "sqlite" else WORDS.c.position


def _match(connection: Connection, words: Sequence[str], every: bool = False) -> ColumnElement[bool]:
    if connection.dialect.name == "sqlite":
        wanted = (" AND " if every else " OR ").join(f'"{word}"' for word in words)
        return literal_column("memory_words").op("MATCH")(wanted)
    return WORDS.c.words.op("@@")(_query(words, " & " if every else " | "))


def _rank(connection: Connection, words: Sequence[str]) -> Any:
    if connection.dialect.name == "sqlite":
        return WORDS.c.rank
    return -func.ts_rank(WORDS.c.words, _query(words, " | "))


def _query(words: Sequence[str], joined: str) -> Any:
    return func.to_tsquery("simple", joined.join(f"'{word}'" for word in words))


def _counts(connection: Connection, words: Sequence[str]) -> dict[str, int]:
    """In how many records each word stands, counted no further than matters; only words that are there."""
    if not words:
        return {}
    one = COUNT[connection.dialect.name]
    each = ", ".join(one.format(number) for number in range(len(words)))
    asked = {f"word{number}": f'"{word}"' for number, word in enumerate(words)}
    found = connection.execute(text(f"SELECT {each}"), {**asked, "most": MATCHES + 1}).one()
    return {word: count for word, count in zip(words, found, strict=True) if count}


def _telling(counts: Mapping[str, int]) -> list[str]:
    """The rarest words, as many as may be ranked; none when each is too common."""
    telling: list[str] = []
    left = MATCHES
    for word in sorted(counts, key=lambda word: (counts[word], word)):
        left -= counts[word]
        if left < 0:
            break
        telling.append(word)
    return telling


def _spelled(connection: Connection, tenant: str, words: list[str]) -> list[str]:
    """Words as the index has them."""
    vault = vault_of(connection)
    if vault is not None:
        return vault.spell(connection, tenant, words)
    mark = mark_of(tenant)
    return [f"{mark}{word}" for word in words]


def mark_of(tenant: str) -> str:
    """How each word of a tenant begins; two that share a mark are slower and never mixed up."""
    return f"t{sha256(tenant.encode()).hexdigest()[:6]}"


def folded(words: str) -> str:
    """Lower case without diacritics, as the index spells."""
    apart = unicodedata.normalize("NFKD", words.lower())
    return "".join(letter for letter in apart if not unicodedata.combining(letter))
