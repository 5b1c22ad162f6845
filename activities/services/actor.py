"""The one place that touches targets: dry runs, effects, undoing. It believes the ledger and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from activities.connectors.base import Applied, Connector, Work
from activities.services.arguments import load_arguments
from activities.services.beliefs import stale_in
from activities.services.content import ContentStore, get_blob, put_blob
from activities.services.database import Database
from activities.services.jobs import (
    Job,
    applied_of,
    ended,
    held,
    intent_of,
    may_be_there,
    receipt_of,
    too_early,
    wait_for_clock,
    wait_for_earlier,
)
from activities.services.ledger_store import add_in, entries_in, hold_in
from activities.services.reservations import (
    Claimant,
    Clock,
    Held,
    Hold,
    Turn,
    close,
    confirm,
    confirmed,
    expected_version,
    look,
    reserve,
)
from models.canonical import derived_id
from models.errors import (
    ConnectorRejected,
    ConnectorUnavailable,
    InvalidInput,
    PolicyDenied,
    PreconditionLost,
    UnknownName,
)
from models.gate import Verdict, is_automatic, may_act, may_undo
from models.ledger import Draft, EventType, act_stream
from models.loop import Action, Intent, Plan, Receipt, Reversibility, action_key
from models.orders import Effect, Effected, EffectOrder, Planned, PlanOrder
from models.policy import OUTDATED, AgentPolicy, Policy, is_current, permit

DIFF = "text/x-diff; charset=utf-8"


class Actor:
    """Carries out what people countersigned, once."""

    def __init__(
        self,
        database: Database,
        connectors: Mapping[str, Connector],
        policy: Policy,
        attempt: timedelta,
        clock: Clock,
        doubt: Callable[[str, Verdict], str | None] = lambda tenant, verdict: None,
        witness: Callable[[str], Awaitable[None]] | None = None,
        in_force: Callable[[Connection, str, str], AgentPolicy] | None = None,
    ) -> None:
        """Take what it works with.

        Args:
            database: ledger, content and reservations.
            connectors: targets by name.
            policy: what agents may do.
            attempt: how long one attempt may go on before it may no longer send.
            clock: the time.
            doubt: why a recorded verdict of a tenant is not believed any more.
            witness: lets others see a tenant's ledger before something happens that cannot be taken back.
            in_force: a tenant's policy of an agent as it is now, where people may change what `policy` says.
        """
        self._in_force = in_force
        self._doubt, self._witness = doubt, witness
        self._database = database
        self._content = ContentStore(database)
        self._connectors = connectors
        self._policy = policy
        self._attempt = attempt
        self._clock = clock

    async def plan(self, order: PlanOrder) -> Planned:
        """Dry-run the numbered actions of a proposal.

        Raises:
            PolicyDenied: an action is outside the agent's policy.
            InvalidInput, UnknownName: the connector refuses the arguments or does not exist.
        """
        permit(self._policy.of(order.proposal.agent), order.proposal)
        return Planned(plans=tuple([await self._plan(order, number) for number in order.numbers]))

    async def apply(self, order: EffectOrder) -> Effect:
        """Do one action, unless it was done, or may not be done.

        Raises:
            ConnectorUnavailable: no answer; calling again is safe.
            ConnectorRejected: the target refused for good; nothing was done.
        """
        await self._show(order)
        job = await self._database.write(lambda link: self._open(link, order, undo=False))
        if isinstance(job, Effect):
            return job
        if job.stale is not None:
            return await self._drifted(job, job.stale, job.rethink)
        if job.barred is not None:
            effect = await self._find_out(job)
            absent = effect.what is Effected.ABSENT
            return Effect(what=Effected.REFUSED, reason=job.barred) if absent else effect
        if (known := ended(job)) is not None:
            return known
        found = await self._found(job)
        try:
            applied = found or await self._send(job)
        except PreconditionLost as error:
            wait_for_earlier(job, self._clock())
            return await self._drifted(job, error.message)
        except ConnectorRejected as error:
            await self._close_refused(job, error)
            raise
        return await self._confirmed(job, applied)

    async def verify(self, order: EffectOrder) -> Effect:
        """Look at an applied action as a reader of the target would.

        Raises:
            ConnectorUnavailable: it cannot be seen yet.
        """
        job = await self._database.read(lambda link: self._read(link, order, undo=False))
        return Effect(what=Effected.APPLIED, receipt=await self._verified(job, await self._receipt(order)))

    async def settle(self, order: EffectOrder) -> Effect:
        """Find out what became of an action that nobody will try again, and close its key.

        Raises:
            ConnectorUnavailable: too early to tell, or the target does not answer.
        """
        job = await self._database.write(lambda link: self._look(link, order))
        return job if isinstance(job, Effect) else await self._find_out(job)

    async def undo(self, order: EffectOrder) -> Effect:
        """Take an applied action back, once.

        Raises:
            ConnectorUnavailable: no answer; calling again is safe.
            ConnectorRejected: it cannot be taken back.
        """
        job = await self._database.write(lambda link: self._open(link, order, undo=True))
        if isinstance(job, Effect):
            return job
        receipt = await self._receipt(order)
        if (known := ended(job)) is not None:
            return known.model_copy(update={"what": Effected.UNDONE}) if known.receipt else known
        found = await self._found(job)
        try:
            applied = found or await self._guarded(job, self._take_back(job, applied_of(receipt)))
        except ConnectorRejected as error:
            await self._close_refused(job, error)
            raise
        kept = await self._keep_receipt(job, receipt_of(job, applied, verified=True))
        return Effect(what=Effected.UNDONE, receipt=kept)

    async def _show(self, order: EffectOrder) -> None:
        """Before anything is reserved: an attempt that cannot be witnessed is no attempt."""
        if self._witness is None:
            return
        try:
            job = await self._database.read(lambda link: self._read(link, order, undo=False))
        except (InvalidInput, PolicyDenied):
            return  # Opening it says so, and writes it down.
        if job.plan.reversibility is Reversibility.IRREVERSIBLE:
            await self._witness(order.tenant)

    async def _plan(self, order: PlanOrder, number: int) -> Plan:
        action = order.proposal.actions[number]
        connector = self._connector(action.connector)
        dry = await connector.plan(await self._work(order.tenant, action))
        diff = await self._database.write(
            lambda link: put_blob(link, order.tenant, dry.diff.encode(), DIFF, order.subject)
        )
        return Plan(
            action=number,
            connector=action.connector,
            operation=action.operation,
            target=dry.target,
            target_version=dry.version,
            diff=diff,
            reversibility=dry.reversibility,
            guarantee=connector.guarantee,
            undo=dry.undo,
            cost=dry.cost,
            changes=dry.changes,
        )

    def _connector(self, name: str) -> Connector:
        try:
            return self._connectors[name]
        except KeyError:
            known = ", ".join(sorted(self._connectors)) or "none"
            raise UnknownName(f"connector: {name!r} is not configured; known: {known}") from None

    async def _work(self, tenant: str, action: Action) -> Work:
        arguments = load_arguments(await self._content.get(tenant, action.arguments))
        return Work(action.operation, arguments, tenant)

    def _open(self, link: Connection, order: EffectOrder, undo: bool) -> Job | Effect:
        """Gate and reservation in one transaction, so that nothing can slip between them."""
        # SQLite has one writer. PostgreSQL has many, and shows each what others have committed meanwhile.
        hold_in(link, order.tenant)
        now = self._clock()
        try:
            job = self._read(link, order, undo)
            hold = look(link, job.who, now)
            untried = not undo and hold is None
            if untried:
                get_blob(link, order.tenant, job.intent.card_digest)  # What people read must stand as bound.
        except (InvalidInput, PolicyDenied) as error:
            return _refused(link, order, undo, error.message, now)
        wait_for_clock(job, now)
        reason = _refusal(link, job, undo, now, self._doubt)
        # Once an attempt was made its end must be found out, whatever verdicts and policy are worth by now.
        if reason is not None and hold is not None and _refusal(link, job, undo, now) is None:
            return replace(job, hold=hold, barred=reason[:200])
        if reason is not None:
            return _refused(link, order, undo, reason, now)
        if untried and self._is_outdated(link, job.intent, now):
            return replace(job, stale=OUTDATED)
        if untried and (changed := stale_in(link, job.intent)):
            return replace(job, stale=changed, rethink=True)
        hold = reserve(link, job.who, now)
        # Asked again, it says as much as the first time.
        rethink = hold.turn is Turn.DRIFTED and stale_in(link, job.intent) is not None
        return replace(job, hold=hold, rethink=rethink)

    def _is_outdated(self, link: Connection, intent: Intent, now: datetime) -> bool:
        agent, of = intent.proposer, self._in_force
        return not is_current(of(link, intent.tenant, agent) if of else self._policy.of(agent), intent, now)

    def _look(self, link: Connection, order: EffectOrder) -> Job | Effect:
        job, now = self._read(link, order, undo=False), self._clock()
        hold = look(link, job.who, now)
        # A key that nobody tried may only be closed by a run that was allowed to use it.
        if hold is None and (reason := _refusal(link, job, False, now, self._doubt)) is not None:
            return _refused(link, order, False, reason, now)
        return replace(job, hold=hold)

    def _read(self, link: Connection, order: EffectOrder, undo: bool) -> Job:
        intent = intent_of(get_blob(link, order.tenant, order.digest), order.digest)
        plan = next((plan for plan in intent.plans if plan.action == order.action), None)
        if plan is None or intent.workflow_id != order.workflow_id or intent.tenant != order.tenant:
            raise PolicyDenied(f"action {order.action} is not part of intent {order.digest[:12]}…")
        action = intent.proposal.actions[order.action]
        connector = self._connector(action.connector)
        arguments = load_arguments(get_blob(link, order.tenant, action.arguments.digest))
        return Job(
            order=order,
            intent=intent,
            plan=plan,
            work=Work(action.operation, arguments, order.tenant),
            connector=connector,
            expected=expected_version(link, intent, order.digest, plan),
            who=self._claimant(order, connector, undo),
        )

    def _claimant(self, order: EffectOrder, connector: Connector, undo: bool) -> Claimant:
        key = action_key(order.digest, order.action)
        return Claimant(
            tenant=order.tenant,
            workflow_id=order.workflow_id,
            key=f"{key}.undo" if undo else key,
            digest=order.digest,
            action=order.action,
            guarantee=connector.guarantee,
            attempt=self._attempt,
            settle=connector.settle,
            event=EventType.COMPENSATION if undo else EventType.APPLY,
        )

    async def _find_out(self, job: Job) -> Effect:
        if job.hold is not None and job.hold.turn not in (Turn.WAIT, Turn.ASK):
            return await self._truth(job, job.hold)
        if (found := await self._found(job)) is not None:
            return await self._confirmed(job, found)
        await self._close_alone(job, Held.CLOSED, job.barred or "no attempt was made, or none arrived")
        return Effect(what=Effected.ABSENT)

    async def _found(self, job: Job) -> Applied | None:
        """What an earlier attempt left at the target, if there may have been one."""
        if not may_be_there(job):
            return None
        found = await job.connector.find(job.who.key, job.work)
        if found is None and job.hold is not None and job.hold.turn is Turn.WAIT:
            raise too_early(job.hold.until, self._clock())
        return found

    async def _send(self, job: Job) -> Applied:
        if is_automatic(job.intent):
            await self._pass_anew(job)
        deadline = held(job).deadline
        return await self._guarded(job, job.connector.apply(job.who.key, job.work, job.expected, deadline))

    async def _pass_anew(self, job: Job) -> None:
        """Where nobody is asked, the class and the numbers that let it pass are not taken from the run.

        Raises:
            PreconditionLost: a dry run of now would not pass alone.
        """
        action, dry = job.intent.proposal.actions[job.order.action], await job.connector.plan(job.work)
        said = {
            "connector": action.connector,
            "operation": action.operation,
            "target": dry.target,
            "reversibility": dry.reversibility,
            "cost": dry.cost,
            "changes": dry.changes,
        }
        plans = [
            plan.model_copy(update=said) if plan.action == job.order.action else plan
            for plan in job.intent.plans
        ]
        if not is_automatic(job.intent.model_copy(update={"plans": tuple(plans)})):
            raise PreconditionLost(
                f"action {job.who.key} as it is planned now does not pass without a person"
            )

    async def _take_back(self, job: Job, applied: Applied) -> Applied:
        return await job.connector.undo(job.who.key, job.work, applied, held(job).deadline)

    async def _guarded(self, job: Job, sending: Any) -> Applied:
        """Stop sending at the deadline, whatever the connector does."""
        left = (held(job).deadline - self._clock()).total_seconds()
        try:
            async with asyncio.timeout(max(0.0, left)):
                return await sending
        except TimeoutError:
            raise ConnectorUnavailable(
                f"action {job.who.key}: no answer from {job.plan.connector} before the attempt's deadline"
            ) from None

    async def _confirmed(self, job: Job, applied: Applied) -> Effect:
        receipt = await self._keep_receipt(job, receipt_of(job, applied, verified=False))
        with suppress(ConnectorUnavailable):
            # It stands; that a reader cannot see it yet is the verify step's business.
            receipt = await self._verified(job, receipt)
        return Effect(what=Effected.APPLIED, receipt=receipt)

    async def _keep_receipt(self, job: Job, receipt: Receipt) -> Receipt:
        return await self._database.write(lambda link: confirm(link, job.who, receipt, self._clock()))

    async def _verified(self, job: Job, receipt: Receipt) -> Receipt:
        seen = await job.connector.verify(job.work, applied_of(receipt))
        return receipt.model_copy(update={"verified": True, "links": seen.links, "detail": seen.detail[:300]})

    async def _receipt(self, order: EffectOrder) -> Receipt:
        key = action_key(order.digest, order.action)
        done = await self._database.read(lambda link: confirmed(link, order.tenant, [key]))
        if key not in done:
            raise PolicyDenied(f"action {key} has no receipt; only what was applied can be undone")
        return done[key]

    async def _truth(self, job: Job, hold: Hold) -> Effect:
        if hold.turn is Turn.DOUBT:
            await self._close(job, Held.DOUBT, "the target cannot be asked")
        return ended(replace(job, hold=hold)) or Effect(what=Effected.IN_DOUBT)

    async def _close(self, job: Job, state: Held, reason: str) -> bool:
        return await self._database.write(
            lambda link: close(link, job.who, self._clock(), state, reason, job.hold)
        )

    async def _close_alone(self, job: Job, state: Held, reason: str) -> None:
        if not await self._close(job, state, reason):
            raise ConnectorUnavailable(f"action {job.who.key} is in other hands by now; asking again")

    async def _close_refused(self, job: Job, error: ConnectorRejected) -> None:
        wait_for_earlier(job, self._clock())
        await self._close_alone(job, Held.CLOSED, f"the target refused: {type(error).__name__}")

    async def _drifted(self, job: Job, reason: str, rethink: bool = False) -> Effect:
        await self._close_alone(job, Held.DRIFTED, f"drift: {reason[:200]}")
        return Effect(what=Effected.DRIFTED, reason=reason[:300], rethink=rethink)


def _refusal(
    link: Connection,
    job: Job,
    undo: bool,
    now: datetime,
    doubt: Callable[[str, Verdict], str | None] = lambda tenant, verdict: None,
) -> str | None:
    entries = entries_in(link, job.order.tenant, job.order.workflow_id)
    if undo:
        key = action_key(job.order.digest, job.order.action)
        applied = confirmed(link, job.order.tenant, [key])
        return may_undo(entries, job.order.digest, job.order.action) or (
            None if applied else "it has no receipt; only what was applied can be taken back"
        )
    tenant = job.order.tenant
    return may_act(entries, job.intent, job.order.digest, now, lambda verdict: doubt(tenant, verdict))


def _refused(link: Connection, order: EffectOrder, undo: bool, reason: str, now: datetime) -> Effect:
    """Say no, and write down that somebody asked."""
    key = action_key(order.digest, order.action) + (".undo" if undo else "")
    stream = act_stream(order.workflow_id)
    draft = Draft(
        event_id=derived_id("event", order.tenant, stream, EventType.REFUSAL, key, reason),
        stream=stream,
        type=EventType.REFUSAL,
        actor_kind="worker",
        actor_ref="act",
        correlation_id=order.workflow_id,
        body={"key": key, "digest": order.digest, "reason": reason[:300]},
    )
    add_in(link, order.tenant, draft, now)
    return Effect(what=Effected.REFUSED, reason=reason[:300])
