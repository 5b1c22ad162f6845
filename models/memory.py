"""Long-lived records an agent can search, and what a search returns."""

from __future__ import annotations

from typing import Annotated

from pydantic import AwareDatetime, Field, StringConstraints

from models.canonical import Digest
from models.inference import DataClass
from models.loop import Frozen, Name, Ref

Line = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
"""Text that every database can keep: PostgreSQL refuses NUL."""


class Memo(Frozen):
    """A record to keep; its text is a blob."""

    record_id: Line = Field(min_length=1, max_length=200)
    """From the event that caused it, so that writing twice keeps one."""
    tenant: Name
    kind: Name
    """For instance post, idea, outcome."""
    title: Line = Field(max_length=200)
    text: Ref
    source: Line = Field(max_length=2000)
    """The ledger event or target reference it comes from."""
    data_class: DataClass = DataClass.INTERNAL
    links: tuple[Annotated[Line, Field(max_length=2000)], ...] = Field(default=(), max_length=50)


class Recall(Frozen):
    """A search by meaning."""

    tenant: Name
    query: Ref
    kinds: tuple[Name, ...] = Field(default=(), max_length=50)
    """Empty means all."""
    limit: int = Field(default=5, ge=1, le=50)


class Hit(Frozen):
    """A record that was found; `score_permille` is 1000 times the cosine, rounded.

    `version` is the digest of its text. In a degraded answer the cosine is that of the two sets of words.
    """

    record_id: str
    version: str
    kind: Name
    title: str
    text: Ref
    score_permille: int
    recorded_at: AwareDatetime
    links: tuple[str, ...] = ()
    data_class: DataClass = DataClass.INTERNAL


class Recalled(Frozen):
    """Hits, best first; `degraded` says what could not be asked."""

    hits: tuple[Hit, ...] = ()
    degraded: str = ""
    query_digest: Digest | None = None
