"""Sending mail to the owner of a subject, who is started by it if there is none."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from temporalio.client import Client, WithStartWorkflowOperation, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.service import RPCError

from models.beliefs import Handled, Mail, Ownership, owner_id
from models.visibility import Queue

WORKFLOW = "belief"


@dataclass(frozen=True, slots=True)
class Terms:
    """How an owner is started, if there is none; one that runs keeps its own."""

    task_timeout: timedelta = timedelta(seconds=10)
    """How long Temporal waits for a worker that may have fallen."""
    hand_over_after: int = 2000
    """Mail that one run handles."""


USUAL = Terms()


async def settle(
    client: Client,
    tenant: str,
    subject: str,
    mail: Mail,
    patience: timedelta = timedelta(minutes=1),
    terms: Terms = USUAL,
) -> Handled:
    """Change a belief in its turn, and learn what became of it; sending twice changes nothing twice."""
    start = WithStartWorkflowOperation[Any, Any](
        WORKFLOW, static_summary=f"belief about {subject}"[:190], **_start(tenant, subject, terms)
    )
    try:
        return await client.execute_update_with_start_workflow(
            "settle",
            mail.model_dump(mode="json"),
            result_type=Handled,
            start_workflow_operation=start,
            rpc_timeout=patience,
        )
    except (RPCError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
        if not isinstance(error.__cause__, asyncio.CancelledError):
            # The SDK keeps the error a second time, and complains where nobody looks at it.
            with suppress(RPCError):
                await start.workflow_handle()
        raise


async def tell(client: Client, tenant: str, subject: str, mail: Mail, terms: Terms = USUAL) -> None:
    """Put mail into the owner's box and go on."""
    await client.start_workflow(
        WORKFLOW,
        start_signal="tell",
        start_signal_args=[mail.model_dump(mode="json")],
        **_start(tenant, subject, terms),
    )


def _start(tenant: str, subject: str, terms: Terms) -> dict[str, Any]:
    return {
        "arg": Ownership(tenant=tenant, subject=subject, hand_over_after=terms.hand_over_after),
        "id": owner_id(tenant, subject),
        "task_queue": Queue.DECIDE,
        "task_timeout": terms.task_timeout,
        "id_conflict_policy": WorkflowIDConflictPolicy.USE_EXISTING,
    }
