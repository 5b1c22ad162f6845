"""Long-lived records an agent can search, and what a search returns."""

from __future__ import annotations

from pydantic import AwareDatetime, Field

from models.canonical import Digest
from models.inference import DataClass
from models.loop import Frozen, Name, Ref


class Memo(Frozen):
    """A record to keep; its text is a blob."""

    record_id: str
    """From the event that caused it, so that writing twice keeps one."""
    tenant: Name
    kind: Name
    """For instance post, idea, outcome."""
    title: str = Field(max_length=200)
    text: Ref
    source: str
    """The ledger event or target reference it comes from."""
    data_class: DataClass = DataClass.INTERNAL
    links: tuple[str, ...] = ()


class Recall(Frozen):
    """A search by meaning."""

    tenant: Name
    query: Ref
    kinds: tuple[Name, ...] = ()
    limit: int = Field(default=5, ge=1, le=50)


class Hit(Frozen):
    """A record that was found; `score_permille` is 1000 times the cosine, rounded."""

    record_id: str
    version: str
    kind: Name
    title: str
    text: Ref
    score_permille: int
    recorded_at: AwareDatetime
    links: tuple[str, ...] = ()


class Recalled(Frozen):
    """Hits, best first; `degraded` says what could not be asked."""

    hits: tuple[Hit, ...] = ()
    degraded: str = ""
    query_digest: Digest | None = None
