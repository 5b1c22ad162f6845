"""Sending mail to the owner of a subject, who is started by it if there is none.

A workflow id stands in clear in Temporal, whatever the codec. With encryption on it is therefore made of an
opaque name for the subject, which the database knows: `Beliefs.called`.
"""

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
from models.errors import InvalidInput
from models.visibility import Queue
from temporal.client import insisting

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
    called: str | None = None,
) -> Handled:
    """Change a belief in its turn, and learn what became of it; sending twice changes nothing twice.

    Args:
        client: of Temporal.
        tenant: whose belief it is.
        subject: what or whom it is about.
        mail: the change.
        patience: how long to wait for its turn.
        terms: how an owner is started, if there is none.
        called: what the owner's id calls the subject, from `Beliefs.called`; needed with encryption on.

    Raises:
        InvalidInput: encryption is on, and nobody says what the subject is called.
    """
    begun = _start(client, tenant, subject, terms, called)
    summary = f"belief about {subject}"[:190]

    async def send() -> Handled:
        start = WithStartWorkflowOperation[Any, Any](WORKFLOW, static_summary=summary, **begun)
        return await _settled(client, start, mail, patience)

    return await insisting(send, patience)


async def _settled(
    client: Client, start: WithStartWorkflowOperation[Any, Any], mail: Mail, patience: timedelta
) -> Handled:
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


async def tell(
    client: Client,
    tenant: str,
    subject: str,
    mail: Mail,
    terms: Terms = USUAL,
    called: str | None = None,
) -> None:
    """Put mail into the owner's box and go on; `called` as for `settle`.

    Raises:
        InvalidInput: encryption is on, and nobody says what the subject is called.
    """
    await client.start_workflow(
        WORKFLOW,
        start_signal="tell",
        start_signal_args=[mail.model_dump(mode="json")],
        **_start(client, tenant, subject, terms, called),
    )


def _start(client: Client, tenant: str, subject: str, terms: Terms, called: str | None) -> dict[str, Any]:
    if called in (None, subject) and client.data_converter.payload_codec is not None:
        raise InvalidInput.field(
            "called", called, "with encryption on an id spells no subject; give what Beliefs.called says"
        )
    return {
        "arg": Ownership(tenant=tenant, subject=subject, hand_over_after=terms.hand_over_after),
        "id": owner_id(tenant, called or subject),
        "task_queue": Queue.DECIDE,
        "task_timeout": terms.task_timeout,
        "id_conflict_policy": WorkflowIDConflictPolicy.USE_EXISTING,
    }
