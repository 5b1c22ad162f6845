"""`countersign pending`: what waits for a person."""

from __future__ import annotations

import asyncio
from typing import Any

from rich.table import Table

from models.card import visible
from scripts.commands.session import Json, console, opened, reach, said
from temporal.inbox import waiting
from workers import config


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
        table.add_row(*map(visible, (*first, since, row["title"], digest)))
    table.columns[0].no_wrap = True
    out.print(table)


async def _pending() -> list[dict[str, Any]]:
    settings = config.load()
    async with opened(settings) as session:
        return await waiting(await reach(settings), session.runs, session.tenant)
