"""The router as a worker runs it: read the call, look around, decide, hold the money, put it on record.

Decision, reservation and record are one transaction, and the record is the decision: who comes again with the
same event id gets what stands there, whatever has changed since.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from sqlalchemy import Connection, bindparam, select

from activities.services.balances import Balances, body_of
from activities.services.breaker import Breakers, Sign
from activities.services.budget import BEGUN, Hold, expire_in, opened_in, pay_in, reserve_all_in
from activities.services.cache import Cache, Scope, key_of
from activities.services.content import JSON, ContentStore, put_here
from activities.services.database import Database
from activities.services.ledger_store import EVENT, LedgerStore, add_all_in, add_in
from activities.services.statements import Statement
from activities.services.together import together
from models.budget import Account, Budget, accounts_of, micros
from models.calibration import Odds
from models.canonical import canonical, digest_of, sha256
from models.errors import UnknownName
from models.inference import Grant, Needs, Prompt, Task, Weigh
from models.ledger import Draft, EventType, route_stream
from models.loop import Cost
from models.orders import Fell, Routed, RouteOrder
from models.routing import (
    Decision,
    Measured,
    Prefer,
    RoutePolicy,
    RouteRecord,
    Snapshot,
    Telemetry,
    Wish,
    averaged,
    decide,
    estimate,
    needs_of,
    price,
)
from models.settings import AS_IT_IS, TaskSettings, TierSettings
from models.tables import ModelCall, table
from models.visibility import infer_queue

CALL = table(ModelCall)
SEEN = 200
"""Calls of a task that its measurements rest on."""
SWEEP = timedelta(minutes=1)
"""How often leases that ran out are ended."""
ENOUGH = 20
"""Fewer answers say nothing of how many fail."""
FRESH = timedelta(seconds=10)
"""How long measurements are believed."""
FAULTS = frozenset({"TierUnavailable", "TimeoutError"})
"""Types of failure that speak of the tier."""


_STANDING = Statement(
    select(EVENT.c.envelope).where(EVENT.c.log_id == bindparam("log"), EVENT.c.event_id == bindparam("event"))
)


class Sensing(Protocol):
    """What is known of tiers right now."""

    async def of(self, task: str) -> Mapping[str, Telemetry]:
        """Telemetry by tier, for one task."""
        ...

    def fell(self, tier: str, kind: str) -> None:
        """A tier failed a call with this type of error."""
        ...


class Calibrated(Protocol):
    """What confidence is worth; `services.calibration.Calibrations` knows."""

    async def odds(self, tenant: str, task: str) -> Mapping[str, Odds]:
        """What may be relied on at one task, by model."""
        ...


class Measurements:
    """Telemetry from the calls on record, and from what failed in this process's sight."""

    def __init__(
        self,
        database: Database,
        tiers: Sequence[TierSettings],
        clock: Callable[[], datetime],
        breakers: Breakers | None = None,
    ) -> None:
        """Breakers given here are hints from fallbacks; the ones that decide stand beside the endpoints."""
        self._database = database
        self._tiers = tiers
        self._clock = clock
        self._breakers = breakers
        self._known: dict[str, tuple[datetime, Mapping[str, Telemetry]]] = {}

    async def of(self, task: str) -> Mapping[str, Telemetry]:
        """Averages of the last calls of the task, not older than `FRESH`."""
        now = self._clock()
        read, known = self._known.get(task, (None, {}))
        if read is None or now - read >= FRESH:
            known = await self._database.read(lambda link: self._measured(link, task))
            self._known[task] = (now, known)
        if self._breakers is None:
            return known
        return {name: self._hinted(name, one) for name, one in known.items()}

    def fell(self, tier: str, kind: str) -> None:
        """Count it, if the type speaks of the tier."""
        if self._breakers is not None and kind in FAULTS:
            self._breakers.of(tier).saw(Sign.FAULT)

    def _hinted(self, name: str, known: Telemetry) -> Telemetry:
        open_here = self._breakers is not None and self._breakers.of(name).is_open
        return known.model_copy(update={"suspended": True}) if open_here else known

    def _measured(self, link: Connection, task: str) -> Mapping[str, Telemetry]:
        tries = (CALL.c.task == task) & ~CALL.c.id.endswith(BEGUN)
        query = select(CALL).where(tries).order_by(CALL.c.called_at.desc()).limit(SEEN)
        rows = link.execute(query).all()
        return {
            tier.name: telemetry_of(tier, [row for row in rows if row.tier == tier.name])
            for tier in self._tiers
        }


def telemetry_of(tier: TierSettings, calls: Sequence[Any]) -> Telemetry:
    """What rows of `model_call` say of a tier for one task, newest first."""
    answered = [call for call in calls if call.model]
    if not calls or not answered:
        return Telemetry()
    seen = averaged(_cost(tier, call) for call in answered)
    times = sorted(call.milliseconds for call in answered)
    more: dict[str, int] = {"slow_milliseconds": times[len(times) * 19 // 20]}
    if len(calls) >= ENOUGH:
        more["escalated_permille"] = sum(not call.usable for call in calls) * 1000 // len(calls)
    measured = Measured.model_validate(seen.model_dump() | more)
    return Telemetry(model=answered[0].model, measured=measured)


@dataclass(frozen=True, slots=True)
class _Asked:
    order: RouteOrder
    wish: Wish
    known: Mapping[str, Telemetry]
    accounts: tuple[Account, ...]
    now: datetime

    @property
    def name(self) -> tuple[str, str]:
        """What the same order has again."""
        return self.order.tenant, self.order.event_id


class Routes:
    """Chooses tiers for tasks."""

    def __init__(
        self,
        tiers: Sequence[TierSettings],
        tasks: Mapping[str, Task],
        content: ContentStore,
        ledger: LedgerStore,
        *,
        database: Database | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        wanted: Mapping[str, TaskSettings] | None = None,
        budgets: Sequence[Budget] = (),
        sensing: Sensing | None = None,
        cache: Cache | None = None,
        calibrated: Calibrated | None = None,
    ) -> None:
        """Tiers in the order of the settings, tasks by name, and what settings want of tasks."""
        self._tiers = {tier.name: tier for tier in tiers}
        self._tasks = tasks
        self._content = content
        self._database = database or ledger._database  # pyright: ignore[reportPrivateUsage]
        self._clock = clock
        self._wanted = wanted or {}
        self._budgets = tuple(budgets)
        self._sensing: Sensing = sensing or Measurements(self._database, tiers, clock)
        self._cache = cache
        self._calibrated = calibrated
        self._policy = canonical(RoutePolicy.of(tiers).stored())
        self._digest = sha256(self._policy)
        self._swept = datetime.min.replace(tzinfo=UTC)
        self._kept: set[str] = set()
        """Tenants whose content store holds the policy."""

    async def route(self, order: RouteOrder) -> Routed:
        """Choose a tier and at most one fallback, hold what they may cost, and record every candidate.

        Raises:
            UnknownName: no such task.
            PolicyDenied: no tier may take the call.
            BudgetExceeded: none that a budget has room for.
            DeadlineMissed: none that can be expected to answer in time.
        """
        task = self._task(order.call.task)
        wanted = self._wanted.get(task.name, AS_IT_IS)
        prompt, needs = await self._needs(task, order, wanted)
        now = self._clock()
        asked = _Asked(
            order=order,
            wish=wish_of(task.name, task.prefer, needs, wanted, _draw(order)),
            known=await self._weighed(await self._known(task, wanted, order, prompt, needs), wanted, order),
            accounts=accounts_of(self._budgets, order.tenant, order.agent, now),
            now=now,
        )
        if asked.accounts and now - self._swept >= SWEEP:
            self._swept = now
            await self._database.write(lambda link: expire_in(link, now))
        record = await self._database.write(together(self._recorded, asked))
        self._kept.add(order.tenant)
        record.decision().raise_refusal()
        return self._routed(record, wanted, order)

    async def fell(self, fell: Fell) -> None:
        """Record that a tier failed and what is tried next."""
        self._sensing.fell(fell.tier, fell.kind)
        draft = _draft(fell.workflow_id, fell.event_id, EventType.FALLBACK, "router")
        body = {"task": fell.task, "tier": fell.tier, "to": fell.to, "reason": fell.reason}
        now = self._clock()

        def work(link: Connection) -> None:
            # Accounts before the ledger's head, as everywhere: rows locked the other way round may deadlock.
            if fell.to is None and fell.reservation is not None:
                pay_in(link, fell.tenant, fell.reservation, (), now, settle=True)
            add_in(link, fell.tenant, draft.model_copy(update={"body": body}), now)

        await self._database.write(work)

    async def _needs(self, task: Task, order: RouteOrder, wanted: TaskSettings) -> tuple[Prompt, Needs]:
        call, tenant = order.call, order.tenant

        texts = await asyncio.gather(*(self._content.text(tenant, ref) for ref in call.inputs.values()))
        inputs = dict(zip(call.inputs, texts, strict=True))
        prompt = task.build(inputs, call.params)
        return prompt, needs_of(task, call, prompt, inputs, wanted)

    async def _known(
        self, task: Task, wanted: TaskSettings, order: RouteOrder, prompt: Prompt, needs: Needs
    ) -> Mapping[str, Telemetry]:
        known = await self._sensing.of(task.name)
        seconds = task.cache_seconds if wanted.cache_seconds is None else wanted.cache_seconds
        if self._cache is None or seconds == 0:
            return known
        return {
            name: one.model_copy(update={"cached": await self._is_cached(name, one, order, prompt, needs)})
            for name, one in known.items()
        }

    async def _weighed(
        self, known: Mapping[str, Telemetry], wanted: TaskSettings, order: RouteOrder
    ) -> Mapping[str, Telemetry]:
        """With the calibration of each tier's model, where the task is one whose answers are weighed."""
        if self._calibrated is None or wanted.wrong_costs is None:
            return known
        odds = await self._calibrated.odds(order.tenant, order.call.task)
        return {
            name: one.model_copy(update={"odds": odds.get(one.model or "")}) for name, one in known.items()
        }

    async def _is_cached(
        self, tier: str, known: Telemetry, order: RouteOrder, prompt: Prompt, needs: Needs
    ) -> bool:
        if self._cache is None or known.model is None:
            return False
        scope = Scope(
            tenant=order.tenant,
            data_class=needs.data_class,
            region=needs.region,
            policy=self._digest,
            tier=tier,
            model=known.model,
            task=order.call.task,
            subject=order.call.subject,
        )
        return await self._cache.get(key_of(scope, prompt)) is not None

    def _recorded(self, link: Connection, asked: Sequence[_Asked]) -> list[RouteRecord]:
        """The routes that stand under the orders' event ids; made now where there is none."""
        records = dict[tuple[str, str], RouteRecord]()
        fresh = dict[tuple[str, str], _Asked]()
        for one in asked:
            standing = _standing(link, one.order)
            if standing is None:
                fresh.setdefault(one.name, one)
            else:
                records[one.name] = standing
        if fresh:
            records |= self._made(link, tuple(fresh.values()))
        return [records[one.name] for one in asked]

    def _made(self, link: Connection, fresh: Sequence[_Asked]) -> dict[tuple[str, str], RouteRecord]:
        balances = Balances(opened_in(link, [account for one in fresh for account in one.accounts]))
        records, holds, drafts = dict[tuple[str, str], RouteRecord](), list[Hold](), list[tuple[str, Draft]]()
        for one in fresh:
            record, draft, hold = self._decided(one, balances)
            records[one.name] = record
            drafts.append((one.order.tenant, draft))
            if hold is not None:
                holds.append(hold)
        now = max(one.now for one in fresh)
        reserve_all_in(link, holds, now)
        for tenant in {one.order.tenant for one in fresh} - self._kept:
            # It speaks of no request, and is what a route is explained by, wherever that was chosen.
            put_here(link, tenant, self._policy, JSON)
        add_all_in(link, drafts, now)
        return records

    def _decided(self, asked: _Asked, balances: Balances) -> tuple[RouteRecord, Draft, Hold | None]:
        """One decision, its event, and the money for it, which later decisions may not count on."""
        order = asked.order
        snapshot = Snapshot(tiers=dict(asked.known), accounts=balances.of(asked.accounts))
        decision = decide(asked.wish, tuple(self._tiers.values()), snapshot)
        seen = snapshot.model_dump(mode="json", exclude_defaults=True)
        record = self._record(asked, snapshot, decision, digest_of(seen))
        hold = None
        if record.reservation is not None:
            hold = _hold(asked, decision, record.reservation)
            balances.hold(hold)
        draft = _draft(order.workflow_id, order.event_id, EventType.ROUTE, order.agent)
        return record, draft.model_copy(update={"body": body_of(record, seen)}), hold

    def _record(self, asked: _Asked, snapshot: Snapshot, decision: Decision, digest: str) -> RouteRecord:
        within = asked.wish.needs.within_milliseconds
        deadline = None
        if within is not None and not decision.route.queued:
            deadline = asked.now + timedelta(milliseconds=within)
        return RouteRecord(
            route=decision.route,
            needs=asked.wish.needs,
            prefer=asked.wish.prefer,
            wrong=asked.wish.wrong,
            both=asked.wish.both,
            policy=self._digest,
            snapshot=snapshot,
            snapshot_digest=digest,
            refused_as=decision.refused_as,
            refusal=decision.refusal,
            holds=decision.holds,
            currency=decision.currency,
            reservation=asked.order.event_id if decision.holds is not None else None,
            deadline=deadline,
        )

    def _routed(self, record: RouteRecord, wanted: TaskSettings, order: RouteOrder) -> Routed:
        first = self._tiers.get(record.route.tiers[0])
        measured = record.snapshot.of(record.route.tiers[0]).measured
        return Routed(
            route=record.route,
            queues=tuple(infer_queue(name, record.needs.region) for name in record.route.tiers),
            estimated=estimate(record.needs, first, measured) if first is not None else Cost(),
            grant=Grant(
                reservation=record.reservation,
                deadline=record.deadline,
                priority=wanted.priority,
                weigh=_weigh(wanted, order),
                bar=record.route.bar,
                silent=tuple(one for one in record.route.tiers if record.snapshot.of(one).logprobs is False),
                similar=_similar(self._task(order.call.task), wanted, order),
            ),
        )

    def _task(self, name: str) -> Task:
        try:
            return self._tasks[name]
        except KeyError:
            known = ", ".join(sorted(self._tasks)) or "none"
            raise UnknownName(f"task: {name!r} is not registered; known: {known}") from None


def wish_of(task: str, prefer: Prefer, needs: Needs, wanted: TaskSettings, draw: int) -> Wish:
    """The wish behind a call. Those with a low draw are there to learn from: of one half the small tier's
    answer is taken however unsure it is, of the other half both tiers are asked.
    """
    if wanted.wrong_costs is None:
        return Wish(task=task, prefer=prefer, needs=needs)
    if draw < wanted.learn_permille:
        return Wish(task=task, prefer="small", needs=needs, both=draw % 2 == 1)
    wrong = micros(format(wanted.wrong_costs, "f"))
    return Wish(task=task, prefer=prefer, needs=needs, wrong=wrong)


def _draw(order: RouteOrder) -> int:
    """One of a thousand numbers, and always the same one for an order."""
    return int(sha256(order.event_id.encode())[:8], 16) % 1000


def _weigh(wanted: TaskSettings, order: RouteOrder) -> Weigh | None:
    if wanted.wrong_costs is None:
        return None
    return Weigh(workflow_id=order.workflow_id, route=order.event_id)


def _similar(task: Task, wanted: TaskSettings, order: RouteOrder) -> Weigh | None:
    if not task.read_only or wanted.similar_wrong_permille is None:
        return None
    return Weigh(workflow_id=order.workflow_id, route=order.event_id)


def _standing(link: Connection, order: RouteOrder) -> RouteRecord | None:
    rows = _STANDING.rows(link, {"log": order.tenant, "event": order.event_id})
    return RouteRecord.model_validate(json.loads(bytes(rows[0][0]))["body"]) if rows else None


def _hold(asked: _Asked, decision: Decision, reservation: str) -> Hold:
    order = asked.order
    return Hold(
        tenant=order.tenant,
        id=reservation,
        workflow_id=order.workflow_id,
        agent=order.agent,
        task=order.call.task,
        accounts={account.name: account.cap for account in asked.accounts},
        currency=decision.currency or "",
        worst=decision.holds or 0,
    )


def _cost(tier: TierSettings, call: Any) -> Cost:
    amount, currency = price(tier, call.prompt_tokens, call.completion_tokens)
    tokens = call.prompt_tokens + call.completion_tokens
    return Cost(amount=amount, currency=currency, milliseconds=call.milliseconds, tokens=tokens)


def _draft(workflow_id: str, event_id: str, kind: EventType, actor: str) -> Draft:
    return Draft(
        event_id=event_id,
        stream=route_stream(workflow_id),
        type=kind,
        actor_kind="system",
        actor_ref=actor,
        correlation_id=workflow_id,
    )
