"""`countersign story SUBJECT`: what happened around a subject, from memory, beliefs and the ledger."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

import typer
from sqlalchemy import Connection, or_, select

from activities.services.beliefs import SNAPSHOT, Beliefs
from activities.services.database import from_micros
from activities.services.discreet import names_of, text_reader
from activities.services.ledger_store import EVENT
from activities.services.vectors import MEMORY
from models.beliefs import Belief, difference
from models.errors import UnknownName
from models.memory import Origin
from scripts.commands.ledger import detail
from scripts.commands.session import Json, Session, console, opened, said
from workers import config
from workers.compose import utc_now


@dataclass(frozen=True, slots=True)
class Moment:
    """One line of a story."""

    at: datetime
    source: str
    what: str
    reference: str


def story(
    subject: Annotated[str, typer.Argument(help="What or whom it is about.")], as_json: Json = False
) -> None:
    """Tell what is known to have happened, oldest first, each line with where it stands."""
    moments = asyncio.run(_told(subject))
    if as_json:
        said(
            [
                {"at": one.at, "from": one.source, "what": one.what, "reference": one.reference}
                for one in moments
            ]
        )
        return
    for one in moments:
        when = one.at.strftime("%Y-%m-%d %H:%M:%S")
        console().print(f"{when} {one.source:<8} {one.what}  [{one.reference}]")


async def _told(subject: str) -> list[Moment]:
    async with opened(config.load()) as session:
        return await collect(session, subject)


async def collect(session: Session, subject: str) -> list[Moment]:
    """Everything about a subject in order of time.

    Raises:
        UnknownName: nothing is known about it.
    """
    database, tenant = session.database, session.tenant
    remembered, runs = await database.read(lambda link: _remembered(link, tenant, subject))
    moments = remembered + await _believed(session, subject)
    for run in runs:
        for event in await session.events(run):
            moments.append(
                Moment(event.recorded_at, "ledger", f"{event.type} {detail(event)}", event.event_id)
            )
    if not moments:
        raise UnknownName(f"subject: nothing is known about {subject!r}")
    return sorted(set(moments), key=lambda one: (one.at, one.reference))


def _remembered(connection: Connection, tenant: str, subject: str) -> tuple[list[Moment], list[str]]:
    called, read = names_of(connection, tenant, subject), text_reader(connection, tenant)
    about = (MEMORY.c.tenant == tenant, MEMORY.c.subject.in_(called), MEMORY.c.forgotten_at.is_(None))
    rows = connection.execute(select(MEMORY).where(*about)).all()
    names = {row.source_event for row in rows} | {row.source for row in rows}
    changes = select(SNAPSHOT.c.event_id).where(SNAPSHOT.c.tenant == tenant, SNAPSHOT.c.subject == subject)
    names |= set(connection.execute(changes).scalars())
    named = or_(EVENT.c.event_id.in_(names), EVENT.c.correlation_id.in_(names))
    runs = select(EVENT.c.correlation_id).where(EVENT.c.log_id == tenant, named).distinct()
    moments = [
        Moment(
            from_micros(row.recorded_at),
            "memory",
            f"{row.kind}{' (inferred)' if row.origin == Origin.MODEL else ''}, {row.standing}: "
            f"{read(row.title)}",
            row.record_id,
        )
        for row in rows
    ]
    return moments, sorted(connection.execute(runs).scalars())


async def _believed(session: Session, subject: str) -> list[Moment]:
    store, moments = Beliefs(session.database, utc_now), list[Moment]()
    for agent, about, _ in await store.subjects(session.tenant):
        if about != subject:
            continue
        before = Belief(tenant=session.tenant, agent=agent, subject=subject)
        for one in await store.history(session.tenant, agent, subject, limit=1000):
            changes = "; ".join(delta.text() for delta in difference(before, one.belief))
            moments.append(Moment(one.at or utc_now(), "belief", f"{agent}: {changes}", one.reason))
            before = one.belief
    return moments
