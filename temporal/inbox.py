"""What waits for a person, as Temporal's visibility has it, and the ledger.

Whoever starts a run by hand gives it any search attributes and any memo: it is listed once the ledger has
something that it put forward.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from temporalio.client import Client, WorkflowExecution
from temporalio.common import SearchAttributeKey

from activities.services.runs import Runs
from models.visibility import MEMO_DIGEST, Attribute, State

RISK = SearchAttributeKey.for_keyword(Attribute.RISK)
STATE = SearchAttributeKey.for_keyword(Attribute.STATE)
SINCE = SearchAttributeKey.for_datetime(Attribute.WAITING_SINCE)


async def waiting(client: Client, runs: Runs, tenant: str) -> list[dict[str, Any]]:
    """Every run that waits, oldest first; titles come from the bound bytes."""
    states = ", ".join(f'"{state.value}"' for state in (State.WAITING, State.REVIEWING))
    query = (
        f'{Attribute.STATE.value} IN ({states}) AND ExecutionStatus="Running" '
        f'AND {Attribute.TENANT.value}="{tenant}"'
    )
    found = [
        await _row(runs, execution)
        async for execution in client.list_workflows(query)
        if await runs.has_intent(execution.id)
    ]
    return sorted(found, key=lambda row: str(row["waiting_since"]))


async def _row(runs: Runs, execution: WorkflowExecution) -> dict[str, Any]:
    attributes = execution.typed_search_attributes
    since: datetime | None = attributes.get(SINCE)
    digest = (await execution.memo()).get(MEMO_DIGEST)
    # What is sealed under a key that is not here, such as a region's, stays sealed.
    digest = digest if isinstance(digest, str) else ""
    return {
        "workflow_id": execution.id,
        "agent": execution.workflow_type,
        "risk": attributes.get(RISK) or "unknown",
        "for": "review" if attributes.get(STATE) == State.REVIEWING else "answer",
        "waiting_since": since.isoformat() if since else "",
        "title": await runs.title(execution.id, digest),
        "digest": digest,
    }
