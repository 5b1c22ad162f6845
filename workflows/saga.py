"""Carrying out an intent that passed: each action once, in order, and taken back when it must be."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.actions import Actions
from models.ledger import EventType
from models.loop import Intent, Receipt, Status
from models.orders import Effect, Effected, EffectOrder
from workflows import policies
from workflows.journal import Journal


@dataclass(slots=True)
class Carried:
    """What became of an intent. `status` is `None` when the rest needs a new one."""

    status: Status | None
    reason: str = ""
    receipts: list[Receipt] = field(default_factory=list[Receipt])


class Saga:
    """One intent's actions."""

    def __init__(self, journal: Journal, intent: Intent, digest: str) -> None:
        """The intent has passed its gate."""
        self._journal = journal
        self._intent = intent
        self._digest = digest
        self._pace = journal.admitted.pace
        self._done: list[Receipt] = []
        self._cancelled = False

    async def run(self) -> Carried:
        """Apply everything, or end in a state that can be named."""
        for plan in self._intent.plans:
            if self._cancelled:
                return await self._stop(Effect(what=Effected.ABSENT, reason="cancelled"))
            effect = await self._to_the_end(self._apply(plan.action))
            if effect.receipt is not None and effect.what is Effected.APPLIED:
                self._done.append(effect.receipt)
            else:
                return await self._stop(effect)
        unseen = [receipt.action + 1 for receipt in self._done if not receipt.verified]
        reason = f"applied, but not yet seen by a reader: action {unseen}" if unseen else ""
        return Carried(Status.EXECUTED, reason, self._done)

    async def _apply(self, action: int) -> Effect:
        order = self._order(action)
        try:
            effect = await policies.effect(Actions.apply, order, self._pace)
        except ActivityError as error:
            return await self._settled(order, error)
        if effect.receipt is None or effect.receipt.verified:
            return effect
        return await self._seen(order, effect)

    async def _settled(self, order: EffectOrder, error: ActivityError) -> Effect:
        """The attempts are over; say what is true, not what is likely."""
        reason = policies.error_text(error)
        try:
            effect = await policies.effect(Actions.settle, order, self._pace)
        except ActivityError as unclear:
            return Effect(what=Effected.IN_DOUBT, reason=f"{reason}; {policies.error_text(unclear)}"[:300])
        return effect if effect.what is Effected.APPLIED else effect.model_copy(update={"reason": reason})

    async def _seen(self, order: EffectOrder, effect: Effect) -> Effect:
        try:
            return await policies.look(order, self._pace)
        except ActivityError:
            return effect

    async def _stop(self, effect: Effect) -> Carried:
        match effect.what:
            case Effected.IN_DOUBT:
                return Carried(Status.IN_DOUBT, effect.reason, self._done)
            case Effected.DRIFTED:
                return await self._drifted(effect.reason)
            case Effected.REFUSED:
                return await self._unwound(Status.STALE, effect.reason)
            case _:
                status = Status.CANCELLED if self._cancelled else Status.FAILED
                return await self._unwound(status, effect.reason)

    async def _drifted(self, reason: str) -> Carried:
        """Before the first effect nothing is lost; after it, policy says what becomes of what was applied."""
        if self._done and not self._intent.gate.keep_partial:
            undone = await self._unwound(Status.STALE, f"drift: {reason}")
            if undone.status is Status.COMPENSATION_FAILED:
                return undone
            self._done = []
        body = {
            "digest": self._digest,
            "reason": reason,
            "kept": [receipt.model_dump(mode="json") for receipt in self._done],
        }
        async with self._journal.writing():
            await self._journal.append((EventType.DRIFT, body))
        return Carried(None, reason, self._done)

    async def _unwound(self, status: Status, reason: str) -> Carried:
        """End with `status` if nothing stands, else keep or take back what was applied."""
        if not self._done:
            return Carried(status, reason)
        if self._intent.gate.keep_partial:
            return Carried(Status.PARTLY_EXECUTED, reason, self._done)
        return await self._to_the_end(self._compensate(reason))

    async def _compensate(self, reason: str) -> Carried:
        actions = [receipt.action for receipt in self._done]
        body = {"digest": self._digest, "actions": actions, "reason": reason}
        async with self._journal.writing():
            await self._journal.append((EventType.COMPENSATION, body))
        left = list(self._done)
        for receipt in reversed(self._done):
            try:
                effect = await policies.effect(Actions.undo, self._order(receipt.action), self._pace)
            except ActivityError as error:
                text = (
                    f"{reason}; action {receipt.action + 1} could not be undone: {policies.error_text(error)}"
                )
                return Carried(Status.COMPENSATION_FAILED, text[:300], left)
            if effect.what is not Effected.UNDONE:
                return Carried(Status.COMPENSATION_FAILED, f"{reason}; {effect.reason}"[:300], left)
            left.remove(receipt)
        return Carried(Status.COMPENSATED, reason)

    async def _to_the_end(self, step: Coroutine[Any, Any, Any]) -> Any:
        """A cancellation waits until the step under way has said what happened."""
        task = asyncio.create_task(step)
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                if task.cancelled():
                    raise
                self._cancelled = True
                workflow.logger.info("cancelled while acting; finishing the step first")
        return task.result()

    def _order(self, action: int) -> EffectOrder:
        return EffectOrder(
            tenant=self._journal.request.tenant,
            workflow_id=self._journal.workflow_id,
            digest=self._digest,
            action=action,
        )
