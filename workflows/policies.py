"""The one table of timeouts, retries and queues. Clients retry nothing; Temporal does, as said here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.common import Priority, RetryPolicy

from activities.actions import Actions
from activities.inference import Inference
from activities.memory import Memory
from activities.notices import Notices
from models.errors import TierUnavailable
from models.inference import Answered, Ask
from models.memory import Recall, Recalled
from models.notices import NoticeOrder, Told
from models.orders import Effect, EffectOrder, Pace, Planned, PlanOrder
from models.visibility import Queue, queue_of

T = TypeVar("T")

SOON = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_interval=timedelta(seconds=30))
"""Until it works or is final: the step is owed."""
TWICE = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_attempts=2)
"""For models: a worker that died is not the model's fault."""
ELSEWHERE = RetryPolicy(
    initial_interval=timedelta(seconds=1),
    maximum_attempts=2,
    non_retryable_error_types=[TierUnavailable.__name__],
)
"""While another tier is left: that one is the better second try for what this one did wrong."""
FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=20), timedelta(minutes=10)
"""Between rounds over all tiers, while every one of them is away."""
BOOKKEEPING = timedelta(hours=24)
"""A full disk or a locked database may take a person to mend; nothing is lost by waiting."""
SILENT = timedelta(seconds=5)
"""A worker that died while it held the stream of a flooded run keeps the answers behind it waiting."""


async def book(activity: Any, order: Any, summary: str | None = None) -> Any:
    """Run a short bookkeeping step as a local activity."""
    return await workflow.execute_local_activity_method(
        activity,
        order,
        schedule_to_close_timeout=BOOKKEEPING,
        start_to_close_timeout=timedelta(seconds=60),
        local_retry_threshold=timedelta(seconds=10),
        retry_policy=SOON,
        summary=summary,
    )


async def book_apart(activity: Any, order: Any, summary: str | None = None) -> Any:
    """The same as an activity, so that the task ends and what came meanwhile comes in a small one."""
    return await workflow.execute_activity_method(
        activity,
        order,
        schedule_to_close_timeout=BOOKKEEPING,
        start_to_close_timeout=timedelta(seconds=60),
        heartbeat_timeout=SILENT,
        retry_policy=SOON,
        summary=summary,
    )


async def dry_run(order: PlanOrder, pace: Pace, region: str | None) -> Planned:
    """Ask connectors what would happen."""
    return await workflow.execute_activity_method(
        Actions.plan,
        order,
        task_queue=queue_of(Queue.ACT, region),
        schedule_to_close_timeout=pace.effect,
        start_to_close_timeout=pace.read,
        heartbeat_timeout=pace.heartbeat,
        retry_policy=SOON,
        summary="dry run",
    )


async def notice(order: NoticeOrder, pace: Pace, region: str | None) -> Told:
    """Tell people on one channel, for as long as an effect may take."""
    return await workflow.execute_activity_method(
        Notices.notify,
        order,
        task_queue=queue_of(Queue.ACT, region),
        schedule_to_close_timeout=pace.effect,
        start_to_close_timeout=pace.read,
        retry_policy=SOON,
        summary=f"notice {order.round} on {order.channel}",
    )


async def effect(step: Any, order: EffectOrder, pace: Pace, region: str | None) -> Effect:
    """Apply, settle or undo. The attempt's own deadline lies within the start-to-close timeout."""
    return await workflow.execute_activity_method(
        step,
        order,
        task_queue=queue_of(Queue.ACT, region),
        schedule_to_close_timeout=pace.effect,
        start_to_close_timeout=pace.attempt + timedelta(seconds=30),
        heartbeat_timeout=pace.heartbeat,
        retry_policy=SOON,
        summary=f"action {order.action + 1} of {order.digest[:12]}",
    )


async def look(order: EffectOrder, pace: Pace, region: str | None) -> Effect:
    """See an effect as a reader would, for as long as `pace.verify`."""
    return await workflow.execute_activity_method(
        Actions.verify,
        order,
        task_queue=queue_of(Queue.ACT, region),
        schedule_to_close_timeout=pace.verify,
        start_to_close_timeout=pace.read,
        heartbeat_timeout=pace.heartbeat,
        retry_policy=SOON,
        summary="verify",
    )


async def search(recall: Recall, pace: Pace, region: str | None) -> Recalled:
    """Search memory."""
    return await workflow.execute_activity_method(
        Memory.recall,
        recall,
        task_queue=queue_of(Queue.REMEMBER, region),
        schedule_to_close_timeout=pace.effect,
        start_to_close_timeout=pace.read,
        heartbeat_timeout=pace.heartbeat,
        retry_policy=SOON,
        summary="recall",
    )


async def infer(ask: Ask, queue: str, pace: Pace, is_last: bool) -> Answered:
    """Put a call to one tier. A tier without a worker counts as failed after `pace.answer`."""
    return await workflow.execute_activity_method(
        Inference.answer,
        ask,
        task_queue=queue,
        schedule_to_start_timeout=pace.answer,
        start_to_close_timeout=pace.answer,
        heartbeat_timeout=pace.heartbeat,
        retry_policy=TWICE if is_last else ELSEWHERE,
        # Work waits here and not in a model server: the urgent first, and tenants in turn.
        priority=Priority(priority_key=ask.grant.priority, fairness_key=ask.tenant),
        summary=f"{ask.call.task} on {ask.tier}",
    )


def error_type(error: BaseException) -> str:
    """The Temporal error type behind an activity's failure; empty for time-outs and the like."""
    cause = getattr(error, "cause", None)
    return str(getattr(cause, "type", "") or "")


def error_text(error: BaseException) -> str:
    """What it says, for records and people."""
    cause = getattr(error, "cause", None) or error
    return str(getattr(cause, "message", "") or cause)[:300]


def numbers(count: int, without: Sequence[int]) -> tuple[int, ...]:
    """Positions of the actions that are still to be done."""
    return tuple(number for number in range(count) if number not in without)
