"""One stack of real processes on one dev server, kept alive while its workers fall where they are armed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import select
from temporalio.client import (
    Client,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.service import RPCError

from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.ledger_store import LedgerStore
from activities.services.migrations import migrate
from activities.services.vectors import EMBEDDING
from models.gate import Kind
from models.ledger import Event, EventType
from models.loop import GateRule, Outcome, Ref, Request, Status
from models.orders import Pace
from models.policy import AgentPolicy, Policy
from models.settings import Settings, SiteSettings, TemporalSettings, TierSettings
from models.visibility import Role
from scripts.chaos.cases import ASKED, BLIND, NULL, OPPOSITE, SITE, Case, Story
from scripts.chaos.hooks import Hit, How
from scripts.chaos.worker import arms_of
from scripts.supervisor import LEASH
from temporal import dev_server
from temporal.client import answer, connect, submit
from workers.compose import utc_now

POLL = 0.05
ATTEMPT = timedelta(seconds=3)
SIZES = {Role.DECIDE: 3, Role.ACT: 3, Role.INFER: 2, Role.REMEMBER: 1, Role.DESK: 1}
"""Processes per role; several, so that one can take over while another is stopped."""
AT_ONCE = 60
"""Runs under way; a worker that falls takes all of its own with it, and they try again together."""
ROUNDS = 3
LONGEST_STOP = timedelta(seconds=8)
"""A stopped process may hold the database's lock, and then nobody can finish before it is woken."""


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def temporal_at(port: int, ui_port: int) -> TemporalSettings:
    """A dev server, with time-outs short enough for many falls."""
    return TemporalSettings(
        address=f"127.0.0.1:{port}",
        ui_port=ui_port,
        managed=False,
        task_timeout=timedelta(seconds=2),
        sticky_timeout=timedelta(seconds=1),
    )


def settings_for(temporal: TemporalSettings, data: Path, site_port: int) -> Settings:
    """Every connector, two scripted tiers, short deadlines."""
    rule = AgentPolicy(connectors=(NULL, SITE, ASKED, BLIND), gate=GateRule(remind_seconds=None))
    address = f"http://127.0.0.1:{site_port}"
    tier = TierSettings(name="small", kind="llama_cpp", url="http://127.0.0.1:1")
    return Settings(
        data=data,
        temporal=temporal,
        embeddings=None,
        notes=True,
        policy=Policy(agents={"external": rule, "stub": rule}),
        tiers=(tier, tier.model_copy(update={"name": "large"})),
        sites=(
            SiteSettings(
                name=SITE,
                repository=Path("site.git"),
                build=Path("public"),
                address=address,
                engine="plain",
            ),
        ),
        pace=Pace(
            attempt=ATTEMPT,
            heartbeat=timedelta(seconds=2),
            answer=timedelta(seconds=60),
            read=timedelta(seconds=4),
        ),
    )


class Server:
    """A dev server on a file database, which can be killed and started again."""

    def __init__(self, settings: TemporalSettings, data: Path) -> None:
        """Starts nothing yet."""
        self._settings = settings
        self._data = data
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start, and wait until it takes work."""
        self._launch()
        await dev_server.wait_ready(self._settings, dev_server.search_attributes())

    def _launch(self) -> None:
        program = dev_server.argv(dev_server.binary(), self._settings, self._data)
        argv = (sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), "--", *program)
        with open(self._data / "temporal.log", "ab") as log:
            # A session of its own: a group that loses its parent while one of it is stopped is hung up on.
            self._process = subprocess.Popen(
                argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def kill(self) -> None:
        """SIGKILL it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Workers:
    """Worker processes, each started again as soon as it has ended."""

    def __init__(self, process: asyncio.subprocess.Process, fallen: Callable[[int], Awaitable[None]]) -> None:
        """`fallen` is awaited between a worker's end and its next start."""
        self._process = process
        self._fallen = fallen
        self._roles: dict[int, Role] = {}
        self._spare: set[int] = set()
        self.ended = 0

    def start(self, name: Role) -> None:
        """One more of a role."""
        if self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(f"start {name}\n".encode())

    def of_role(self, name: Role) -> list[int]:
        """The processes that are a role now."""
        return sorted(pid for pid, known in self._roles.items() if known is name)

    def stand_in(self, pid: int) -> None:
        """Start another of the same role for one that is stopped, which is then one too many."""
        if pid not in self._spare and pid in self._roles:
            self._spare.add(pid)
            self.start(self._roles[pid])

    async def watch(self) -> None:
        """Until the nursery ends."""
        if self._process.stdout is None:
            return
        async for line in self._process.stdout:
            word, *rest = line.decode().split()
            if word == "started":
                self._roles[int(rest[1])] = Role(rest[0])
                continue
            pid = int(rest[0])
            self.ended += 1
            await self._fallen(pid)
            name = self._roles.pop(pid)
            if pid not in self._spare:
                self.start(name)

    async def end(self) -> None:
        """End them all."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()


class Chaos:
    """Runs cases on one stack until each has ended."""

    def __init__(self, settings: Settings, client: Client, database: Database) -> None:
        """Eyes on ledger and targets; the workers are started by `stack`."""
        self.settings = settings
        self.client = client
        self.database = database
        self.ledger = LedgerStore(database, utc_now)
        self.arms = arms_of(settings)
        self.workers: Workers | None = None
        self.cases: dict[str, Case] = {}
        self.woken: set[Hit] = set()
        """Stopped, and woken after the run had ended without it."""
        self.by_update = False
        """Answer by update instead of by signal."""
        self.between: Callable[[], Awaitable[None]] | None = None
        """What else happens between a fall and the next start."""
        self._updates: list[asyncio.Task[None]] = []
        self._seen = 0
        self._wakes: dict[Hit, asyncio.Task[None]] = {}
        self._results: dict[str, asyncio.Task[Outcome]] = {}

    async def run(self, cases: Sequence[Case], at_once: int = AT_ONCE) -> Mapping[str, Outcome]:
        """Arm, submit, answer, wake what was stopped; returns outcomes by run."""
        turn = asyncio.Semaphore(at_once)
        for case in cases:
            self.cases[case.workflow_id] = case
            if case.boundary:
                self.arms.arm(case.workflow_id, case.boundary, case.how)
            self._results[case.workflow_id] = asyncio.create_task(self._one(case, turn))
        await self._until(lambda: all(task.done() for task in self._results.values()))
        await self._until(lambda: all(task.done() for task in self._wakes.values()))
        for task in self._wakes.values():
            task.result()
        return {case.workflow_id: self._results[case.workflow_id].result() for case in cases}

    async def run_all(self, cases: Sequence[Case], rounds: int = ROUNDS) -> Mapping[str, Outcome]:
        """Run cases, and once more those whose boundary was never reached since a neighbour fell first."""
        outcomes = dict(await self.run(cases))
        for number in range(1, rounds):
            missed = self.missed()
            for case in missed:
                self.arms.disarm(case.workflow_id, case.boundary)
            again = [replace(case, key=f"{case.key}-{number}") for case in missed]
            outcomes |= await self.run(again, at_once=max(1, AT_ONCE // 10**number))
        return outcomes

    def missed(self) -> list[Case]:
        """Cases whose boundary nobody reached."""
        cases = self.cases.values()
        return [case for case in cases if self.arms.is_waiting(case.workflow_id, case.boundary)]

    def forget_updates(self) -> None:
        """Ask no more for what was asked by update."""
        for task in self._updates:
            task.cancel()

    async def answer(self, run: str, kind: Kind, digest: str) -> None:
        """Send a verdict as a signal."""
        message = {"digest": digest, "approver": "ann@example.test"}
        await _insist(lambda: self.client.get_workflow_handle(run).signal(kind.value, message))

    async def fallen(self, pid: int) -> None:
        """While nobody has taken over yet, send the opposite of the answer under way."""
        for hit in self.arms.hits():
            if hit.pid == pid and hit.how is How.KILL:
                if self.between is not None:
                    await self.between()
                await self._oppose(hit.run)

    async def digest(self, run: str) -> str | None:
        """The last intent of a run."""
        events = await self.ledger.of_run(self.settings.tenant, run)
        found = [event.body["digest"] for event in events if event.type is EventType.INTENT]
        return str(found[-1]) if found else None

    async def indexed(self) -> list[str]:
        """Memories that have a vector."""
        rows = await self.database.read(lambda link: link.execute(select(EMBEDDING.c.record_id)).all())
        return sorted(str(row.record_id) for row in rows)

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            for event in await self._news():
                await self._react(event)
            self._wake()
            await asyncio.sleep(POLL)

    async def _news(self) -> tuple[Event, ...]:
        events = await self.ledger.tail(self.settings.tenant, 100_000, self._seen)
        self._seen = events[-1].seq if events else self._seen
        return events

    async def _react(self, event: Event) -> None:
        case = self.cases.get(event.correlation_id)
        if case is None or event.type is not EventType.INTENT:
            return
        if case.story is Story.DRIFTED and event.body["number"] == 1:
            (self.settings.data / "notes" / "targets" / case.key).write_text("changed meanwhile")
        digest = str(event.body["digest"])
        if self.by_update:
            self._updates.append(asyncio.create_task(self._update(case, digest)))
            return
        await self.answer(case.workflow_id, case.answer, digest)

    async def _update(self, case: Case, digest: str) -> None:
        message = {"digest": digest, "approver": "ann@example.test"}
        with suppress(RPCError, WorkflowUpdateRPCTimeoutOrCancelledError):
            await answer(self.client, case.workflow_id, case.answer, message, timedelta(seconds=60))

    async def _oppose(self, run: str) -> None:
        case = self.cases.get(run)
        digest = await self.digest(run) if case is not None and case.opposite else None
        if case is not None and digest is not None:
            await self.answer(run, OPPOSITE[case.answer], digest)

    def _wake(self) -> None:
        for hit in self.arms.hits():
            if hit.how is How.STOP and hit not in self._wakes:
                self._wakes[hit] = asyncio.create_task(self._rouse(hit, utc_now()))

    async def _rouse(self, hit: Hit, since: datetime) -> None:
        """Let others take over, and wake the stopped process when its deadline is past."""
        if self.workers is not None:
            self.workers.stand_in(hit.pid)
        await self._oppose(hit.run)
        past = since + ATTEMPT + timedelta(seconds=0.5)
        result = self._results[hit.run]
        while utc_now() <= past or not (result.done() or utc_now() > since + LONGEST_STOP):  # noqa: ASYNC110
            await asyncio.sleep(POLL)
        if result.done():
            self.woken.add(hit)
        # It may have been killed meanwhile, by a boundary of its own that another thread had reached.
        with suppress(ProcessLookupError):
            os.kill(hit.pid, signal.SIGCONT)
        while not self.arms.has_woken(hit) and _lives(hit.pid):  # noqa: ASYNC110 - another process
            await asyncio.sleep(POLL)
        with suppress(ProcessLookupError):
            os.kill(hit.pid, signal.SIGKILL)

    async def _one(self, case: Case, turn: asyncio.Semaphore) -> Outcome:
        async with turn:
            body = case.key if case.story is Story.WHOLE else await self._stored(case)
            request = Request(agent=case.agent, key=case.key, body=body)
            started = await submit(self.client, request, self.settings.temporal)
            return await _result(started.handle)

    async def _stored(self, case: Case) -> Ref:
        data = json.dumps(case.body()).encode()
        return await ContentStore(self.database).put(self.settings.tenant, data, "application/json")


@asynccontextmanager
async def stack(settings: Settings, sizes: Mapping[Role, int] = SIZES) -> AsyncGenerator[Chaos]:
    """All roles as processes, for a server that is up."""
    migrate(settings.database_url)
    file = settings.data / "chaos.json"
    file.write_text(settings.model_dump_json())
    database = Database(settings.database_url)
    chaos = Chaos(settings, await connect(settings.temporal), database)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "scripts.chaos.worker", str(file)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
        start_new_session=True,
    )
    chaos.workers = workers = Workers(process, chaos.fallen)
    for name, count in sizes.items():
        for _ in range(count):
            workers.start(name)
    watching = asyncio.create_task(workers.watch())
    try:
        yield chaos
    finally:
        await workers.end()
        await watching
        database.close()


async def _result(handle: WorkflowHandle[object, Outcome]) -> Outcome:
    while True:
        try:
            return await handle.result()
        except RPCError:
            # The server is away; it comes back.
            await asyncio.sleep(POLL)
        except WorkflowFailureError as error:
            reason = f"the workflow failed: {error.cause}"
            return Outcome(status=Status.FAILED, workflow_id=handle.id, reason=reason)


async def _insist(call: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            return await call()
        except RPCError as error:
            if error.status.name == "NOT_FOUND":
                # The run has ended; its ledger says how.
                return
            await asyncio.sleep(POLL)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
