"""Connecting, starting runs and answering intents: what every channel does, in one place."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.common import (
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.converter import PayloadCodec
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from models.errors import InvalidInput
from models.gate import Judged, Kind
from models.loop import Outcome, Request, body_digest, workflow_id
from models.settings import TemporalSettings
from models.visibility import MEMO_BODY, Attribute, Queue, State, queue_of
from temporal.plugin import CountersignPlugin

if TYPE_CHECKING:
    # It brings exporters, which most processes have no use for.
    from temporal.telemetry import Telemetry

T = TypeVar("T")
AGAIN = 0.05
"""Seconds after which an update is sent again that was lost with its task."""


@dataclass(frozen=True, slots=True)
class Started:
    """A run that was started, or found, for a request."""

    workflow_id: str
    handle: WorkflowHandle[Any, Outcome]


async def connect(
    settings: TemporalSettings, codec: PayloadCodec | None = None, telemetry: Telemetry | None = None
) -> Client:
    """Connect with everything a client of ours needs; its workers seal by the same codec."""
    return await Client.connect(
        settings.address,
        namespace=settings.namespace,
        api_key=settings.api_key.get_secret_value() if settings.api_key else None,
        tls=settings.tls,
        runtime=telemetry and telemetry.runtime,
        plugins=[CountersignPlugin(codec, [telemetry.observing] if telemetry else ())],
    )


async def submit(client: Client, request: Request, settings: TemporalSettings, title: str = "") -> Started:
    """Start the run of a request, or find the one that has it already.

    The id derives from the request key: a request that was sent before finds its open run, and one whose run
    has ended is answered from the ledger, whether or not Temporal still has the history.

    Raises:
        InvalidInput: an open run has this key for another body; or the text itself was given of a request
            that is bound to a region.
    """
    if request.region is not None and isinstance(request.body, str):
        given = f"text of {len(request.body)} characters"
        remedy = f"store it in region {request.region} first and send its reference"
        raise InvalidInput.field("body", given, remedy)
    # A title is a piece of the text, and who starts the run may stand at the centre.
    title = title if request.region is None else ""
    run_id = workflow_id(request.tenant, request.agent, request.key)
    try:
        handle = await client.start_workflow(
            request.agent,
            request,
            id=run_id,
            task_queue=queue_of(Queue.DECIDE, request.region),
            result_type=Outcome,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
            task_timeout=settings.task_timeout,
            search_attributes=attributes(request),
            memo={MEMO_BODY: body_digest(request)},
            static_summary=f"{request.agent}: {title or request.key}"[:190],
        )
    except WorkflowAlreadyStartedError:
        handle = await _open_run(client, request, run_id)
    return Started(run_id, handle)


async def _open_run(client: Client, request: Request, run_id: str) -> WorkflowHandle[Any, Outcome]:
    """The run that has the key, if it is about the same body; it was not started just now."""
    handle: WorkflowHandle[Any, Outcome] = client.get_workflow_handle(run_id, result_type=Outcome)
    memo = await (await handle.describe()).memo()
    if memo.get(MEMO_BODY, body_digest(request)) != body_digest(request):
        raise InvalidInput.field(
            "key", request.key, f"{run_id} is open with it for other content; use a new key"
        )
    return handle


async def answer(
    client: Client, run_id: str, kind: Kind, message: dict[str, Any], patience: timedelta
) -> Judged:
    """Answer an intent and learn whether it counted.

    One may be lost with its task after it was logged (see `insisting`). Sent again it is found to be logged,
    and counts once. If the run has ended by it meanwhile, what comes back is that: ask the ledger, as
    `countersign reject` does.
    """
    handle, update = client.get_workflow_handle(run_id), f"answer-{uuid.uuid4()}"
    return await insisting(
        lambda: handle.execute_update(
            f"decide_{kind.value}", message, id=update, result_type=Judged, rpc_timeout=patience
        ),
        patience,
    )


async def insisting(send: Callable[[], Awaitable[T]], patience: timedelta) -> T:
    """Send an update again for as long as its task is lost.

    A run that ends by the update while something else comes in has to look at that first: Temporal drops the
    task, and the update with it. What the task had logged stands, and is found there the second time.
    """
    until = time.monotonic() + patience.total_seconds()
    while True:
        try:
            return await send()
        except RPCError as error:
            if error.status is not RPCStatusCode.FAILED_PRECONDITION or time.monotonic() > until:
                raise
        await asyncio.sleep(AGAIN)


async def cancel(client: Client, run_id: str) -> None:
    """Ask a run to stop. Nothing is said of why: Temporal keeps that in clear, whatever the codec."""
    await client.get_workflow_handle(run_id).cancel()


async def is_open(client: Client, run_id: str) -> bool:
    """Whether Temporal has an open run of this id; it accepts a wish to cancel one that is over, too."""
    try:
        described = await client.get_workflow_handle(run_id).describe()
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        return False
    return described.status is WorkflowExecutionStatus.RUNNING


def attributes(request: Request) -> TypedSearchAttributes:
    """The search attributes a run starts with."""
    values = {
        Attribute.STATE: State.THINKING.value,
        Attribute.AGENT: request.agent,
        Attribute.TENANT: request.tenant,
    }
    return TypedSearchAttributes(
        [
            SearchAttributePair(SearchAttributeKey.for_keyword(name.value), value)
            for name, value in values.items()
        ]
    )
