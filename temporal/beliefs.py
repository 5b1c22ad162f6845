"""Sending mail to the owner of a subject, who is started by it if there is none."""

from __future__ import annotations

from datetime import timedelta

from temporalio.client import Client, WithStartWorkflowOperation
from temporalio.common import WorkflowIDConflictPolicy

from models.beliefs import Handled, Mail, Ownership, owner_id
from models.visibility import Queue

WORKFLOW = "belief"


async def settle(
    client: Client, tenant: str, subject: str, mail: Mail, patience: timedelta = timedelta(minutes=1)
) -> Handled:
    """Change a belief in its turn, and learn what became of it; sending twice changes nothing twice."""
    return await client.execute_update_with_start_workflow(
        "settle",
        mail.model_dump(mode="json"),
        result_type=Handled,
        start_workflow_operation=WithStartWorkflowOperation(
            WORKFLOW,
            Ownership(tenant=tenant, subject=subject),
            id=owner_id(tenant, subject),
            task_queue=Queue.DECIDE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            static_summary=f"belief about {subject}"[:190],
        ),
        rpc_timeout=patience,
    )


async def tell(client: Client, tenant: str, subject: str, mail: Mail) -> None:
    """Put mail into the owner's box and go on."""
    await client.start_workflow(
        WORKFLOW,
        Ownership(tenant=tenant, subject=subject),
        id=owner_id(tenant, subject),
        task_queue=Queue.DECIDE,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        start_signal="tell",
        start_signal_args=[mail.model_dump(mode="json")],
    )
