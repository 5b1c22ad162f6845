"""Which records of memory a search may find, how words find them, and how an answer names them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, select

from activities.services.database import from_micros
from activities.services.discreet import opened_rows
from activities.services.vectors import MEMORY, When
from activities.services.words import find_words
from models.inference import DataClass
from models.loop import Ref
from models.memory import Hit, Origin, Recall
from models.tables import NEVER

Plain = dict[str, Any]
WORD_SCAN = 5000
"""Word search looks at the titles of this many newest records."""
FUSION = 60
"""Reciprocal rank fusion: a record scores 1 / (this + its rank) in each list, as in the paper of 2009."""


def fused(*lists: Sequence[str]) -> list[str]:
    """One order from several, by reciprocal ranks; equal ones as the first list has them."""
    scores: dict[str, float] = {}
    for ranked in lists:
        for rank, record_id in enumerate(ranked, 1):
            scores[record_id] = scores.get(record_id, 0.0) + 1 / (FUSION + rank)
    return sorted(scores, key=lambda record_id: -scores[record_id])


def conditions(request: Recall, when: When) -> list[Any]:
    """What SQL says about who counts; the same that the vectors' view says."""
    m = MEMORY.c
    conditions = [
        m.tenant == request.tenant,
        m.forgotten_at.is_(None),
        m.expires_at > when.now,
        m.active_at <= when.at,
        m.valid_from <= when.at,
        m.valid_to > when.at,
    ]
    if request.kinds:
        conditions.append(m.kind.in_(request.kinds))
    if request.agent is not None:
        conditions.append(m.agent.in_(("", request.agent)))
    return conditions


def _counting(request: Recall, when: When) -> Select[Any]:
    return select(MEMORY).where(*conditions(request, when))


def named(connection: Connection, request: Recall, when: When, ids: Sequence[str]) -> dict[str, Plain]:
    """Records that count, by id."""
    rows = opened_rows(
        connection, request.tenant, _counting(request, when).where(MEMORY.c.record_id.in_(ids))
    )
    return {row["record_id"]: row for row in rows}


def by_text(connection: Connection, request: Recall, query: str, when: When) -> list[Hit]:
    """By the index of words over whole texts."""
    order = find_words(connection, query, conditions(request, when), request.limit, request.tenant)
    found, asked = named(connection, request, when, order), word_set(query)
    return [hit(found[one], word_cosine(asked, word_set(found[one]["title"]))) for one in order]


def by_words(connection: Connection, request: Recall, query: str, when: When) -> list[Hit]:
    """Cosine of the sets of words in query and title, over the newest records; the same on every database."""
    asked = word_set(query)
    order = (MEMORY.c.recorded_at.desc(), MEMORY.c.record_id)
    newest = _counting(request, when).order_by(*order).limit(WORD_SCAN)
    rows = opened_rows(connection, request.tenant, newest)
    scored = ((word_cosine(asked, word_set(row["title"])), row) for row in rows)
    # A stable sort keeps newer before older, and then the order of ids, among equals.
    best = sorted((pair for pair in scored if pair[0] > 0), key=lambda pair: -pair[0])
    return [hit(row, cosine) for cosine, row in best[: request.limit]]


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(re.findall(r"\w+", text.casefold()))


def word_cosine(one: frozenset[str], other: frozenset[str]) -> float:
    """The cosine of two sets of words."""
    common = len(one & other)
    return common / math.sqrt(len(one) * len(other)) if common else 0.0


def hit(row: Plain, cosine: float) -> Hit:
    """A row as an answer names it."""
    return Hit(
        record_id=row["record_id"],
        version=row["text_digest"],
        kind=row["kind"],
        title=row["title"],
        text=Ref(digest=row["text_digest"], size=row["text_size"], media_type=row["media_type"]),
        score_permille=round(1000 * cosine),
        recorded_at=from_micros(row["recorded_at"]),
        links=tuple(json.loads(row["links"])),
        data_class=DataClass(row["data_class"]),
        origin=Origin(row["origin"]),
        expires_at=None if row["expires_at"] >= NEVER else from_micros(row["expires_at"]),
    )
