"""What routing adds to a call: `python -m scripts.bench router`.

One server that answers at once, in a process of its own; the contestants take turns on it at concurrency 1
and 50. *Policy only* filters, decides, and passes breaker and door; *as shipped* also holds the money, puts
the route on record, stores the answer and settles, all durable. Beside them the same request by a bare
httpx-aiohttp client, by plain httpx, and by LiteLLM's Router where it is installed. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from httpx_aiohttp import AiohttpTransport

from activities.services.cache import Cache, Scope, key_of, put_in
from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.ledger_store import LedgerStore
from activities.services.migrations import migrate
from activities.services.router import Answerer
from activities.services.routes import Routes
from activities.services.till import Till
from activities.tiers.base import Endpoint
from models.budget import Account, Budget
from models.inference import Answered, Call, Completion, DataClass, Inputs, Message, Params, Prompt, Task
from models.loop import Ref
from models.orders import RouteOrder
from models.routing import Snapshot, Telemetry, Wish, decide, needs_of
from models.settings import TierSettings

TASK = "bench.said"
QUESTION = "Say something about bicycles, in a sentence or two, for people who live nearby."
ANSWER = {
    "id": "x",
    "model": "instant-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 30, "completion_tokens": 1, "total_tokens": 31},
}
Once = Callable[[], Awaitable[None]]


class Instant(asyncio.Protocol):
    """HTTP as far as the contestants need it: every POST gets the same answer at once."""

    BODY = json.dumps(ANSWER).encode()
    SAID = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(BODY),
        BODY,
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing was read yet."""
        self._transport, self._read = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            head = self._read[:end].lower()
            _, _, length = head.partition(b"content-length:")
            size = end + 4 + int(length.split(b"\r\n", 1)[0] or 0)
            if len(self._read) < size:
                return
            self._read = self._read[size:]
            assert isinstance(self._transport, asyncio.Transport)
            self._transport.write(self.SAID)


async def serve() -> None:
    """Print the port and answer until the pipe to the parent closes."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Instant, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way of asking."""

    name: str
    once: Once


@dataclass(slots=True)
class Timed:
    """What one contestant took at one concurrency, over all turns."""

    milliseconds: list[float] = field(default_factory=list[float])
    per_second: list[float] = field(default_factory=list[float])

    def report(self) -> dict[str, float]:
        """Medians over turns and quantiles over requests."""
        cuts = quantiles(self.milliseconds, n=100)
        return {
            "p50_ms": round(median(self.milliseconds), 3),
            "p99_ms": round(cuts[98], 3),
            "per_second": round(median(self.per_second), 1),
        }


class Posted:
    """An endpoint that posts as the bare client does, so that only the router's own share differs."""

    name = "instant"

    def __init__(self, client: httpx.AsyncClient) -> None:
        """The client knows the address."""
        self._client = client

    async def complete(self, prompt: Prompt) -> Completion:
        """Post once."""
        said = await posted(self._client)
        usage = said["usage"]
        return Completion(
            text=said["choices"][0]["message"]["content"],
            finish="stop",
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            model=said["model"],
            milliseconds=0,
        )

    async def ready(self) -> bool:
        """Always."""
        return True

    async def aclose(self) -> None:
        """The client is closed by who made it."""


async def posted(client: httpx.AsyncClient) -> dict[str, Any]:
    """One chat completion."""
    body = {"model": "instant-1", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32}
    return (await client.post("/v1/chat/completions", json=body)).json()


class Paper:
    """Texts that are kept nowhere, for the line without a record."""

    async def text(self, tenant: str, ref: Ref) -> str:
        """The question."""
        return QUESTION

    async def put(self, tenant: str, data: bytes, media_type: str = "") -> Ref:
        """A name for anything."""
        return Ref(digest="0" * 64, size=len(data))


def said_task() -> Task:
    """One answer to the question."""

    def build(inputs: Inputs, params: Params) -> Prompt:
        return Prompt(messages=(Message(role="user", content=inputs["question"]),), max_tokens=32)

    def check(text: str, inputs: Inputs, params: Params) -> tuple[str, ...]:
        return ()

    return Task(TASK, "small", False, build, check)


TASKS = {TASK: said_task()}


def tiers(url: str) -> tuple[TierSettings, ...]:
    """Three to choose among; the server is behind the first."""
    priced: dict[str, Any] = {
        "price_per_million_input": Decimal("0.1"),
        "price_per_million_output": Decimal("0.3"),
        "currency": "EUR",
    }
    return tuple(
        TierSettings(name=name, kind="llama_cpp", url=url, concurrency=64, **priced)
        for name in ("instant", "standard", "large")
    )


def policy_only(url: str, client: httpx.AsyncClient) -> Once:
    """Filter, decide, breaker, door; no money, no record."""
    known = tiers(url)
    endpoints: dict[str, Endpoint] = {tier.name: Posted(client) for tier in known}
    answerer = Answerer(known, endpoints, TASKS, Paper())
    snapshot = Snapshot(tiers={tier.name: Telemetry() for tier in known})
    call = Call(task=TASK, inputs={"question": Ref(digest="0" * 64, size=1)})
    task = TASKS[TASK]

    async def once() -> None:
        inputs = {"question": QUESTION}
        needs = needs_of(task, call, task.build(inputs, {}), inputs)
        decision = decide(Wish(task=TASK, prefer="small", needs=needs), known, snapshot)
        decision.raise_refusal()
        await answerer.answer("default", call, decision.route.tiers[0])

    return once


async def as_shipped(url: str, client: httpx.AsyncClient, database: Database) -> Once:
    """The engines as the workers have them, on a database on disk."""
    known = tiers(url)
    content, ledger = ContentStore(database), LedgerStore(database, now)
    budgets = (Budget(amount="1000000", currency="EUR"),)
    endpoints: dict[str, Endpoint] = {tier.name: Posted(client) for tier in known}
    routes = Routes(known, TASKS, content, ledger, database=database, clock=now, budgets=budgets)
    answerer = Answerer(known, endpoints, TASKS, content, till=Till(database, now), clock=now)
    call = Call(task=TASK, inputs={"question": await content.put("default", QUESTION.encode())})

    async def once() -> None:
        event = uuid.uuid4().hex
        order = RouteOrder(
            tenant="default", workflow_id=f"bench-{event}", event_id=event, agent="bench", call=call
        )
        routed = await routes.route(order)
        await answerer.answer("default", call, routed.route.tiers[0], routed.grant)

    return once


def litellm_router(url: str) -> Once | None:
    """LiteLLM's Router on the same server, if somebody installed it beside us."""
    try:
        litellm: Any = importlib.import_module("litellm")
    except ImportError:
        return None
    parameters = {"model": "openai/instant-1", "api_base": f"{url}/v1", "api_key": "none"}
    router = litellm.Router(model_list=[{"model_name": "instant", "litellm_params": parameters}])

    async def once() -> None:
        await router.acompletion(model="instant", messages=[{"role": "user", "content": QUESTION}])

    return once


async def timed(once: Once, requests: int, concurrency: int, into: Timed) -> None:
    """Ask so many times, so many at once."""
    left = iter(range(requests))

    async def run() -> None:
        for _ in left:
            began = time.perf_counter()
            await once()
            into.milliseconds.append((time.perf_counter() - began) * 1000)

    began = time.perf_counter()
    await asyncio.gather(*(run() for _ in range(concurrency)))
    into.per_second.append(requests / (time.perf_counter() - began))


async def compared(
    contestants: Sequence[Contestant], requests: int, turns: int
) -> dict[str, dict[str, dict[str, float]]]:
    """All contestants in turn, several times over."""
    seen = {one.name: {1: Timed(), 50: Timed()} for one in contestants}
    for one in contestants:
        await timed(one.once, 50, 10, Timed())
    for _ in range(turns):
        for one in contestants:
            await timed(one.once, requests // 4, 1, seen[one.name][1])
            await timed(one.once, requests, 50, seen[one.name][50])
    return {
        name: {f"concurrency_{at}": times.report() for at, times in by.items()} for name, by in seen.items()
    }


def decided(url: str, times: int) -> dict[str, float]:
    """The pure decision alone."""
    known, task = tiers(url), TASKS[TASK]
    call = Call(task=TASK)
    account = Account(name="default/*/EUR/2026-05-04", currency="EUR", cap=10**12)
    snapshot = Snapshot(tiers={tier.name: Telemetry() for tier in known}, accounts=(account,))
    into = Timed(per_second=[0.0])
    for _ in range(times):
        began = time.perf_counter()
        inputs = {"question": QUESTION}
        needs = needs_of(task, call, task.build(inputs, {}), inputs)
        decide(Wish(task=TASK, prefer="small", needs=needs), known, snapshot)
        into.milliseconds.append((time.perf_counter() - began) * 1000)
    return {name: value for name, value in into.report().items() if name != "per_second"}


async def hits(database: Database, times: int) -> dict[str, float]:
    """An exact-cache hit, key included; whatever a process believes for a second, and reads again then."""
    cache = Cache(database, now)
    scope = Scope("default", DataClass.INTERNAL, None, "p" * 64, "instant", "instant-1", TASK)
    prompt = TASKS[TASK].build({"question": QUESTION}, {})
    answer = Answered(text=Ref(digest="0" * 64, size=1), tier="instant", model="instant-1")
    until = now() + timedelta(hours=1)
    await database.write(lambda link: put_in(link, key_of(scope, prompt), answer, TASK, until))
    into = Timed(per_second=[0.0])
    for _ in range(times):
        began = time.perf_counter()
        assert await cache.get(key_of(scope, prompt)) is not None
        into.milliseconds.append((time.perf_counter() - began) * 1000)
    return {name: value for name, value in into.report().items() if name != "per_second"}


def now() -> datetime:
    """The time."""
    return datetime.now(UTC)


async def bench(requests: int, turns: int) -> dict[str, Any]:
    """Everything, in one run."""
    async with AsyncExitStack() as stack:
        url = stack.enter_context(_server())
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
        contestants = [
            Contestant("bare httpx-aiohttp", _bare(fast)),
            Contestant("plain httpx", _bare(plain)),
            Contestant("policy only", policy_only(url, fast)),
            Contestant("as shipped", await as_shipped(url, fast, database)),
        ]
        litellm = litellm_router(url)
        if litellm is not None:
            contestants.append(Contestant("litellm router", litellm))
        lines = await compared(contestants, requests, turns)
        report: dict[str, Any] = {"requests": requests, "turns": turns, "lines": lines}
        report["added_p50_ms_at_1"] = _added(lines)
        report["decision_alone"] = decided(url, 3000)
        report["cache_hit"] = await hits(database, 3000)
        report["litellm"] = "in the lines" if litellm is not None else "not installed"
        return report


def _added(lines: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    bare = lines["bare httpx-aiohttp"]["concurrency_1"]["p50_ms"]
    ours = ("policy only", "as shipped")
    return {name: round(lines[name]["concurrency_1"]["p50_ms"] - bare, 3) for name in ours}


def _bare(client: httpx.AsyncClient) -> Once:
    async def once() -> None:
        await posted(client)

    return once


class _server:
    def __enter__(self) -> str:
        argv = [sys.executable, "-m", "scripts.bench.router", "--serve"]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        return f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def main(argv: list[str] | None = None) -> int:
    """Serve, or run and report."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench router", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="per turn at concurrency 50")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.serve:
        asyncio.run(serve())
        return 0
    print(json.dumps(asyncio.run(bench(given.requests, given.turns)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
