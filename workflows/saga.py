"""Carrying out an intent that passed: each action once, in order, and taken back when it must be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.actions import Actions
from models.ledger import EventType
from models.loop import Intent, Receipt, Status
from models.orders import Effect, Effected, EffectOrder
from workflows import policies
from workflows.journal import Journal

T = TypeVar("T")


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
        self._region = journal.request.region
        self._done: list[Receipt] = []
        self._cancelled = False

    async def run(self) -> Carried:
        """Apply everything, or end in a state that can be named; a cancellation waits for the step."""
        carried = await to_the_end(self._run(), self._cancel)
        if carried.status is None and self._cancelled:
            return Carried(Status.CANCELLED, f"cancelled; {carried.reason}")
        return carried

    def _cancel(self) -> None:
        self._cancelled = True

    async def _run(self) -> Carried:
        if self._journal.progress.undoing:
            return await self._go_on_undoing()
        for plan in self._intent.plans:
            if self._cancelled:
                return await self._stop(Effect(what=Effected.ABSENT, reason="cancelled"))
            effect = await self._apply(plan.action)
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
            effect = await policies.effect(Actions.apply, order, self._pace, self._region)
        except ActivityError as error:
            return await self._settled(order, error)
        if effect.receipt is None or effect.receipt.verified:
            return effect
        return await self._seen(order, effect)

    async def _settled(self, order: EffectOrder, error: ActivityError) -> Effect:
        """The attempts are over; say what is true, not what is likely."""
        reason = policies.error_text(error)
        try:
            effect = await policies.effect(Actions.settle, order, self._pace, self._region)
        except ActivityError as unclear:
            return Effect(what=Effected.IN_DOUBT, reason=f"{reason}; {policies.error_text(unclear)}"[:300])
        return effect if effect.what is Effected.APPLIED else effect.model_copy(update={"reason": reason})

    async def _seen(self, order: EffectOrder, effect: Effect) -> Effect:
        try:
            return await policies.look(order, self._pace, self._region)
        except ActivityError:
            return effect

    async def _stop(self, effect: Effect) -> Carried:
        match effect.what:
            case Effected.IN_DOUBT:
                return Carried(Status.IN_DOUBT, effect.reason, self._done)
            case Effected.DRIFTED:
                return await self._drifted(effect.reason, effect.rethink)
            case Effected.REFUSED:
                return await self._unwound(Status.STALE, effect.reason)
            case _:
                status = Status.CANCELLED if self._cancelled else Status.FAILED
                return await self._unwound(status, effect.reason)

    async def _drifted(self, reason: str, rethink: bool = False) -> Carried:
        """Before the first effect nothing is lost; after it, policy says what becomes of what was applied."""
        if self._done and not self._intent.gate.keep_partial:
            undone = await self._unwound(Status.STALE, f"drift: {reason}")
            if undone.status is Status.COMPENSATION_FAILED:
                return undone
            self._done = []
        kept = [receipt.model_dump(mode="json") for receipt in self._done]
        body: dict[str, Any] = {"reason": reason, "kept": kept}
        await self._log(EventType.DRIFT, body | ({"rethink": True} if rethink else {}))
        return Carried(None, reason, self._done)

    async def _unwound(self, status: Status, reason: str) -> Carried:
        """End with `status` if nothing stands, else keep or take back what was applied."""
        if not self._done:
            return Carried(status, reason)
        if self._intent.gate.keep_partial:
            return Carried(Status.PARTLY_EXECUTED, reason, self._done)
        actions = [receipt.action for receipt in self._done]
        await self._log(EventType.COMPENSATION, {"actions": actions, "reason": reason})
        return await self._compensate(reason)

    async def _go_on_undoing(self) -> Carried:
        """An earlier run of this request had begun to take things back; nothing is applied after that."""
        progress = self._journal.progress
        for action in progress.undoing:
            try:
                order = self._order(action)
                effect = await policies.effect(Actions.settle, order, self._pace, self._region)
            except ActivityError as error:
                return Carried(Status.COMPENSATION_FAILED, policies.error_text(error), self._done)
            if effect.receipt is not None:
                self._done.append(effect.receipt)
        return await self._compensate(progress.undo_reason)

    async def _compensate(self, reason: str) -> Carried:
        left = list(self._done)
        for receipt in reversed(self._done):
            try:
                order = self._order(receipt.action)
                effect = await policies.effect(Actions.undo, order, self._pace, self._region)
            except ActivityError as error:
                text = (
                    f"{reason}; action {receipt.action + 1} could not be undone: {policies.error_text(error)}"
                )
                return Carried(Status.COMPENSATION_FAILED, text[:300], left)
            if effect.what is not Effected.UNDONE:
                return Carried(Status.COMPENSATION_FAILED, f"{reason}; {effect.reason}"[:300], left)
            left.remove(receipt)
        return Carried(Status.COMPENSATED, reason)

    async def _log(self, kind: EventType, body: dict[str, Any]) -> None:
        """Write it down wherever the stream ends by now; the next step rests on it."""
        async with self._journal.writing():
            while not await self._journal.append((kind, {"digest": self._digest} | body)):
                if self._journal.progress.outcome is not None:
                    return

    def _order(self, action: int) -> EffectOrder:
        return EffectOrder(
            tenant=self._journal.request.tenant,
            workflow_id=self._journal.workflow_id,
            digest=self._digest,
            action=action,
        )


async def to_the_end(step: Coroutine[Any, Any, T], on_cancel: Callable[[], None] | None = None) -> T:
    """Await a step that a cancellation must not cut short, since something may have happened already."""
    task = asyncio.create_task(step)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
            workflow.logger.info("cancelled; finishing the step under way first")
            if on_cancel is not None:
                on_cancel()
    return task.result()
