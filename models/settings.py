"""Settings as data; `workers/config.py` fills them from countersign.toml and the environment."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from models.budget import Budget, same_scope
from models.channels import ChannelSettings, DeskSettings, mistake
from models.content import ContentSettings
from models.cosigners import CosignerSettings
from models.inference import OPEN, DataClass
from models.knowledge import PrewarmSettings
from models.loop import WEB, Assurance, Currency, Frozen, Name
from models.memory import EmbeddingSettings, WeaviateSettings
from models.orders import Pace
from models.people import SECURITY_KEYS, Everybody, Person, PersonId
from models.policy import POLICY_AGENT, Policy
from models.telemetry import TelemetrySettings
from models.visibility import Role


def _refused(remedy: str) -> PydanticCustomError:
    return PydanticCustomError("refused", remedy)  # pyright: ignore[reportArgumentType]


class TemporalSettings(Frozen):
    """Where Temporal is; with `managed`, the launcher starts a dev server there."""

    address: str = "127.0.0.1:7233"
    namespace: str = "default"
    managed: bool = True
    ui_port: int = Field(default=8233, ge=1, le=65535)
    tls: bool = False
    api_key: SecretStr | None = None
    task_timeout: timedelta = Field(default=timedelta(seconds=10), gt=timedelta(0))
    sticky_timeout: timedelta = Field(default=timedelta(seconds=10), gt=timedelta(0))


class TierSettings(Frozen):
    """A class of model and the server behind it. Order in the file is from cheap to capable."""

    name: Name
    kind: Literal["llama_cpp", "tgi", "openai_compatible"]
    route: Literal["chat", "generate"] = "chat"
    """Generate is TGI's native route: the server's chat template, then `/generate_stream`."""
    url: str = Field(pattern=WEB)
    managed: bool = False
    """The launcher starts a llama.cpp server with the bundled weights at this address."""
    model: str = ""
    """The only model accepted there; empty accepts the first one seen, and then what answered last."""
    revision: str | None = None
    """The only revision accepted, where the server publishes one."""
    token: SecretStr | None = None
    cache_salt: SecretStr | None = None
    """Keeps the server's prefix caches of groups apart, where it takes a salt (vLLM)."""
    region: str | None = None
    data_classes: tuple[DataClass, ...] = OPEN
    context_tokens: int = Field(default=4096, ge=64)
    structured: bool = True
    connect_seconds: int = Field(default=5, ge=1)
    first_token_seconds: int | None = Field(default=None, ge=1)
    """Reading a long prompt is slow without a graphics card; `None` is three quarters of the whole."""
    idle_seconds: int = Field(default=30, ge=1)
    """The longest pause between two tokens."""
    timeout_seconds: int = Field(default=120, ge=1)
    """For the whole answer."""
    concurrency: int = Field(default=1, ge=1)
    price_per_million_input: Decimal | None = Field(default=None, ge=0)
    price_per_million_output: Decimal | None = Field(default=None, ge=0, validate_default=True)
    currency: Currency | None = Field(default=None, validate_default=True)
    tokens_per_second: int | None = Field(default=None, ge=1)
    """Expected decoding speed, for estimates until there are measurements."""

    @field_validator("route")
    @classmethod
    def _route_of_its_kind(cls, value: str, info: ValidationInfo) -> str:
        if value == "generate" and info.data.get("kind") != "tgi":
            raise _refused('only kind = "tgi" has this route; write "chat"')
        return value

    @field_validator("revision")
    @classmethod
    def _revision_of_a_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not info.data.get("model"):
            raise _refused("a revision belongs to a model; set model too")
        return value

    @field_validator("price_per_million_output")
    @classmethod
    def _both_prices(cls, value: Decimal | None, info: ValidationInfo) -> Decimal | None:
        if (value is None) != (info.data.get("price_per_million_input") is None):
            raise _refused("a price needs its other half; set both prices, or neither")
        return value

    @field_validator("currency")
    @classmethod
    def _currency_of_prices(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("price_per_million_input") is not None:
            raise _refused('a price without a currency is no price; set currency, for instance "EUR"')
        return value


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
    engine: Literal["auto", "hugo", "plain"] = "auto"
    """What builds the pages; auto is Hugo where it is installed."""


class TaskSettings(Frozen):
    """What is expected of one task's calls."""

    within_milliseconds: int | None = Field(default=None, ge=1)
    """Somebody waits for the answer, this long; without it the work may stand in a queue."""
    may_queue: bool = False
    """What cannot be had within that time may be had later; otherwise it is refused at once."""
    priority: int = Field(default=3, ge=1, le=5)
    """1 goes first among queued work."""
    cache_seconds: int | None = Field(default=None, ge=0)
    """How long an identical call gets the same answer; 0 is never, and `None` leaves it to the task."""
    similar_wrong_permille: int | None = Field(default=None, ge=1, le=200)
    """How many of a thousand answers may be wrong that are given because a similar call got them; `None` is
    that none is. Only for tasks that are declared read-only and cached."""
    tier: Name | None = None
    """The only tier that may take it."""
    redact: bool = False
    """A tier that may not see personal data takes it with marks in its place; the answer has it again."""
    wrong_costs: Decimal | None = Field(default=None, ge=0)
    """What a wrong answer costs, in the currency of the tiers. With it models are asked how sure they are,
    and an answer goes on to the next tier where its calibrated chance of being wrong costs more than that."""
    learn_permille: int = Field(default=0, ge=0, le=1000)
    """How many of a thousand calls do without that, to learn from: a half takes what the small tier says, the
    other half asks the next tier whatever it says."""


AS_IT_IS = TaskSettings()
"""For a task of which the settings say nothing."""


class LedgerSettings(Frozen):
    """How the ledger is signed, and who keeps what was signed."""

    origin: str = Field(default="countersign", pattern=r"^[A-Za-z0-9][A-Za-z0-9.\-/]{0,99}$")
    """What the logs of this installation are called, before the tenant's name; best a domain of yours."""
    checkpoint_seconds: int = Field(default=60, ge=1)
    """How long an event may stand without a witness; before an irreversible effect none does."""
    witnesses: tuple[str, ...] = ("file:witness",)
    """`file:FOLDER` or `git:BARE_REPOSITORY`, relative to the data folder; best on another machine."""
    cosigners: tuple[CosignerSettings, ...] = ()
    """Who is asked to cosign every checkpoint."""
    cosigners_needed: int | None = Field(default=None, ge=0, validate_default=True)
    """How many of them must have before an irreversible effect; `None` is all."""
    notify: tuple[Name, ...] = ()
    """Channels on which people hear at once that the log is broken or forked."""

    @field_validator("cosigners_needed")
    @classmethod
    def _needed_are_there(cls, needed: int | None, info: ValidationInfo) -> int | None:
        if needed is not None and needed > len(info.data.get("cosigners", ())):
            raise _refused("there are not that many ledger.cosigners; name more of them, or ask for fewer")
        return needed


class KeySettings(Frozen):
    """A master key: its id, which stands beside what it sealed, and its file of 32 random bytes."""

    id: Name
    file: Path
    """Relative to the data folder; only its owner may read it."""


class CodecServerSettings(Frozen):
    """The server that shows sealed payloads in the Temporal UI, to people who have its token."""

    port: int = Field(default=8234, ge=0, le=65535)
    """On 127.0.0.1."""
    origins: tuple[str, ...] = ()
    """Where the UI is opened, as `https://temporal.example.com`; empty is the dev server's."""
    token: SecretStr | None = None
    """At least 16 characters; without it the server does not start."""


class EncryptionSettings(Frozen):
    """Sealing of Temporal payloads and stored content."""

    enabled: bool = False
    keys: tuple[KeySettings, ...] = (KeySettings(id="k1", file=Path("keys/payloads-k1.key")),)
    """To rotate, add a key and make it current; keep the old one for as long as something is under it."""
    current: Name = Field(default="k1", validate_default=True)
    """The key that seals from now on."""
    server: CodecServerSettings = CodecServerSettings()

    @field_validator("keys")
    @classmethod
    def _key_ids_differ(cls, keys: tuple[KeySettings, ...]) -> tuple[KeySettings, ...]:
        if len({key.id for key in keys}) < len(keys):
            raise _refused("two keys have one id; ids are how old data find their key")
        return keys

    @field_validator("current")
    @classmethod
    def _current_is_a_key(cls, current: str, info: ValidationInfo) -> str:
        if "keys" in info.data and current not in {key.id for key in info.data["keys"]}:
            raise _refused("it is not the id of one of encryption.keys; name one that is")
        return current


class RegionSettings(Frozen):
    """A region that keeps the texts of its requests to its own processes; see docs/regions.md."""

    keys: tuple[KeySettings, ...] = Field(min_length=1)
    """What its processes seal under before anything leaves them; only they may have the files."""
    current: Name
    """The key that seals from now on."""
    database: str = Field(default="", pattern=r"^([A-Za-z0-9_+]+://.*)?$")
    """SQLAlchemy URL of its content store; empty means `<data>/region-<name>.db` in SQLite."""
    tenants: tuple[Name, ...] = ()
    """Whose every request is bound to it."""
    server: CodecServerSettings = CodecServerSettings()

    @field_validator("current")
    @classmethod
    def _current_is_a_key(cls, current: str, info: ValidationInfo) -> str:
        if current not in {key.id for key in info.data.get("keys", ())}:
            raise _refused("it is not the id of one of this region's keys; name one that is")
        return current

    @property
    def sealing(self) -> EncryptionSettings:
        """How its processes seal, always."""
        return EncryptionSettings(enabled=True, keys=self.keys, current=self.current, server=self.server)


def _shared(regions: dict[Name, RegionSettings]) -> str | None:
    """What would be two regions' own: a tenant, a key, a database."""
    taken = set[tuple[str, str]]()
    for region in regions.values():
        own = {("tenant", name) for name in region.tenants} | {("key", str(key.file)) for key in region.keys}
        own |= {("database", region.database)} if region.database else set[tuple[str, str]]()
        if both := taken & own:
            kind, name = min(both)
            # A URL may hold a password.
            return kind if kind == "database" else f"{kind} {name}"
        taken |= own
    return None


class ScheduleSettings(Frozen):
    """One Temporal schedule."""

    name: Name
    agent: Name
    cron: str
    body: dict[str, Any] = Field(default_factory=dict)
    requester: PersonId | None = None
    """Whose wish its runs are: they need the role to start them, and do not approve them."""
    paused: bool = False
    note: str = ""


class Settings(Frozen):
    """Everything a process needs to know."""

    tenant: Name = "default"
    approver: str | None = None
    """Who the command line answers as when `--as` is not given; never guessed from the login."""
    data: Path = Path("var")
    database: str = Field(default="", pattern=r"^([A-Za-z0-9_+]+://.*)?$")
    """SQLAlchemy URL; empty means `<data>/countersign.db` in SQLite."""
    temporal: TemporalSettings = TemporalSettings()
    tiers: tuple[TierSettings, ...] = ()
    probe: bool = True
    """Try each model server out once at start: identity, context, whether schemas are really enforced."""
    tasks: dict[Name, TaskSettings] = Field(default_factory=dict)
    budgets: tuple[Budget, ...] = ()
    """What may be spent a day. A tier without a price takes no call that a budget covers."""
    embeddings: EmbeddingSettings | None = EmbeddingSettings()
    weaviate: WeaviateSettings | None = None
    """Set it and it serves vector search; without it the exact scan does."""
    sites: tuple[SiteSettings, ...] = ()
    content: ContentSettings = ContentSettings()
    pace: Pace = Pace()
    notes: bool = False
    """Offer the `null` connector, which keeps notes in the data folder; for trials and tests."""
    policy: Policy = Policy()
    people: Everybody = Field(default=(), validate_default=True)
    """Who may answer; with nobody named, any name counts as claimed."""
    ledger: LedgerSettings = LedgerSettings()
    channels: tuple[ChannelSettings, ...] = Field(default=(), validate_default=True)
    """On which people hear that something waits, besides the inbox."""
    desk: DeskSettings = DeskSettings()
    encryption: EncryptionSettings = EncryptionSettings()
    regions: dict[Name, RegionSettings] = Field(default_factory=dict)
    region: Name | None = None
    """The one whose requests this process serves; `None` is the centre, which holds digests of theirs."""
    schedules: tuple[ScheduleSettings, ...] = ()
    prewarm: tuple[PrewarmSettings, ...] = ()
    """Subjects whose beliefs and records are ready before anybody asks."""
    roles: tuple[Role, ...] = tuple(Role)
    telemetry: TelemetrySettings = TelemetrySettings()

    @field_validator("tiers")
    @classmethod
    def _tier_names_differ(cls, tiers: tuple[TierSettings, ...]) -> tuple[TierSettings, ...]:
        names = [tier.name for tier in tiers]
        for number, name in enumerate(names):
            if name in names[:number]:
                # At the field itself, so that no other value of the entry, such as a token, is shown.
                text = "another tier has this name; names are how routes and budgets tell tiers apart"
                kind = PydanticCustomError("duplicate", text)
                line = InitErrorDetails(type=kind, loc=(number, "name"), input=name)
                raise ValidationError.from_exception_data("tiers", [line])
        return tiers

    @field_validator("policy")
    @classmethod
    def _assurance_can_be_had(cls, policy: Policy) -> Policy:
        for agent, one in policy.agents.items():
            if one.gate.assurance is Assurance.PRINCIPAL:
                kind = _refused(
                    "nothing here can establish it: who sent a message stands in Temporal's history as the "
                    "sender says it; write signed"
                )
                where = ("agents", agent, "gate", "assurance")
                line = InitErrorDetails(type=kind, loc=where, input=one.gate.assurance.value)
                raise ValidationError.from_exception_data("policy", [line])
        return policy

    @field_validator("people")
    @classmethod
    def _roles_are_had(cls, people: tuple[Person, ...], info: ValidationInfo) -> tuple[Person, ...]:
        had = {role for person in people for role in person.roles}
        policy: Policy = info.data.get("policy", Policy())
        for agent, one in policy.agents.items():
            glass = () if one.gate.break_glass is None else one.gate.break_glass.roles
            agree = one.gate.roles if agent == POLICY_AGENT else ()
            for role in sorted({*one.start_roles, *one.cancel_roles, *glass, *agree} - had):
                needed = "agree" if role in agree else "start, cancel or break the glass"
                raise _refused(
                    f"policy of {agent} wants the role {role} to {needed}, and "
                    "nobody has it; give it to somebody under [[people]]"
                )
            if one.gate.hardware and not any(k.kind in SECURITY_KEYS for p in people for k in p.keys):
                raise _refused(f"policy of {agent} wants a security key, and nobody has one; name its key")
        return people

    @field_validator("channels")
    @classmethod
    def _channels_fit_the_policy(
        cls, channels: tuple[ChannelSettings, ...], info: ValidationInfo
    ) -> tuple[ChannelSettings, ...]:
        if "policy" in info.data and "ledger" in info.data:
            wrong = mistake(channels, info.data["policy"], info.data["ledger"].notify)
            if wrong is not None:
                raise _refused(wrong)
        return channels

    @field_validator("budgets")
    @classmethod
    def _budgets_differ(cls, budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
        if same_scope(budgets) is not None:
            raise _refused("two of them speak of the same tenant, agent and currency; keep one")
        return budgets

    @field_validator("regions")
    @classmethod
    def _what_is_kept_is_the_regions_own(
        cls, regions: dict[Name, RegionSettings], info: ValidationInfo
    ) -> dict[Name, RegionSettings]:
        kept: EncryptionSettings = info.data.get("encryption", EncryptionSettings())
        taken = {key.file for key in kept.keys} if kept.enabled else set[Path]()
        if (shared := _shared(regions)) is not None:
            raise _refused(f"two regions name the same {shared}; name it under one, give the other its own")
        for name, region in regions.items():
            if region.database and region.database == info.data.get("database"):
                raise _refused(f"region {name} names the centre's database; give it one of its own")
            if taken & {key.file for key in region.keys if key.id == region.current}:
                raise _refused(f"region {name} seals under a key of the centre's; give it a file of its own")
        return regions

    @field_validator("region")
    @classmethod
    def _region_is_known(cls, region: str | None, info: ValidationInfo) -> str | None:
        if region is not None and "regions" in info.data and region not in info.data["regions"]:
            raise _refused("there is no such region; add [regions.NAME], or leave it out for the centre")
        return region

    @property
    def embedding_server(self) -> EmbeddingSettings | None:
        """The embedding server that this process may show texts to: in a region, one that stands there."""
        server = self.embeddings
        away = server is not None and self.region is not None and not server.is_here
        return None if server is None or (away and server.region != self.region) else server

    @property
    def vector_index(self) -> WeaviateSettings | None:
        """The Weaviate that this process fills: none in a region, whose vectors stay in its database."""
        return self.weaviate if self.region is None else None

    @property
    def database_url(self) -> str:
        """The database's SQLAlchemy URL."""
        return self.database or f"sqlite:///{self.data.resolve() / 'countersign.db'}"

    @property
    def region_url(self) -> str | None:
        """The SQLAlchemy URL of the content store of the region that this process serves."""
        if self.region is None:
            return None
        return (
            self.regions[self.region].database
            or f"sqlite:///{self.data.resolve() / f'region-{self.region}.db'}"
        )

    @property
    def sealing(self) -> EncryptionSettings:
        """How this process seals: a region's always does, and by its own keys."""
        return self.encryption if self.region is None else self.regions[self.region].sealing

    def home(self, tenant: str) -> str | None:
        """The region that all requests of a tenant are bound to."""
        return next((name for name, region in self.regions.items() if tenant in region.tenants), None)
