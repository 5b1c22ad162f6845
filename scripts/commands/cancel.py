"""`countersign cancel ID`: stop a run; what was done already is taken back or kept, as its policy says."""

from __future__ import annotations

import asyncio
from typing import Any

from activities.services.runs import unknown
from models.canonical import derived_id
from models.card import visible
from models.ledger import Draft, EventType, cancel_stream
from models.people import People, unfit
from models.settings import Settings
from scripts.commands.answer import As, Comment, identity
from scripts.commands.session import Json, Run, Session, console, opened, reach, said
from scripts.exits import Refused
from temporal.client import cancel as ask_to_stop
from temporal.client import is_open
from workers import config


def cancel(run: Run, as_: As = None, comment: Comment = "", as_json: Json = False) -> None:
    """Ask a run to stop; it ends as cancelled, or as what was done by then."""
    settings = config.load()
    who = identity(settings, as_)
    asyncio.run(_cancel(settings, run, who, comment))
    if as_json:
        said({"workflow_id": run, "asked": True, "by": who})
    else:
        console().print(
            f"asked {run} to stop, as {visible(who)}; see what came of it: countersign show {run}"
        )


async def _cancel(settings: Settings, run: str, who: str, comment: str) -> None:
    async with opened(settings) as session:
        if not await session.runs.events(run):
            raise unknown(run)
        reading = await session.runs.read(run)
        if reading.outcome is not None:
            raise Refused(f"{run} has ended as {reading.outcome.status}; there is nothing to stop")
        people = People(people=settings.people)
        why = unfit(people, settings.policy.of(reading.agent).cancel_roles, who)
        if why is not None:
            refusal = {"kind": "cancel", "field": "approver", "remedy": why, "approver": who}
            await _record(session, run, who, EventType.REFUSAL, refusal)
            raise Refused(f"not stopped: --as {visible(who)}: {why}; the attempt stands in the ledger")
        client = await reach(settings)
        if not await is_open(client, run):
            raise Refused(
                f"Temporal has no open run {run}, though its ledger has no outcome; start the request again"
            )
        await _record(session, run, who, EventType.CANCEL, {"by": who} | await _kept(session, comment))
        await ask_to_stop(client, run)


async def _kept(session: Session, comment: str) -> dict[str, Any]:
    """Words are content: an event refers to them."""
    if not comment:
        return {}
    ref = await session.content.put(session.tenant, comment.encode(), "text/plain; charset=utf-8")
    return {"comment": ref.model_dump(mode="json")}


async def _record(session: Session, run: str, who: str, kind: EventType, body: dict[str, Any]) -> None:
    # In a stream of its own: the run's belongs to its workflow, which would have to read it again.
    draft = Draft(
        event_id=derived_id("cancel", session.tenant, run, kind, who, str(body)),
        stream=cancel_stream(run),
        type=kind,
        actor_kind="person",
        actor_ref=who,
        correlation_id=run,
        body=body,
    )
    await session.ledger.add(session.tenant, draft)
