"""The SQL tables. Only `activities/**` imports this; times are aware UTC, kept as integer microseconds."""

from __future__ import annotations

from sqlalchemy import BigInteger, Index, Integer, LargeBinary, Table, UniqueConstraint, false, text
from sqlmodel import Field, SQLModel

BIG = BigInteger().with_variant(Integer, "sqlite")
"""64 bits everywhere; SQLite keys must say INTEGER."""

NEVER = 2**53 - 1
"""A time that does not come, in microseconds; exact in every index and every JSON."""


class LogHead(SQLModel, table=True):
    """The size of one tenant's log; its row serialises appends, so that `seq` has no gaps."""

    __tablename__ = "log_head"  # pyright: ignore[reportAssignmentType]
    log_id: str = Field(primary_key=True)
    size: int = Field(default=0, sa_type=BIG)
    peaks: bytes = Field(default=b"", sa_type=LargeBinary)
    """Hashes of the complete subtrees that the log's Merkle tree is made of, largest first."""


class MerkleNode(SQLModel, table=True):
    """A complete subtree above the leaves of a log's Merkle tree; written once, when its last leaf comes."""

    __tablename__ = "merkle_node"  # pyright: ignore[reportAssignmentType]
    log_id: str = Field(primary_key=True)
    level: int = Field(primary_key=True)
    idx: int = Field(primary_key=True, sa_type=BIG)
    hash: bytes = Field(sa_type=LargeBinary)


class Checkpoint(SQLModel, table=True):
    """A signed size and root of one log; written once."""

    __tablename__ = "checkpoint"  # pyright: ignore[reportAssignmentType]
    log_id: str = Field(primary_key=True)
    size: int = Field(primary_key=True, sa_type=BIG)
    root: bytes = Field(sa_type=LargeBinary)
    note: str
    key_id: str
    """Name and key hash of the signer, as in the note."""


class Cosignature(SQLModel, table=True):
    """A line by which somebody else vouches for a checkpoint; written once."""

    __tablename__ = "cosignature"  # pyright: ignore[reportAssignmentType]
    log_id: str = Field(primary_key=True)
    size: int = Field(primary_key=True, sa_type=BIG)
    key_id: str = Field(primary_key=True)
    """Name and key hash of the co-signer, as in the line."""
    line: str


class EventRow(SQLModel, table=True):
    """One event. `envelope` holds the canonical bytes that `leaf_hash` names; columns are for search."""

    __tablename__ = "event"  # pyright: ignore[reportAssignmentType]
    __table_args__ = (
        UniqueConstraint("log_id", "stream", "version"),
        UniqueConstraint("log_id", "event_id"),
        # What stands in a run's own stream is found by the stream.
        Index(
            "event_by_correlation",
            *("log_id", "correlation_id", "seq"),
            sqlite_where=text("correlation_id <> stream"),
            postgresql_where=text("correlation_id <> stream"),
        ),
    )
    log_id: str = Field(primary_key=True)
    seq: int = Field(primary_key=True, sa_type=BIG)
    event_id: str
    stream: str
    version: int
    type: str
    correlation_id: str
    recorded_at: int = Field(sa_type=BIG)
    envelope: bytes = Field(sa_type=LargeBinary)
    leaf_hash: str


class Blob(SQLModel, table=True):
    """Immutable bytes named by their SHA-256; see `activities/services/content.py` for sealed ones."""

    __tablename__ = "blob"  # pyright: ignore[reportAssignmentType]
    __table_args__ = (Index("blob_by_subject", "tenant", "subject"),)
    tenant: str = Field(primary_key=True)
    digest: str = Field(primary_key=True)
    media_type: str
    data_class: str = "internal"
    region: str | None = None
    stored_at: int = Field(sa_type=BIG)
    data: bytes = Field(sa_type=LargeBinary)
    sealed_by: str | None = None
    """Id of the data key that `data` is sealed under; `None` stands in clear."""
    subject: str | None = None
    """Derived id of whom it is about; `None` is nobody, or more than one."""


class RegionalContent(SQLModel, table=True):
    """Content that a region's own store holds; here stand its name and size, and never its bytes."""

    __tablename__ = "regional_content"  # pyright: ignore[reportAssignmentType]
    tenant: str = Field(primary_key=True)
    digest: str = Field(primary_key=True)
    region: str = Field(primary_key=True)
    size: int
    media_type: str
    stored_at: int = Field(sa_type=BIG)


class SubjectKey(SQLModel, table=True):
    """A data key, wrapped by a master key that is never in the database; destroying it erases a subject."""

    __tablename__ = "subject_key"  # pyright: ignore[reportAssignmentType]
    tenant: str = Field(primary_key=True)
    subject_key_id: str = Field(primary_key=True)
    """Opaque; `tenant` is the key of all that belongs to no single subject."""
    wrapped: bytes = Field(sa_type=LargeBinary)
    """Empty once destroyed; the row stays, so that a late retry cannot make the key anew."""
    wrapped_by: str
    destroyed_at: int | None = Field(default=None, sa_type=BIG)


class Claim(SQLModel, table=True):
    """A request key that was taken, by which body, and how it ended."""

    __tablename__ = "claim"  # pyright: ignore[reportAssignmentType]
    tenant: str = Field(primary_key=True)
    agent: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    body_digest: str
    workflow_id: str = Field(index=True)
    claimed_at: int = Field(sa_type=BIG)
    outcome: str | None = None
    """JSON of the Outcome once there is one."""


class GrantUse(SQLModel, table=True):
    """How often a narrow grant was used; only ever counted up, and down when the intent did not stand."""

    __tablename__ = "grant_use"  # pyright: ignore[reportAssignmentType]
    tenant: str = Field(primary_key=True)
    agent: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    used: int = 0


class Effect(SQLModel, table=True):
    """One use of an action key: reserved before anything is sent, confirmed after."""

    __tablename__ = "effect"  # pyright: ignore[reportAssignmentType]
    tenant: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    workflow_id: str = Field(index=True)
    state: str
    epoch: int
    deadline: int = Field(sa_type=BIG)
    settles: int = Field(sa_type=BIG)
    """From here on "absent at the target" may be believed."""
    result: str | None = None
    """JSON of what the target said."""


class MemoryRow(SQLModel, table=True):
    """A long-lived record; its text is a blob. Never deleted: a forgotten one is emptied and stays."""

    __tablename__ = "memory"  # pyright: ignore[reportAssignmentType]
    __table_args__ = (
        Index("memory_by_tenant", "tenant", "kind", "recorded_at"),
        Index("memory_by_age", "tenant", "recorded_at"),
        Index("memory_by_subject", "tenant", "subject"),
        Index("memory_by_expiry", "standing", "expires_at"),
    )
    tenant: str = Field(primary_key=True)
    record_id: str = Field(primary_key=True)
    kind: str
    title: str
    text_digest: str
    text_size: int
    media_type: str
    source: str
    data_class: str
    links: str = "[]"
    recorded_at: int = Field(sa_type=BIG)
    position: int = Field(sa_type=BIG, index=True, unique=True)
    """Order of writing over all tenants; what an index has read up to."""
    forgotten_at: int | None = Field(default=None, sa_type=BIG)
    """When it was emptied; its row stays, so that a late retry cannot bring it back."""
    agent: str = Field(default="", sa_column_kwargs={"server_default": ""})
    """Whose it is; empty is everybody's."""
    subject: str = Field(default="", sa_column_kwargs={"server_default": ""})
    why: str = Field(default="", sa_column_kwargs={"server_default": ""})
    source_event: str = Field(default="", sa_column_kwargs={"server_default": ""})
    derived_from: str = Field(default="[]", sa_column_kwargs={"server_default": "[]"})
    origin: str = Field(default="tool", sa_column_kwargs={"server_default": "tool"})
    confidence_percent: int | None = None
    personal: bool = Field(default=False, sa_column_kwargs={"server_default": false()})
    """Rules found personal data in title or text before they were to be shown to an embedding server."""
    standing: str = Field(default="active", sa_column_kwargs={"server_default": "active"})
    active_at: int = Field(default=0, sa_type=BIG, sa_column_kwargs={"server_default": "0"})
    """Since when it counts; `NEVER` while it is only proposed."""
    valid_from: int = Field(default=0, sa_type=BIG, sa_column_kwargs={"server_default": "0"})
    valid_to: int = Field(default=NEVER, sa_type=BIG, sa_column_kwargs={"server_default": str(NEVER)})
    expires_at: int = Field(default=NEVER, sa_type=BIG, sa_column_kwargs={"server_default": str(NEVER)})


class EmbeddingRow(SQLModel, table=True):
    """The unit vector of one record under one model. Written once, later at most emptied, never deleted."""

    __tablename__ = "embedding"  # pyright: ignore[reportAssignmentType]
    __table_args__ = (Index("embedding_feed", "tenant", "model", "position"),)
    tenant: str = Field(primary_key=True)
    record_id: str = Field(primary_key=True)
    model: str = Field(primary_key=True)
    position: int = Field(sa_type=BIG, index=True, unique=True)
    """Order of change over all tenants and models; emptying moves it up, so readers see that too."""
    vector: bytes = Field(sa_type=LargeBinary)
    """Little-endian float32; empty once the record is forgotten."""


class MemorySupport(SQLModel, table=True):
    """One source of one record; what rests on the same basis is no second source."""

    __tablename__ = "memory_support"  # pyright: ignore[reportAssignmentType]
    tenant: str = Field(primary_key=True)
    record_id: str = Field(primary_key=True)
    event_id: str = Field(primary_key=True)
    basis: str
    seen_at: int = Field(sa_type=BIG)


class GivenText(SQLModel, table=True):
    """A text that a run was shown, as a prompt or by recall; it is nothing new to remember."""

    __tablename__ = "given_text"  # pyright: ignore[reportAssignmentType]
    tenant: str = Field(primary_key=True)
    run: str = Field(primary_key=True)
    """Empty is every run of the tenant."""
    digest: str = Field(primary_key=True)
    given_at: int = Field(sa_type=BIG, index=True)


class MergeProposal(SQLModel, table=True):
    """Two records of one scope that say nearly the same; a person decides."""

    __tablename__ = "merge_proposal"  # pyright: ignore[reportAssignmentType]
    tenant: str = Field(primary_key=True)
    first: str = Field(primary_key=True)
    second: str = Field(primary_key=True)
    cosine_permille: int
    proposed_at: int = Field(sa_type=BIG)


class IndexCursor(SQLModel, table=True):
    """How far an index outside SQL has followed the embeddings of one model."""

    __tablename__ = "index_cursor"  # pyright: ignore[reportAssignmentType]
    store: str = Field(primary_key=True)
    model: str = Field(primary_key=True)
    position: int = Field(default=0, sa_type=BIG)


class BeliefHead(SQLModel, table=True):
    """The version of an agent's belief about one subject that stands, and who may change it."""

    __tablename__ = "belief_head"  # pyright: ignore[reportAssignmentType]
    tenant: str = Field(primary_key=True)
    agent: str = Field(primary_key=True)
    subject: str = Field(primary_key=True)
    version: int = 0
    epoch: int = 0
    holder: str = ""


class BeliefSnapshot(SQLModel, table=True):
    """One version of a belief; written once."""

    __tablename__ = "belief_snapshot"  # pyright: ignore[reportAssignmentType]
    __table_args__ = (UniqueConstraint("tenant", "agent", "subject", "event_id"),)
    tenant: str = Field(primary_key=True)
    agent: str = Field(primary_key=True)
    subject: str = Field(primary_key=True)
    version: int = Field(primary_key=True)
    event_id: str
    """What changed it; an event changes a belief once."""
    epoch: int
    state: bytes = Field(sa_type=LargeBinary)
    """Canonical JSON."""
    digest: str
    recorded_at: int = Field(sa_type=BIG)


class Lease(SQLModel, table=True):
    """Who does a job that only one may do; the epoch fences off whoever did it before."""

    __tablename__ = "lease"  # pyright: ignore[reportAssignmentType]
    name: str = Field(primary_key=True)
    holder: str
    epoch: int
    expires_at: int = Field(sa_type=BIG)


class ModelCall(SQLModel, table=True):
    """What one model call took; the measurements that estimates rest on."""

    __tablename__ = "model_call"  # pyright: ignore[reportAssignmentType]
    id: str = Field(primary_key=True)
    tier: str
    task: str
    model: str
    milliseconds: int
    prompt_tokens: int
    completion_tokens: int
    called_at: int = Field(sa_type=BIG, index=True)
    usable: bool = True
    """Whether the answer could be used; if not, another tier had to be asked."""
    tenant: str = ""
    reservation: str | None = Field(default=None, index=True)
    """The money it was paid from."""
    micros: int | None = Field(default=None, sa_type=BIG)
    """What it cost in millionths of `currency`; unknown without a price."""
    currency: str | None = None


class BudgetRow(SQLModel, table=True):
    """One budget on one day, in millionths of its currency. The cap stands in the settings."""

    __tablename__ = "budget"  # pyright: ignore[reportAssignmentType]
    account: str = Field(primary_key=True)
    held: int = Field(default=0, sa_type=BIG)
    spent: int = Field(default=0, sa_type=BIG)


class ReservationRow(SQLModel, table=True):
    """Money held for one call, until it is settled or its lease ends. Never deleted."""

    __tablename__ = "reservation"  # pyright: ignore[reportAssignmentType]
    __table_args__ = (Index("reservation_by_lease", "state", "expires_at"),)
    tenant: str = Field(primary_key=True)
    id: str = Field(primary_key=True)
    workflow_id: str = Field(index=True)
    agent: str
    task: str
    state: str
    """held, settled or expired."""
    accounts: str
    """JSON list of the accounts it draws on."""
    currency: str
    worst: int = Field(sa_type=BIG)
    """What is held, in millionths."""
    spent: int = Field(default=0, sa_type=BIG)
    """What the calls took so far."""
    expires_at: int = Field(sa_type=BIG)


class CacheRow(SQLModel, table=True):
    """An answer that identical calls get again, until it expires or is retracted."""

    __tablename__ = "cache_entry"  # pyright: ignore[reportAssignmentType]
    tenant: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    task: str
    model: str
    answered: str
    """JSON of the answer; its text is a blob."""
    expires_at: int = Field(sa_type=BIG, index=True)


class SimilarRow(SQLModel, table=True):
    """Where the texts lie of a call whose answer is kept, for as long as it is."""

    __tablename__ = "similar_entry"  # pyright: ignore[reportAssignmentType]
    __table_args__ = (Index("similar_by_shape", "tenant", "shape"),)
    tenant: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    """The answer's, in `cache_entry`."""
    shape: str
    """Digest of all that must be the same between similar calls."""
    gist: str
    """Names what counts of the answer."""
    inputs: str
    """Digests of the texts, and the derived name of whom the call is about, for erasing."""
    vectors: str
    """Float32 in Base64, one vector per text; sealed with encryption on."""
    expires_at: int = Field(sa_type=BIG)


class SimilarTally(SQLModel, table=True):
    """How often answers to similar calls were the same when they were compared."""

    __tablename__ = "similar_tally"  # pyright: ignore[reportAssignmentType]
    tenant: str = Field(primary_key=True)
    line: str = Field(primary_key=True)
    """Digest of what the comparisons hold for."""
    edge: int = Field(primary_key=True)
    """Least similarity, in thousandths."""
    rights: int = Field(default=0, sa_type=BIG)
    wrongs: int = Field(default=0, sa_type=BIG)


class ShortTermUse(SQLModel, table=True):
    """How often the short-term caches of all processes had the answer, by day."""

    __tablename__ = "short_term_use"  # pyright: ignore[reportAssignmentType]
    day: int = Field(primary_key=True)
    """Counted from the year 1, in UTC."""
    hits: int = Field(default=0, sa_type=BIG)
    misses: int = Field(default=0, sa_type=BIG)
    warmed: int = Field(default=0, sa_type=BIG)


def table(model: type[SQLModel]) -> Table:
    """The Core table of a model, for statements that name columns."""
    return SQLModel.metadata.tables[str(model.__tablename__)]
