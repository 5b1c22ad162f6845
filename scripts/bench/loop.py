"""The whole loop beside a bare workflow: `python -m scripts.bench loop --decisions 200 --concurrency 50`.

Ours runs through the product's own queues, one process per role, ledger on, scripted tier, null connector.
The floor is a Temporal workflow with five plain activities and one signal, on the same server with the same
flags. They take turns, five times each; each pair gives a ratio. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from sqlalchemy import select
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle

from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.ledger_store import EVENT
from activities.services.migrations import migrate
from models.ledger import EventType
from models.loop import GateRule, Request
from models.policy import AgentPolicy, Policy
from models.settings import Settings, TemporalSettings, TierSettings
from models.visibility import Role
from temporal import dev_server
from temporal.client import connect, submit

ROLES = (Role.DECIDE, Role.INFER, Role.REMEMBER, Role.ACT)
PAIRS = 5
BARE_PROCESSES = 2
"""One Python process uses one core; the floor shall have the machine too."""
SMALL, MEDIUM, LARGE = 200, 5_000, 15_000
"""Bytes of the body. A card that fits stands in the history whole; beyond its limit nothing may grow."""


@dataclass
class Waiting:
    """Runs that wait for their answer: an event and what is needed to give it."""

    events: dict[str, asyncio.Event] = field(default_factory=dict[str, asyncio.Event])
    digests: dict[str, str] = field(default_factory=dict[str, str])

    def tell(self, run_id: str, digest: str = "") -> None:
        """A run waits now."""
        self.digests[run_id] = digest
        self.event(run_id).set()

    def event(self, run_id: str) -> asyncio.Event:
        """Set once the run waits."""
        return self.events.setdefault(run_id, asyncio.Event())

    async def of(self, run_id: str, handle: WorkflowHandle[Any, Any]) -> str:
        """The digest of a run's intent, once it waits; a run that ended instead is an error."""
        try:
            await asyncio.wait_for(self.event(run_id).wait(), 60)
        except TimeoutError:
            raise RuntimeError(f"{run_id} does not wait: {await _state(handle)}") from None
        return self.digests[run_id]


@dataclass(frozen=True)
class Bench:
    """One server, all workers, and the client that drives them."""

    client: Client
    settings: Settings
    database: Database
    waiting: Waiting
    processes: dict[str, psutil.Process]

    async def ours(self, size: int = SMALL) -> tuple[float, WorkflowHandle[Any, Any]]:
        """One decision; seconds from approval to done."""
        key = uuid.uuid4().hex
        text = (key + " " + "words " * size)[:size]
        body = await ContentStore(self.database).put(
            "default", json.dumps({"text": text}).encode(), "application/json"
        )
        request = Request(agent="stub", key=key, body=body)
        started = await submit(self.client, request, self.settings.temporal)
        digest = await self.waiting.of(started.workflow_id, started.handle)
        began = time.perf_counter()
        message = {"digest": digest, "approver": "bench@localhost"}
        await started.handle.signal("approve", message)
        outcome = await started.handle.result()
        if outcome.status != "executed":
            raise RuntimeError(f"{started.workflow_id} ended as {outcome.status}: {outcome.reason}")
        return time.perf_counter() - began, started.handle

    async def bare(self, size: int = SMALL) -> tuple[float, WorkflowHandle[Any, Any]]:
        """One run of the floor; seconds from signal to done."""
        run_id = f"bare-{uuid.uuid4().hex}"
        handle = await self.client.start_workflow("bare", "x" * SMALL, id=run_id, task_queue="bare")
        await self.waiting.of(run_id, handle)
        began = time.perf_counter()
        await handle.signal("approve", "yes")
        await handle.result()
        return time.perf_counter() - began, handle

    def cpu(self) -> dict[str, float]:
        """CPU seconds of each process so far."""
        return {name: sum(process.cpu_times()[:2]) for name, process in self.processes.items()}


async def _state(handle: WorkflowHandle[Any, Any]) -> str:
    described = await handle.describe()
    if described.status is WorkflowExecutionStatus.RUNNING:
        return f"running, pending {described.raw_description.pending_activities}"
    try:
        return repr(await handle.result())
    except WorkflowFailureError as error:
        return repr(error.cause)


Run = Callable[[], Awaitable[tuple[float, WorkflowHandle[Any, Any]]]]


async def measure(bench: Bench, run: Run, decisions: int, concurrency: int) -> dict[str, Any]:
    """Run many; decisions/s, approval to done, CPU."""
    gate = asyncio.Semaphore(concurrency)

    async def one() -> float:
        async with gate:
            return (await run())[0]

    before, began = bench.cpu(), time.perf_counter()
    waits = sorted(await asyncio.gather(*(one() for _ in range(decisions))))
    took, after = time.perf_counter() - began, bench.cpu()
    spent = {name: round((after[name] - before[name]) / decisions * 1000, 1) for name in after}
    return {
        "decisions_per_second": round(decisions / took, 2),
        "approval_to_done_ms": {"p50": _ms(waits, 0.5), "p99": _ms(waits, 0.99)},
        "cpu_ms_per_decision": {"all": round(sum(spent.values()), 1)}
        | {name: value for name, value in spent.items() if value >= 0.5},
    }


async def histories(bench: Bench) -> dict[str, Any]:
    """Events and bytes of one history, with a small and with a large body."""
    sizes: dict[str, Any] = {}
    for name, size in (("small", SMALL), ("medium", MEDIUM), ("large", LARGE)):
        _, handle = await bench.ours(size)
        events = (await handle.fetch_history()).events
        sizes[name] = {
            "body_bytes": size,
            "events": len(events),
            "bytes": sum(event.ByteSize() for event in events),
        }
    events = (await (await bench.bare())[1].fetch_history()).events
    sizes["bare"] = {"events": len(events), "bytes": sum(event.ByteSize() for event in events)}
    return sizes


async def compare(bench: Bench, decisions: int, concurrency: int, pairs: int) -> dict[str, Any]:
    """Warm both up, then let them take turns."""
    for run in (bench.ours, bench.bare):
        await measure(bench, run, 20, 20)
    result: dict[str, Any] = {"pairs": []}
    for number in range(pairs):
        ours = await measure(bench, bench.ours, decisions, concurrency)
        print(f"pair {number + 1}: ours {ours['decisions_per_second']}/s", file=sys.stderr)
        bare = await measure(bench, bench.bare, decisions, concurrency)
        ratio = round(ours["decisions_per_second"] / bare["decisions_per_second"], 3)
        result["pairs"].append({"ours": ours, "bare": bare, "ratio": ratio})
        print(f"pair {number + 1} of {pairs}: ratio {ratio}", file=sys.stderr)
    result["ratio_median"] = median(pair["ratio"] for pair in result["pairs"])
    result["alone"] = {
        "ours": await measure(bench, bench.ours, 40, 1),
        "bare": await measure(bench, bench.bare, 40, 1),
    }
    result["history"] = await histories(bench)
    return result


@asynccontextmanager
async def prepared(folder: Path) -> AsyncGenerator[Bench]:
    """Server, database, workers; all ended afterwards."""
    settings = _settings(folder)
    migrate(settings.database_url)
    (folder / "settings.json").write_text(settings.model_dump_json())
    async with AsyncExitStack() as stack:
        server = _spawn(stack, dev_server.argv(dev_server.binary(), settings.temporal, folder), folder)
        await dev_server.wait_ready(settings.temporal, dev_server.search_attributes())
        driver = str(folder / "driver")
        waiting = Waiting()
        await stack.enter_async_context(_datagrams(driver, waiting))
        processes = {"temporal": server, "driver": psutil.Process()}
        arguments = (str(folder / "settings.json"), driver)
        for number, name in enumerate((*ROLES, *("bare",) * BARE_PROCESSES)):
            argv = (sys.executable, "-m", "scripts.bench._worker", str(name), *arguments)
            label = f"bare {number - len(ROLES) + 1}" if name == "bare" else str(name)
            processes[label] = _spawn(stack, argv, folder)
        await _exist(*(folder / "run" / f"{role}.ready" for role in ROLES), Path(f"{driver}.ready"))
        database = Database(settings.database_url)
        stack.callback(database.close)
        client = await connect(settings.temporal)
        watcher = asyncio.create_task(_watch(database, waiting))
        stack.callback(watcher.cancel)
        yield Bench(client, settings, database, waiting, processes)


def _settings(folder: Path) -> Settings:
    rule = AgentPolicy(connectors=("null",), gate=GateRule())
    tier = TierSettings(name="edge", kind="llama_cpp", url="http://127.0.0.1:9", concurrency=50)
    return Settings(
        data=folder,
        temporal=TemporalSettings(address=f"127.0.0.1:{_port()}", ui_port=_port()),
        tiers=(tier,),
        embeddings=None,
        notes=True,
        policy=Policy(agents={"stub": rule}),
    )


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _spawn(stack: AsyncExitStack, argv: tuple[str, ...], folder: Path) -> psutil.Process:
    with open(folder / f"{len(list(folder.glob('*.log')))}.log", "wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def end() -> None:
        process.terminate()
        process.wait()

    stack.callback(end)
    return psutil.Process(process.pid)


async def _exist(*paths: Path) -> None:
    while not all(path.exists() for path in paths):  # noqa: ASYNC110
        await asyncio.sleep(0.05)  # another process has no event to await


@asynccontextmanager
async def _datagrams(path: str, waiting: Waiting) -> AsyncGenerator[None]:
    """What bare workers tell."""
    socket_ = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    socket_.setblocking(False)
    socket_.bind(path)
    loop = asyncio.get_running_loop()

    def read() -> None:
        # The kernel keeps few of them, and a full queue would hold the floor's worker up.
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting.tell(socket_.recv(200).decode())

    loop.add_reader(socket_, read)
    try:
        yield
    finally:
        loop.remove_reader(socket_)
        socket_.close()
        os.unlink(path)


async def _watch(database: Database, waiting: Waiting) -> None:
    """Runs of ours wait once their intent stands in the ledger."""
    seen = 0
    with database.engine.connect() as link:
        while True:
            # By the primary key: whoever reads all of the log every few milliseconds measures himself.
            query = select(EVENT.c.seq, EVENT.c.stream, EVENT.c.type, EVENT.c.envelope).where(
                EVENT.c.log_id == Request.model_fields["tenant"].default, EVENT.c.seq > seen
            )
            for row in link.execute(query.order_by(EVENT.c.seq)):
                seen = row.seq
                if row.type == EventType.INTENT:
                    waiting.tell(row.stream, json.loads(row.envelope)["body"]["digest"])
            link.rollback()
            await asyncio.sleep(0.005)


def _ms(waits: list[float], quantile: float) -> float:
    return round(waits[min(len(waits) - 1, int(len(waits) * quantile))] * 1000, 1)


async def _main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with prepared(Path(folder)) as bench:
            result = await compare(bench, options.decisions, options.concurrency, options.pairs)
    about = {
        "benchmark": "loop",
        "decisions": options.decisions,
        "concurrency": options.concurrency,
        "cpus": os.cpu_count(),
    }
    print(json.dumps(about | result, indent=2))


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench loop")
    parser.add_argument("--decisions", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    asyncio.run(_main(parser.parse_args(argv)))
    return 0
