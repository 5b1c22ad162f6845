"""`countersign pending`: what waits for a person."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from rich.table import Table
from temporalio.client import Client, WorkflowExecution
from temporalio.common import SearchAttributeKey

from models.card import visible
from models.errors import InvalidInput
from models.loop import Intent, Ref
from models.visibility import MEMO_DIGEST, Attribute, State
from scripts.commands.session import Json, Session, console, opened, reach, said
from workers import config

RISK = SearchAttributeKey.for_keyword(Attribute.RISK)
STATE = SearchAttributeKey.for_keyword(Attribute.STATE)
AGENT = SearchAttributeKey.for_keyword(Attribute.AGENT)
SINCE = SearchAttributeKey.for_datetime(Attribute.WAITING_SINCE)


def pending(as_json: Json = False) -> None:
    """List the intents that wait for an answer, oldest first."""
    rows = asyncio.run(_pending())
    if as_json:
        said(rows)
        return
    out = console()
    if not rows:
        out.print("nothing waits")
        return
    columns = ("run", "agent", "risk", "for", "waiting since", "title", "digest")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        since = row["waiting_since"][:19].replace("T", " ")
        digest = row["digest"][:12] + "…"
        first = (row["workflow_id"], row["agent"], row["risk"], row["for"])
        table.add_row(*first, since, visible(row["title"]), digest)
    table.columns[0].no_wrap = True
    out.print(table)


async def waiting(client: Client, session: Session) -> list[dict[str, Any]]:
    """Every run that waits, by what Temporal's visibility says; titles come from the bound bytes."""
    states = ", ".join(f'"{state.value}"' for state in (State.WAITING, State.REVIEWING))
    query = (
        f'{Attribute.STATE.value} IN ({states}) AND ExecutionStatus="Running" '
        f'AND {Attribute.TENANT.value}="{session.tenant}"'
    )
    found = [await _row(session, execution) async for execution in client.list_workflows(query)]
    return sorted(found, key=lambda row: str(row["waiting_since"]))


async def _pending() -> list[dict[str, Any]]:
    settings = config.load()
    async with opened(settings) as session:
        return await waiting(await reach(settings), session)


async def _row(session: Session, execution: WorkflowExecution) -> dict[str, Any]:
    attributes = execution.typed_search_attributes
    since: datetime | None = attributes.get(SINCE)
    digest = (await execution.memo()).get(MEMO_DIGEST)
    # What is sealed under a key that is not here, such as a region's, stays sealed.
    digest = digest if isinstance(digest, str) else ""
    return {
        "workflow_id": execution.id,
        "agent": attributes.get(AGENT) or execution.workflow_type,
        "risk": attributes.get(RISK) or "unknown",
        "for": "review" if attributes.get(STATE) == State.REVIEWING else "answer",
        "waiting_since": since.isoformat() if since else "",
        "title": await _title(session, digest),
        "digest": digest,
    }


async def _title(session: Session, digest: str) -> str:
    """Visibility may lag behind or come from another installation: then there is no title."""
    try:
        data = await session.content.get(session.tenant, Ref(digest=digest, size=0))
    except (InvalidInput, ValueError):
        return ""
    return Intent.model_validate_json(data).proposal.title
