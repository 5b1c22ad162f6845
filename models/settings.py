"""Settings as data; `workers/config.py` fills them from countersign.toml and the environment."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr

from models.inference import DataClass
from models.loop import Frozen, Name
from models.policy import Policy


class TemporalSettings(Frozen):
    """Where Temporal is; with `managed`, the launcher starts a dev server there."""

    address: str = "127.0.0.1:7233"
    namespace: str = "default"
    managed: bool = True
    ui_port: int = 8233
    tls: bool = False
    api_key: SecretStr | None = None
    task_timeout: timedelta = timedelta(seconds=10)
    sticky_timeout: timedelta = timedelta(seconds=10)


class TierSettings(Frozen):
    """A class of model and the server behind it. Order in the file is from cheap to capable."""

    name: Name
    kind: Literal["llama_cpp", "tgi"]
    url: str
    managed: bool = False
    """The launcher starts a llama.cpp server with the bundled weights at this address."""
    model: str = ""
    token: SecretStr | None = None
    region: str | None = None
    data_classes: tuple[DataClass, ...] = (DataClass.PUBLIC, DataClass.INTERNAL)
    context_tokens: int = Field(default=4096, ge=64)
    structured: bool = True
    timeout_seconds: int = Field(default=120, ge=1)
    concurrency: int = Field(default=1, ge=1)
    price_per_million_input: Decimal | None = None
    price_per_million_output: Decimal | None = None
    currency: str | None = None
    tokens_per_second: int | None = Field(default=None, ge=1)
    """Expected decoding speed, for estimates until there are measurements."""


class EmbeddingSettings(Frozen):
    """The embedding server."""

    kind: Literal["llama_cpp"] = "llama_cpp"
    url: str = "http://127.0.0.1:8091"
    model: str = "sentence-transformers/all-MiniLM-L6-v2:53aa5117"
    """The identity its server must report; vectors of different models never mix."""
    managed: bool = True
    dimensions: int = 384
    timeout_seconds: int = 30


class SiteSettings(Frozen):
    """A git + Hugo-style site; paths are relative to the data folder."""

    name: Name
    repository: Path
    """Bare git repository."""
    branch: str = "main"
    build: Path
    """Folder the built pages are served from."""
    address: str
    """Where the built pages are read back over HTTP."""
    serve: bool = True
    """The desk role serves the folder at that address."""
    language: str = "en"
    title: str = "Countersign demo"


class ContentSettings(Frozen):
    """What a post must satisfy, and when two ideas count as one."""

    banned_phrases: tuple[str, ...] = ()
    min_words: int = 40
    max_words: int = 1500
    duplicate_permille: int = Field(default=850, ge=0, le=1000)
    """Cosine times 1000 from which an earlier post counts as a near-duplicate."""
    check_links: bool = True


class ActSettings(Frozen):
    """How long one attempt at an effect may take before it may no longer send."""

    attempt: timedelta = timedelta(seconds=30)


class ScheduleSettings(Frozen):
    """One Temporal schedule."""

    name: Name
    agent: Name
    cron: str
    body: dict[str, Any] = Field(default_factory=dict)
    paused: bool = False
    note: str = ""


class Settings(Frozen):
    """Everything a process needs to know."""

    tenant: Name = "default"
    approver: str | None = None
    """Who the command line answers as when `--as` is not given; never guessed from the login."""
    data: Path = Path("var")
    database: str = ""
    """SQLAlchemy URL; empty means `<data>/countersign.db` in SQLite."""
    temporal: TemporalSettings = TemporalSettings()
    tiers: tuple[TierSettings, ...] = ()
    embeddings: EmbeddingSettings | None = EmbeddingSettings()
    sites: tuple[SiteSettings, ...] = ()
    content: ContentSettings = ContentSettings()
    act: ActSettings = ActSettings()
    policy: Policy = Policy()
    schedules: tuple[ScheduleSettings, ...] = ()
    roles: tuple[str, ...] = ("decide", "infer", "remember", "act", "desk")
    otlp_endpoint: str | None = None

    @property
    def database_url(self) -> str:
        """The database's SQLAlchemy URL."""
        return self.database or f"sqlite:///{self.data.resolve() / 'countersign.db'}"
