"""The router as the bench asks it: deciding only, and with everything durable."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count, cycle
from typing import Any

import httpx

from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.ledger_store import LedgerStore
from activities.services.router import Answerer
from activities.services.routes import Routes
from activities.services.till import Till
from activities.tiers.base import Endpoint
from models.budget import Budget
from models.errors import TierUnavailable
from models.inference import Call, Inputs, Message, Params, Prompt, Task
from models.loop import Ref
from models.orders import Fell, Routed, RouteOrder
from models.routing import Snapshot, Telemetry, Wish, decide, needs_of
from models.settings import TierSettings
from scripts.bench._instant import QUESTION, Posted
from scripts.bench._turns import Once

TASK = "bench.said"
QUESTIONS = 64
"""Different texts in the content store, so that reads cannot be shared by luck."""


class Paper:
    """Texts that are kept nowhere, for the line without a record."""

    async def text(self, tenant: str, ref: Ref) -> str:
        """The question."""
        return QUESTION

    async def put(self, tenant: str, data: bytes, media_type: str = "", subject: str | None = None) -> Ref:
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


@dataclass(frozen=True, slots=True)
class Shipped:
    """The engines as the workers have them, on a database on disk."""

    routes: Routes
    answerer: Callable[[], Answerer]
    calls: Iterator[Call]
    names: Iterator[str]

    @classmethod
    async def on(cls, database: Database, endpoints: Mapping[str, Endpoint], url: str) -> Shipped:
        """With a budget, and the question in the content store."""
        known, content = tiers(url), ContentStore(database)
        budgets = (Budget(amount="1000000", currency="EUR"),)
        ledger = LedgerStore(database, now)
        routes = Routes(known, TASKS, content, ledger, database=database, clock=now, budgets=budgets)

        def answerer() -> Answerer:
            return Answerer(known, endpoints, TASKS, content, till=Till(database, now), clock=now)

        texts = [f"{QUESTION} Answer number {place}." for place in range(QUESTIONS)]
        asked = [await content.put("default", text.encode()) for text in texts]
        run = uuid.uuid4().hex
        return cls(
            routes,
            answerer,
            cycle([Call(task=TASK, inputs={"question": ref}) for ref in asked]),
            (f"{run}-{number}" for number in count()),
        )

    async def route(self) -> tuple[RouteOrder, Routed]:
        """A route of a run of its own, and its order."""
        event = next(self.names)
        order = RouteOrder(
            tenant="default",
            workflow_id=f"bench-{event}",
            event_id=event,
            agent="bench",
            call=next(self.calls),
        )
        return order, await self.routes.route(order)

    def once(self) -> Once:
        """Route, ask, settle."""
        answerer = self.answerer()

        async def once() -> None:
            order, routed = await self.route()
            await answerer.answer("default", order.call, routed.route.tiers[0], routed.grant)

        return once

    async def failed_over(self, answerer: Answerer) -> None:
        """The first tier fails, the fall goes on record, and the second one answers."""
        order, routed = await self.route()
        first, second = routed.route.tiers
        try:
            await answerer.answer("default", order.call, first, routed.grant)
        except TierUnavailable as error:
            fell = Fell(
                tenant="default",
                workflow_id=order.workflow_id,
                event_id=f"fell-{order.event_id}",
                task=TASK,
                tier=first,
                to=second,
                reason=error.message,
                kind="TierUnavailable",
                reservation=routed.grant.reservation,
            )
            await self.routes.fell(fell)
            await answerer.answer("default", order.call, second, routed.grant)


async def milliseconds(once: Once) -> float:
    """How long one takes."""
    began = time.perf_counter()
    await once()
    return (time.perf_counter() - began) * 1000


def now() -> datetime:
    """The time."""
    return datetime.now(UTC)
