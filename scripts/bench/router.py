"""What routing adds to a call: `python -m scripts.bench router`.

One server that answers at once, in a process of its own; the contestants take turns on it at concurrency 1
and 50. *Policy only* filters, decides, and passes breaker and door; *as shipped* also holds the money, puts
the route on record, stores the answer and settles, all durable. Beside them the same request by a bare
httpx-aiohttp client, by plain httpx, and by LiteLLM's Router, in a process of its own on the same server
(`make peers`). Then, alone: the decision, a cache hit, a failover, and the router's share of a call to the
bundled model. Prints one JSON object, with a verdict per goal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import AsyncExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from httpx_aiohttp import AiohttpTransport

from activities.services.cache import Cache, Scope, key_of, put_in
from activities.services.database import Database
from activities.services.migrations import migrate
from activities.tiers.base import Endpoint
from activities.tiers.llama_cpp import LlamaCpp
from activities.tiers.wire import http_client
from models.budget import Account
from models.inference import Answered, Call, Completion, DataClass, Prompt
from models.loop import Ref
from models.routing import Snapshot, Telemetry, Wish, decide, needs_of
from scripts.bench._contestants import TASK, TASKS, Shipped, milliseconds, now, policy_only, tiers
from scripts.bench._instant import QUESTION, REFUSED, Posted, instant_server, posted
from scripts.bench._turns import Contestant, Once, Seen, compared, lines, local, peer, ratios, spread

BARE, PLAIN, POLICY, SHIPPED, LITELLM = (
    "bare httpx-aiohttp",
    "plain httpx",
    "policy only",
    "as shipped",
    "litellm router",
)
FAILOVERS = 200
FLUSHES = 100
ASKED = 12
"""Calls to the bundled model."""


class Watched:
    """An endpoint whose time is kept apart from what is around it."""

    def __init__(self, inner: Endpoint) -> None:
        """Take the endpoint."""
        self._inner = inner
        self.milliseconds = 0.0

    @property
    def name(self) -> str:
        """As the endpoint's."""
        return self._inner.name

    async def complete(self, prompt: Prompt) -> Completion:
        """Pass on and look at the clock."""
        began = time.perf_counter()
        try:
            return await self._inner.complete(prompt)
        finally:
            self.milliseconds += (time.perf_counter() - began) * 1000

    async def ready(self) -> bool:
        """As the endpoint is."""
        return await self._inner.ready()

    async def aclose(self) -> None:
        """Close the endpoint."""
        await self._inner.aclose()


def decided(url: str, times: int) -> dict[str, float]:
    """The pure decision alone."""
    known, task = tiers(url), TASKS[TASK]
    call = Call(task=TASK)
    account = Account(name="default/*/EUR/2026-05-04", currency="EUR", cap=10**12)
    snapshot = Snapshot(tiers={tier.name: Telemetry() for tier in known}, accounts=(account,))
    seen: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        inputs = {"question": QUESTION}
        needs = needs_of(task, call, task.build(inputs, {}), inputs)
        decide(Wish(task=TASK, prefer="small", needs=needs), known, snapshot)
        seen.append((time.perf_counter() - began) * 1000)
    return spread(seen)


async def hits(database: Database, times: int) -> dict[str, float]:
    """An exact-cache hit, key included; whatever a process believes for a second, and reads again then."""
    cache = Cache(database, now)
    scope = Scope("default", DataClass.INTERNAL, None, "p" * 64, "instant", "instant-1", TASK)
    prompt = TASKS[TASK].build({"question": QUESTION}, {})
    answer = Answered(text=Ref(digest="0" * 64, size=1), tier="instant", model="instant-1")
    until = now() + timedelta(hours=1)
    await database.write(lambda link: put_in(link, key_of(scope, prompt), answer, TASK, until))

    async def once() -> None:
        assert await cache.get(key_of(scope, prompt)) is not None

    return spread([await milliseconds(once) for _ in range(times)])


async def failover(database: Database, url: str, client: httpx.AsyncClient) -> dict[str, Any]:
    """A call whose first tier refuses the connection, beside one that is answered at once."""
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{closed_port()}", transport=AiohttpTransport(trust_env=False)
    ) as away:
        gone = Posted(away)
        endpoints: dict[str, Endpoint] = {tier.name: Posted(client) for tier in tiers(url)}
        shipped = await Shipped.on(database, endpoints | {"instant": gone}, url)
        whole = (await Shipped.on(database, endpoints, url)).once()

        async def refused() -> None:
            try:
                await posted(away)
            except REFUSED:
                return

        fallen, straight, bare = list[float](), list[float](), list[float]()
        for _ in range(FAILOVERS):
            # Of its own, since after five of them the breaker would spare us the connection.
            answerer = shipped.answerer()
            fallen.append(await milliseconds(lambda: shipped.failed_over(answerer)))  # noqa: B023
            straight.append(await milliseconds(whole))
            bare.append(await milliseconds(refused))
    return {
        "calls": FAILOVERS,
        "failed_connections_per_call": gone.unreached / FAILOVERS,
        "failed_over_p50_ms": round(median(fallen), 3),
        "answered_at_once_p50_ms": round(median(straight), 3),
        "added_p50_ms": round(median(fallen) - median(straight), 3),
        "one_failed_connection_p50_ms": round(median(bare), 3),
    }


def flushed(folder: Path) -> dict[str, float]:
    """What the disk takes to make one page durable; a call as shipped waits for two commits."""
    seen: list[float] = []
    with (folder / "flushed").open("wb", buffering=0) as file:
        for _ in range(FLUSHES):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            seen.append((time.perf_counter() - began) * 1000)
    return spread(seen)


def closed_port() -> int:
    """A port that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def share(database: Database, data: Path) -> dict[str, Any]:
    """How much of a call to the bundled model is ours, with its own adapter and everything durable."""
    with bundled_model(data) as url:
        settings = tiers(url)[0]
        endpoint = Watched(LlamaCpp(settings, http_client(settings)))
        try:
            everywhere: dict[str, Endpoint] = {tier.name: endpoint for tier in tiers(url)}
            once = (await Shipped.on(database, everywhere, url)).once()
            await once()
            whole, ours = list[float](), list[float]()
            for _ in range(ASKED):
                before = endpoint.milliseconds
                whole.append(await milliseconds(once))
                # An answer that was cut off is asked for again: both belong to the model.
                ours.append(whole[-1] - (endpoint.milliseconds - before))
        finally:
            await endpoint.aclose()
    return {
        "calls": ASKED,
        "call_p50_ms": round(median(whole), 1),
        "router_p50_ms": round(median(ours), 2),
        "share_percent": round(sum(ours) / sum(whole) * 100, 2),
    }


@contextmanager
def bundled_model(data: Path) -> Generator[str]:
    """The address of the product's own model server; it is gone afterwards."""
    command = [sys.executable, "-m", "workers.model_server", "chat", "--port", "0", "--data", str(data)]
    command += ["--context", "1024", "--parent-pid", str(os.getpid())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = (line.split() for line in process.stderr)
            yield next(words[-1] for words in said if "listening" in words)
        finally:
            process.terminate()


async def bench(requests: int, turns: int) -> dict[str, Any]:
    """Everything, in one run."""
    async with AsyncExitStack() as stack:
        url = stack.enter_context(instant_server())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd())))
        migrate(f"sqlite:///{folder / 'bench.db'}")
        database = Database(f"sqlite:///{folder / 'bench.db'}")
        stack.callback(database.close)
        limits = httpx.Limits(max_connections=1000)
        transport = AiohttpTransport(trust_env=False, limits=limits)
        fast = await stack.enter_async_context(httpx.AsyncClient(base_url=url, transport=transport))
        plain = await stack.enter_async_context(
            httpx.AsyncClient(base_url=url, trust_env=False, limits=limits)
        )
        endpoints: dict[str, Endpoint] = {tier.name: Posted(fast) for tier in tiers(url)}
        contestants = [
            Contestant(BARE, local(_bare(fast))),
            Contestant(PLAIN, local(_bare(plain))),
            Contestant(POLICY, local(policy_only(url, fast))),
            Contestant(SHIPPED, local((await Shipped.on(database, endpoints, url)).once())),
        ]
        litellm = await stack.enter_async_context(peer("litellm_router.py", url))
        if litellm is not None:
            contestants.append(Contestant(LITELLM, litellm.turn))
        seen = await compared(contestants, requests, turns)
        alone = {
            "one_fsync": flushed(folder),
            "decision_alone": decided(url, 3000),
            "cache_hit": await hits(database, 3000),
            "failover": await failover(database, url, fast),
            "local_model": await share(database, folder),
        }
        report: dict[str, Any] = {"requests": requests, "turns": turns, "lines": lines(seen)} | alone
        report["litellm"] = litellm.version["litellm"] if litellm else "missing; install it with make peers"
        report["verdict"] = verdict(seen, report)
        return report


def verdict(seen: Seen, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal, what was measured, and whether that meets it."""
    at_once, fell = report["lines"][SHIPPED]["concurrency_1"], report["failover"]
    alone = report["decision_alone"]
    goals: list[dict[str, Any]] = [
        _goal("decision p50, at most 0.3 ms", alone["p50_ms"], alone["p50_ms"] <= 0.3),
        _goal("decision p99, at most 3 ms", alone["p99_ms"], alone["p99_ms"] <= 3),
        _goal(
            "as shipped adds at most 3 ms p50 at concurrency 1",
            at_once["added_p50_ms"],
            at_once["added_p50_ms"] <= 3,
        ),
        _goal(
            "cache hit p50 under 0.3 ms", report["cache_hit"]["p50_ms"], report["cache_hit"]["p50_ms"] < 0.3
        ),
        _goal(
            "failover: no more than one failed connection per call",
            fell["failed_connections_per_call"],
            fell["failed_connections_per_call"] <= 1,
        ),
        _goal(
            "under 2 % of a call to the bundled model",
            report["local_model"]["share_percent"],
            report["local_model"]["share_percent"] < 2,
        ),
    ]
    if LITELLM in seen:
        for ours, least in ((POLICY, 8), (SHIPPED, 4)):
            times = ratios(seen, ours, LITELLM, 50)
            # What no router can exceed in this run; on a busy machine it says more than the goal does.
            times["bare_client"] = ratios(seen, BARE, LITELLM, 50)["median"]
            name = f"{ours}: at least {least} times LiteLLM's requests per second at concurrency 50"
            goals.append(_goal(name, times, times["median"] >= least))
    return goals


def _goal(goal: str, measured: Any, met: bool) -> dict[str, Any]:
    return {"goal": goal, "measured": measured, "met": met}


def _bare(client: httpx.AsyncClient) -> Once:
    async def once() -> None:
        await posted(client)

    return once


def main(argv: list[str] | None = None) -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench router", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="per turn at concurrency 50")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args(argv)
    print(json.dumps(asyncio.run(bench(given.requests, given.turns)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
