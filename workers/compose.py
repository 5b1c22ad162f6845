"""From settings to running parts: the only place that knows which engine stands behind which Protocol."""

from __future__ import annotations

import asyncio
import functools
import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from opentelemetry.metrics import Meter, NoOpMeter
from opentelemetry.trace import NoOpTracer, Tracer
from temporalio.client import Client
from temporalio.worker import Worker

from activities.actions import Actions
from activities.amendments import Amending
from activities.approvals import Approvals
from activities.beliefs import Believing
from activities.calendar import Planning
from activities.calibrating import Calibrating
from activities.connectors.base import Connector
from activities.connectors.gate_policy import GatePolicy
from activities.connectors.git_site import GitSite
from activities.connectors.null import Null
from activities.content import Drafting
from activities.external import External
from activities.inference import Inference
from activities.knowledge import Knowledge
from activities.ledger import Ledger
from activities.memory import Memory
from activities.notices import Notices, Reminders
from activities.routing import Routing
from activities.services.acceptance import accepted_by_use
from activities.services.actor import Actor
from activities.services.alarms import Alarms
from activities.services.amendments import InForce
from activities.services.beliefs import Beliefs
from activities.services.breaker import Breakers
from activities.services.cache import Cache
from activities.services.calibration import Calibrations
from activities.services.checkpoints import Checkpoints, HandoverLate, load_key
from activities.services.claims import Claims
from activities.services.content import ContentStore
from activities.services.cosigning import RemoteCosigner
from activities.services.database import Database
from activities.services.identities import Identities
from activities.services.indexing import keep_indexed, keep_swept
from activities.services.intents import Intents
from activities.services.knowing import Knowing, keep_known
from activities.services.leases import Leases
from activities.services.ledger_store import LedgerStore
from activities.services.listening import Listening
from activities.services.loads import Loads
from activities.services.memory_store import MemoryStore, Vectors
from activities.services.model_calls import ModelCalls
from activities.services.notices import Channel, Noticing, channels
from activities.services.probe import Probes, keep_probed
from activities.services.regions import home_behind
from activities.services.requests import Requests
from activities.services.residence import stores
from activities.services.router import Alike, Answerer
from activities.services.routes import Measurements, Routes
from activities.services.runs import Runs
from activities.services.scrubbing import Scrub
from activities.services.short_term import ShortTerm, metered
from activities.services.site_server import SiteServer
from activities.services.tidying import keep_tidy
from activities.services.till import Till
from activities.services.vectors import ExactVectors
from activities.services.watching import keep_watch
from activities.services.witnesses import witnesses
from activities.tiers.base import Embedder, Endpoint
from activities.tiers.coalesced import Coalesced
from activities.tiers.kinds import chat_endpoint
from activities.tiers.kinds import embedder as embedding_adapter
from activities.tiers.wire import ChatEndpoint, http_client
from models.canonical import sha256
from models.errors import InvalidInput
from models.inference import Task
from models.people import People
from models.regions import misplaced, served
from models.settings import Settings, TierSettings
from models.similar import may_be_similar
from models.visibility import Queue, Role, infer_queue, queue_of
from temporal.backlog import Backlog
from workers import registry
from workflows.beliefs import BeliefOwner
from workflows.unknown import Unknown
from workflows.upkeep import Upkeep

Clock = Callable[[], datetime]
DIMENSIONS_WITHOUT_MODEL = 384
KEPT_SHORTLY, SHORT_TERM = 1000, timedelta(minutes=10)
"""Answers about subjects that a process keeps, and for how long without anybody asking."""


@functools.cache
def build_id() -> str:
    """Name of the code that runs here: a digest of our own source."""
    root = Path(__file__).resolve().parent.parent
    rooms = ("models", "activities", "workflows", "temporal", "workers")
    files = [file for room in rooms for file in sorted((root / room).rglob("*.py"))]
    return sha256(b"\0".join(file.read_bytes() for file in files))[:32]


def utc_now() -> datetime:
    """The time, aware."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a program may bring besides what settings name: its own agents, tasks and endpoints."""

    agents: Sequence[type[Any]] = ()
    tasks: Mapping[str, Task] = field(default_factory=dict[str, Task])
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict[str, Endpoint])
    activities: Sequence[Callable[..., Any]] = ()
    embedder: Embedder | None = None
    """Instead of the embedding server that settings name."""
    database: Callable[[str], Database] = Database
    """Opens the database by its URL."""
    connectors: Callable[[dict[str, Connector]], dict[str, Connector]] = dict[str, Connector]
    """Gets the connectors that settings name; returns those to use."""
    meter: Meter = field(default_factory=lambda: NoOpMeter("nobody"))
    tracer: Tracer = field(default_factory=NoOpTracer)
    """Where is told what goes on."""


@asynccontextmanager
async def role(
    client: Client, settings: Settings, name: Role, parts: Parts | None = None
) -> AsyncGenerator[None]:
    """Run one role for as long as the block lasts."""
    async with AsyncExitStack() as stack:
        parts = parts or Parts()
        database = stack.enter_context(stores(settings, parts.database))
        composer = _Composer(client, settings, database, parts, stack)
        for worker in await composer.compose(name):
            await stack.enter_async_context(worker)
        yield


class _Composer:
    def __init__(
        self, client: Client, settings: Settings, database: Database, parts: Parts, stack: AsyncExitStack
    ) -> None:
        self._client = client
        self._settings = settings
        self._database = database
        self._parts = parts
        self._stack = stack
        self._content = ContentStore(database)
        known = Identities(People(people=settings.people), utc_now)
        self._force = InForce(settings.policy, known.doubt)
        heed = self._force.heed if settings.policy.may_change else None
        self._ledger = LedgerStore(database, utc_now, heed)

    async def compose(self, name: Role) -> list[Worker]:
        match name:
            case Role.DECIDE:
                return [await self._decide()]
            case Role.INFER:
                return await self._infer()
            case Role.REMEMBER:
                return [await self._remember()]
            case Role.ACT:
                return [await self._act()]
            case Role.DESK:
                await self._desk()
                return []

    async def _decide(self) -> Worker:
        settings, database = self._settings, self._database
        known = People(people=settings.people)
        wrong = functools.partial(misplaced, settings)
        heed = self._force.heed
        requests = Requests(database, settings.policy, settings.pace, utc_now, known, wrong, heed)
        approvals = Approvals(Identities(known, utc_now))
        ledger = Ledger(requests, self._ledger, Intents(database, utc_now, self._force))
        tasks = registry.tasks(settings) | dict(self._parts.tasks)
        routing = Routing(self._routes(tasks, await self._sensing()))
        sites = tuple(site.name for site in settings.sites)
        planning = Planning(self._content, Claims(database), settings.content, sites)
        drafting = Drafting(
            self._content,
            settings.content,
            sites,
            settings.tiers[-1].tokens_per_second if settings.tiers else None,
        )
        external = External(self._content)
        believing = Believing(Beliefs(database, utc_now))
        knowledge = Knowledge(await self._knowing())
        activities = [
            *(ledger.admit, ledger.record, ledger.present, ledger.conclude, approvals.identify),
            Reminders().remind_at,
            *(routing.route, routing.fell, external.read_proposal),
            Amending(self._content).read_amendment,
            *(believing.own, believing.deliver, believing.read),
            *(knowledge.know, knowledge.prewarm, Calibrating(Calibrations(database, utc_now)).calibrate),
            *(drafting.open_brief, drafting.assemble, drafting.compose, drafting.nothing),
            *(planning.open_week, planning.gather, planning.choose),
            *self._parts.activities,
        ]
        agents = [*registry.agents(), *self._parts.agents, BeliefOwner, Upkeep, Unknown]
        return self._worker(
            queue_of(Queue.DECIDE, settings.region),
            activities,
            workflows=agents,
            sticky_queue_schedule_to_start_timeout=settings.temporal.sticky_timeout,
        )

    async def _knowing(self) -> Knowing:
        """What agents know of subjects, had ready for what settings name."""
        settings = self._settings
        short = ShortTerm(KEPT_SHORTLY, SHORT_TERM, utc_now, metered(self._parts.meter))
        looks = (look for one in settings.prewarm for look in one.looks(settings.tenant))
        knowing = Knowing(self._memories(), short, utc_now, looks)
        await self._background(keep_known, knowing)
        return knowing

    async def _sensing(self) -> Probes:
        """What is known of the tiers: measured by earlier calls, waiting in line, and tried out at start."""
        settings = self._settings
        hints = Breakers(time.monotonic, random.random)
        measured = Measurements(self._database, settings.tiers, utc_now, hints)
        queue = functools.partial(infer_queue, region=settings.region)
        loads = Loads(measured, settings.tiers, queue, Backlog(self._client).line, time.monotonic)
        self._stack.push_async_callback(loads.close)
        sensing = Probes(loads)
        brought = self._parts.endpoints
        servers = [await self._server(tier) for tier in settings.tiers if tier.name not in brought]
        if settings.probe:
            await self._background(keep_probed, servers, sensing.found)
        return sensing

    def _routes(self, tasks: Mapping[str, Task], sensing: Probes) -> Routes:
        settings, database = self._settings, self._database
        return Routes(
            settings.tiers,
            tasks,
            self._content,
            self._ledger,
            database=database,
            clock=utc_now,
            wanted=settings.tasks,
            budgets=settings.budgets,
            sensing=sensing,
            cache=Cache(database, utc_now),
            calibrated=Calibrations(database, utc_now),
        )

    async def _infer(self) -> list[Worker]:
        settings = self._settings
        lines = served(settings)
        endpoints = {tier.name: await self._endpoint(tier) for tier in dict.fromkeys(t for t, _ in lines)}
        tasks = registry.tasks(settings) | dict(self._parts.tasks)
        cache = Cache(self._database, utc_now)
        answerer = Answerer(
            settings.tiers,
            endpoints,
            tasks,
            self._content,
            till=Till(self._database, utc_now),
            cache=cache,
            similar=await self._similar(tasks, cache),
            wanted=settings.tasks,
            clock=utc_now,
            calls=ModelCalls(self._parts.meter, self._parts.tracer),
        )
        sweeping = Leases(self._database, f"infer-{uuid.uuid4()}", utc_now)
        await self._background(keep_tidy, self._database, utc_now, sweeping)
        answer = Inference(answerer).answer
        return [
            self._worker(
                queue,
                [answer],
                # Work waits in Temporal, where it has a place in line, and not before a busy model server.
                max_concurrent_activities=tier.concurrency,
            )
            for tier, queue in lines
        ]

    async def _similar(self, tasks: Mapping[str, Task], cache: Cache) -> Alike | None:
        """What gives calls the answers of similar ones, if settings permit it for a task."""
        wanted = {name: one for name, one in self._settings.tasks.items() if one.similar_wrong_permille}
        for name, one in wanted.items():
            if name in tasks:
                may_be_similar(tasks[name], one)
        # Calls of a region are left out.
        if not wanted or self._settings.region is not None:
            return None
        embedder = await self._embedder()
        if embedder is None:
            remedy = "similar calls are found by it; set it, or leave tasks.*.similar_wrong_permille out"
            raise InvalidInput.field("embeddings", None, remedy)
        # Loaded only where it is used: it computes with NumPy, which no other part of this role needs.
        from activities.services.similar import Similar

        return Similar(self._database, self._content, cache, embedder, wanted, utc_now)

    async def _embedder(self) -> Embedder | None:
        settings = self._settings.embedding_server
        if self._parts.embedder is not None or settings is None:
            return self._parts.embedder
        client = await self._stack.enter_async_context(http_client(settings))
        return Coalesced(embedding_adapter(settings, client))

    async def _endpoint(self, tier: TierSettings) -> Endpoint:
        if tier.name in self._parts.endpoints:
            return self._parts.endpoints[tier.name]
        return await self._server(tier)

    async def _server(self, tier: TierSettings) -> ChatEndpoint:
        client = await self._stack.enter_async_context(http_client(tier))
        return chat_endpoint(tier, client, accepted_by_use(self._database, tier.name))

    def _memories(self) -> Database:
        """Where memory is; a region's is in its own database, and sees nothing else."""
        home = home_behind(self._database)
        return self._database if home is None else home.database

    async def _remember(self) -> Worker:
        settings = self._settings.embeddings
        embedder = await self._embedder()
        dimensions = settings.dimensions if settings is not None else DIMENSIONS_WITHOUT_MODEL
        database = self._memories()
        leases = Leases(database, f"remember-{uuid.uuid4()}", utc_now)
        vectors = await self._vectors(database, leases, dimensions)
        store = MemoryStore(database, ContentStore(database), embedder, vectors)
        await self._background(keep_swept, store, leases)
        if embedder is not None:
            await self._background(keep_indexed, store)
        return self._worker(queue_of(Queue.REMEMBER, self._settings.region), [Memory(store).recall])

    async def _vectors(self, database: Database, leases: Leases, dimensions: int) -> Vectors:
        if (index := self._settings.vector_index) is None:
            return ExactVectors(database, dimensions)
        # Loaded only where it is used: its client takes a second and tens of megabytes.
        from activities.services.weaviate_store import WeaviateVectors, connected

        client = await self._stack.enter_async_context(connected(index))
        return WeaviateVectors(database, client, leases, dimensions)

    async def _act(self) -> Worker:
        settings = self._settings
        connectors = await self._connectors()
        doubt = Identities(People(people=settings.people), utc_now).doubt
        witness, force = self._checkpoints().before_effect, self._force.of
        attempt = settings.pace.attempt
        actor = Actor(self._database, connectors, settings.policy, attempt, utc_now, doubt, witness, force)
        actions = Actions(actor, utc_now)
        notices = Notices(await self._noticing())
        return self._worker(
            queue_of(Queue.ACT, settings.region),
            [actions.plan, actions.apply, actions.verify, actions.settle, actions.undo, notices.notify],
        )

    async def _noticing(self) -> Noticing:
        return Noticing(self._database, await self._channels(), utc_now, self._settings.desk.found_at)

    async def _channels(self) -> dict[str, Channel]:
        settings = self._settings
        client = await self._stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=20))
        return channels(settings.channels, settings.data / "notices", client)

    async def _connectors(self) -> dict[str, Connector]:
        settings = self._settings
        client = await self._stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=10))
        connectors: list[Connector] = [
            GitSite(site, settings.data, client, utc_now, site.engine) for site in settings.sites
        ]
        if settings.notes:
            connectors.append(Null(settings.data / "notes", utc_now))
        if settings.policy.may_change:
            connectors.append(GatePolicy(self._database, self._force, utc_now))
        return self._parts.connectors({connector.name: connector for connector in connectors})

    async def _desk(self) -> None:
        if self._settings.region is None:
            every = self._settings.ledger.checkpoint_seconds
            told = self._settings.ledger.notify
            known = {name: one for name, one in (await self._channels()).items() if name in told}
            checkpoints, scrub = self._checkpoints(), Scrub(self._database)
            await self._background(keep_watch, checkpoints, scrub, Alarms(known, utc_now), every)
        for site in self._settings.sites:
            if site.serve:
                await self._serve(
                    SiteServer(self._settings.data / site.build, httpx.URL(site.address).port or 80)
                )
        if self._settings.desk.found_at:
            # Loaded only where it is used: it brings what renders pages.
            from temporal.desk import Desk

            tenant, names = self._settings.tenant, [person.name for person in self._settings.people]
            runs = Runs(self._ledger, self._content, tenant)
            await self._serve(Desk(self._client, runs, self._ledger, tenant, self._settings.desk, names))

    async def _serve(self, server: Listening) -> None:
        await server.start()
        self._stack.push_async_callback(server.close)

    def _checkpoints(self) -> Checkpoints:
        ledger, data = self._settings.ledger, self._settings.data
        kept_by = witnesses(ledger.witnesses, data, utc_now)
        # A connection of its own: signing is no step of a run, and does not wait behind those that are.
        database = Database(self._settings.database_url)
        self._stack.callback(database.close)
        asked = [RemoteCosigner(one, utc_now) for one in ledger.cosigners]
        key, needed = load_key(data), ledger.cosigners_needed
        late = HandoverLate(data, key, utc_now)
        return Checkpoints(database, key, ledger.origin, kept_by, asked, needed, late)

    async def _background(self, run: Callable[..., Any], *arguments: Any) -> None:
        stop = asyncio.Event()
        task = asyncio.create_task(run(*arguments, stop))

        async def end() -> None:
            stop.set()
            with suppress(asyncio.CancelledError):
                await task

        self._stack.push_async_callback(end)

    def _worker(
        self,
        queue: str,
        activities: Sequence[Callable[..., Any]],
        workflows: Sequence[type[Any]] = (),
        max_concurrent_activities: int = 100,
        **more: Any,
    ) -> Worker:
        return Worker(
            self._client,
            task_queue=queue,
            activities=list(activities),
            workflows=list(workflows),
            # The SDK's own guess reads and hashes every module there is, at each worker's start.
            build_id=build_id(),
            max_concurrent_activities=max_concurrent_activities,
            **more,
        )
