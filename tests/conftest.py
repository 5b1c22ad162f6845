from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as searching
from temporalio.client import Client

from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.ledger_store import LedgerStore
from activities.services.residence import stores
from models.gate import Judged, Kind
from models.ledger import Event
from models.loop import GateRule, Request
from models.orders import Pace
from models.policy import AgentPolicy, Policy
from models.settings import Settings, TemporalSettings
from models.visibility import Role
from scripts.supervisor import LEASH
from temporal import dev_server
from temporal.client import Started, answer, connect, submit
from temporal.converter import codec_of
from tests.databases import migrated
from workers.compose import Parts, role, utc_now
from workers.logs import FORMAT, Discreet

if TYPE_CHECKING:
    from temporal.telemetry import Telemetry


# How fast this machine is says nothing of the code.
searching.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
searching.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="sizes that take minutes: `make test-large`")


@pytest.fixture
def large(request: pytest.FixtureRequest) -> bool:
    """Whether there is time for sizes that prove no other thing, only more of it."""
    return bool(request.config.getoption("--large"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that is logged, as workers write it with encryption on."""
    text, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(text), root.level
    handler.setFormatter(Discreet(FORMAT))
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield text
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return migrated(f"sqlite:///{tmp_path / 'countersign.db'}")


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database(url)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def temporal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TemporalSettings]:
    """One dev server for the whole run, with the flags of the product."""
    with serving(tmp_path_factory.mktemp("temporal")) as settings:
        yield settings


@contextmanager
def serving(data: Path, *flags: str) -> Iterator[TemporalSettings]:
    """A dev server of one's own, with its database and log in a folder; flags come after the product's."""
    settings = TemporalSettings(
        address=f"127.0.0.1:{free_port()}",
        ui_port=free_port(),
        managed=False,
        task_timeout=timedelta(seconds=2),
    )
    program = dev_server.argv(dev_server.binary(), settings, data)
    argv = (sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), "--", *program, *flags)
    with open(data / "log", "wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    try:
        asyncio.run(dev_server.wait_ready(settings))
        yield settings
    finally:
        process.terminate()
        process.wait()


def policy(**gate: Any) -> Policy:
    one = AgentPolicy(connectors=("null", "site"), gate=GateRule(**gate))
    return Policy(agents={"external": one, "content": one, "stub": one})


def settings_for(temporal: TemporalSettings, data: Path, **changes: Any) -> Settings:
    defaults: dict[str, Any] = {
        "data": data,
        "temporal": temporal,
        "embeddings": None,
        "notes": True,
        "policy": policy(remind_seconds=None),
        "pace": Pace(attempt=timedelta(seconds=5), heartbeat=timedelta(seconds=2)),
    }
    return Settings(**(defaults | changes))


@dataclass
class Stack:
    """A client, its workers, and eyes on the database and the notes folder."""

    client: Client
    settings: Settings
    database: Database

    @property
    def ledger(self) -> LedgerStore:
        return LedgerStore(self.database, utc_now)

    @property
    def content(self) -> ContentStore:
        return ContentStore(self.database)

    async def propose(
        self, key: str, *actions: dict[str, Any], agent: str = "external", **more: Any
    ) -> Started:
        body = {"title": f"Do {key}", "actions": list(actions)} | more
        ref = await self.content.put("default", json.dumps(body).encode(), "application/json")
        return await submit(self.client, Request(agent=agent, key=key, body=ref), self.settings.temporal)

    async def digest(self, run: Started, number: int = 1) -> str:
        """The digest of the run's `number`-th intent, once it waits."""
        while True:
            status = await run.handle.query("status")
            if status["intents"] >= number and status["intent"] and status["state"] == "waiting":
                return str(status["intent"])
            await asyncio.sleep(0.01)

    async def answer(self, run: Started, kind: Kind, digest: str, **more: Any) -> Judged:
        message = {"digest": digest, "approver": "ann@example.test"} | more
        return await answer(self.client, run.workflow_id, kind, message, Pace().answer)

    async def approve(self, run: Started, number: int = 1) -> Judged:
        return await self.answer(run, Kind.APPROVE, await self.digest(run, number))

    async def events(self, run: Started) -> tuple[Event, ...]:
        return await self.ledger.of_run("default", run.workflow_id)

    async def types(self, run: Started) -> list[str]:
        return [event.type.value for event in await self.events(run)]

    def notes(self) -> list[str]:
        folder = self.settings.data / "notes" / "notes"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


ROLES = (Role.DECIDE, Role.INFER, Role.REMEMBER, Role.ACT)


@asynccontextmanager
async def stack_of(
    settings: Settings,
    parts: Parts | None = None,
    roles: tuple[Role, ...] = ROLES,
    telemetry: Telemetry | None = None,
) -> AsyncGenerator[Stack]:
    """All roles in this process, on one database."""
    migrated(settings.database_url)
    if settings.region_url is not None:
        migrated(settings.region_url)
    client = await connect(settings.temporal, codec_of(settings.sealing, settings.data), telemetry)
    if telemetry is not None:
        parts = replace(parts or Parts(), meter=telemetry.meter, tracer=telemetry.tracer)
    async with AsyncExitStack() as stack:
        database = stack.enter_context(stores(settings))
        for name in roles:
            await stack.enter_async_context(role(client, settings, name, parts))
        yield Stack(client, settings, database)


@pytest.fixture
async def stack(temporal: TemporalSettings, tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack_of(settings_for(temporal, tmp_path)) as made:
        yield made


def note(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {
        "connector": "null",
        "operation": "note",
        "arguments": {"text": text} | more,
        "title": f"Note {text}",
    }


def a_key() -> str:
    return uuid.uuid4().hex
