"""Long-lived records an agent can search, what a search returns, and the contract that every record keeps.

The contract: what is kept, why, from which ledger event, of which origin, how sensitive, and until when.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, AwareDatetime, Field, SecretStr, StringConstraints, model_validator

from models.canonical import Digest, derived_id
from models.errors import InvalidInput
from models.inference import OPEN, DataClass
from models.loop import LOCAL, WEB, Frozen, Name, Ref

Line = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
"""Text that every database can keep: PostgreSQL refuses NUL."""

NEAR_DUPLICATE = 0.95
"""Cosine from which two records of one scope are proposed for merging; nothing is ever merged by itself."""


class Sort(StrEnum):
    """The four classes of memory."""

    EPISODE = "episode"
    """What happened."""
    FACT = "fact"
    PREFERENCE = "preference"
    PROCEDURE = "procedure"


@dataclass(frozen=True, slots=True)
class Habits:
    """How records of one kind are treated."""

    sort: Sort
    lifetime: timedelta | None
    """Until when a record counts that nobody confirmed; `None` is for ever."""


KINDS: Mapping[str, Habits] = MappingProxyType(
    {
        "episode": Habits(Sort.EPISODE, timedelta(days=30)),
        "fact": Habits(Sort.FACT, timedelta(days=180)),
        "preference": Habits(Sort.PREFERENCE, timedelta(days=365)),
        "procedure": Habits(Sort.PROCEDURE, None),
        # A page stands until it is taken down; forgetting it would let it be written twice.
        "post": Habits(Sort.EPISODE, None),
        "outcome": Habits(Sort.EPISODE, timedelta(days=30)),
        "idea": Habits(Sort.FACT, timedelta(days=180)),
    }
)
"""Every kind there is; a new one is one line here."""


def habits(kind: str) -> Habits:
    """How records of a kind are treated.

    Raises:
        InvalidInput: there is no such kind.
    """
    try:
        return KINDS[kind]
    except KeyError:
        raise InvalidInput.field("kind", kind, f"use one of {', '.join(KINDS)}") from None


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"no such kind; use one of {', '.join(KINDS)}")
    return kind


class Origin(StrEnum):
    """Who says so."""

    HUMAN = "human"
    TOOL = "tool"
    """Code, about what it did or read."""
    MODEL = "model"


class Standing(StrEnum):
    """Whether a record counts."""

    PROPOSED = "proposed"
    """A model inferred it; a person or a second source must agree first."""
    ACTIVE = "active"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"
    QUARANTINED = "quarantined"


def memory_id(tenant: str, scope: str, kind: str, digest: str) -> str:
    """The id of a record: the same content in the same scope is the same record."""
    return derived_id("memory", tenant, scope, kind, digest)


def _own_id(given: dict[str, Any]) -> str:
    text, scope = given.get("text"), f"{given.get('agent') or ''}\0{given.get('subject') or ''}"
    digest = text.digest if isinstance(text, Ref) else ""
    return memory_id(str(given.get("tenant")), scope, str(given.get("kind")), digest)


class Memo(Frozen):
    """A record to keep; its text is a blob."""

    tenant: Name
    kind: Annotated[Name, AfterValidator(_known)]
    """One of `KINDS`."""
    title: Line = Field(max_length=200)
    text: Ref
    source: Line = Field(max_length=2000)
    """The ledger event or target reference it comes from."""
    agent: Name | None = None
    """Whose memory it is; `None` is everybody's."""
    subject: Line = Field(default="", max_length=200)
    """What or whom it is about: a SKU, an address, a customer. Forgetting goes by it."""
    record_id: Line = Field(default_factory=_own_id, min_length=1, max_length=200)
    """From the content and its scope, unless one event can cause only one such record."""
    why: Line = Field(default="", max_length=500)
    """What it is kept for."""
    event: Line = Field(default="", max_length=200)
    """Id of the ledger event it comes from; empty is the event that logs it."""
    derived_from: tuple[Line, ...] = Field(default=(), max_length=50)
    """Records it was made from."""
    grounds: tuple[Ref, ...] = Field(default=(), max_length=20)
    """The texts a model inferred it from; every name and number in it must stand in one of them."""
    origin: Origin = Origin.TOOL
    confidence_percent: int | None = Field(default=None, ge=0, le=100)
    valid_from: AwareDatetime | None = None
    valid_to: AwareDatetime | None = None
    expires_at: AwareDatetime | None = None
    """`None` is the kind's lifetime."""
    data_class: DataClass = DataClass.INTERNAL
    links: tuple[Annotated[Line, Field(max_length=2000)], ...] = Field(default=(), max_length=50)

    @model_validator(mode="after")
    def _in_order(self) -> Memo:
        if self.valid_from is not None and self.valid_to is not None and self.valid_to <= self.valid_from:
            raise ValueError("valid_to: it ends before it begins; give a later time")
        return self


@dataclass(frozen=True, slots=True)
class Cause:
    """What a record is kept for: the ledger event that logs it, and the run it belongs to."""

    event: str = ""
    run: str = ""


def first_standing(memo: Memo) -> Standing:
    """What a record starts as: a model alone establishes nothing beyond what happened."""
    inferred = memo.origin is Origin.MODEL and habits(memo.kind).sort is not Sort.EPISODE
    return Standing.PROPOSED if inferred else Standing.ACTIVE


def expiry(memo: Memo, now: datetime) -> datetime | None:
    """Until when a record counts that is kept, or was confirmed, now.

    Raises:
        InvalidInput: it would be over already, or its kind is unknown.
    """
    if memo.expires_at is None:
        lifetime = habits(memo.kind).lifetime
        return None if lifetime is None else now + lifetime
    if memo.expires_at <= now:
        raise InvalidInput.field("expires_at", memo.expires_at.isoformat(), "give a time to come")
    return memo.expires_at


class Kept(StrEnum):
    """What became of a record that was to be kept."""

    KEPT = "kept"
    KNOWN = "known"
    """It was kept before; from another source this confirms it."""
    JUNK = "junk"


class Keeping(Frozen):
    """The answer to a wish to keep something; a refusal says why."""

    what: Kept
    record_id: str
    standing: Standing | None = None
    reason: str = ""


class Erased(Frozen):
    """The receipt of an erasure: what was removed, and that nothing is left where it was looked for."""

    subject_id: str
    """Derived from tenant and subject, so that whoever knows both can find the event."""
    event_id: str
    """The ledger event that says so."""
    removed: dict[str, int]
    left: dict[str, int]
    """Per store what a second look still found; the receipt is only issued when all are 0."""
    shared: int = 0
    """Texts that stay because records of other subjects have them too."""


class Search(StrEnum):
    """How records are looked for."""

    MEANING = "meaning"
    WORDS = "words"
    HYBRID = "hybrid"
    """Both, fused by rank."""


class Recall(Frozen):
    """A search."""

    tenant: Name
    query: Ref
    kinds: tuple[Name, ...] = Field(default=(), max_length=50)
    """Empty means all."""
    limit: int = Field(default=5, ge=1, le=50)
    agent: Name | None = None
    """Only this agent's records and everybody's; `None` is all."""
    as_of: AwareDatetime | None = None
    """What counted at that time, as far as it is still kept."""
    by: Search = Search.MEANING
    run: Line = Field(default="", max_length=200)
    """The run that asks: what it recalls, it cannot remember as new."""


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
    origin: Origin = Origin.TOOL
    expires_at: AwareDatetime | None = None


class Recalled(Frozen):
    """Hits, best first; `degraded` says what could not be asked."""

    hits: tuple[Hit, ...] = ()
    degraded: str = ""
    query_digest: Digest | None = None


class EmbeddingSettings(Frozen):
    """The embedding server."""

    kind: Literal["llama_cpp", "tei", "openai_compatible"] = "llama_cpp"
    url: str = Field(default="http://127.0.0.1:8091", pattern=WEB)
    model: str = "sentence-transformers/all-MiniLM-L6-v2:53aa5117"
    """The identity its server must report, for TEI with `@` and its revision if that is to be fixed too;
    vectors of different models never mix."""
    token: SecretStr | None = None
    managed: bool = True
    dimensions: int = Field(default=384, ge=1)
    region: str | None = None
    """Where it stands; processes of a region show texts to no server that stands elsewhere."""
    data_classes: tuple[DataClass, ...] | None = None
    """What it may see; left out, everything where its address is this machine, else as much as a tier."""
    connect_seconds: int = Field(default=5, ge=1)
    timeout_seconds: int = Field(default=30, ge=1)

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine."""
        return urlsplit(self.url).hostname in LOCAL

    @property
    def sees(self) -> frozenset[DataClass]:
        """The data classes that it may be shown."""
        if self.data_classes is not None:
            return frozenset(self.data_classes)
        return frozenset(DataClass if self.is_here else OPEN)


class WeaviateSettings(Frozen):
    """A Weaviate that searches vectors instead of the exact scan; SQL stays the truth."""

    host: str = "127.0.0.1"
    port: int = Field(default=8079, ge=1, le=65535)
    grpc_host: str = ""
    """Empty is the same host."""
    grpc_port: int = Field(default=8080, ge=1, le=65535)
    secure: bool = False
    api_key: SecretStr | None = None
