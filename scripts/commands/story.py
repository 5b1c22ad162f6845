"""`countersign story SUBJECT`: what happened around a subject, from memory, beliefs and the ledger."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

import typer
from sqlalchemy import Connection, or_, select

from activities.services.beliefs import SNAPSHOT, Beliefs
from activities.services.claims import CLAIM
from activities.services.content import BLOB
from activities.services.database import from_micros
from activities.services.discreet import names_of, text_reader
from activities.services.ledger_store import EVENT, in_runs
from activities.services.vectors import MEMORY
from models.beliefs import PREFIX, Belief, difference
from models.canonical import subject_id
from models.errors import Final, UnknownName
from models.ledger import Event, EventType
from models.loop import Ref
from models.memory import Origin
from scripts.commands.session import Json, Session, console, opened, said
from scripts.commands.telling import digests, is_minor, told
from workers import config
from workers.compose import utc_now

CHUNK = 1000


@dataclass(frozen=True, slots=True)
class Moment:
    """One line of a story."""

    at: datetime
    source: str
    what: str
    reference: str
    place: str
    """The reference as a person would look it up."""
    order: int = 0
    """Among what happened at the same time."""
    minor: bool = False
    """What stands around it says as much."""


def story(
    subject: Annotated[str, typer.Argument(help="What or whom it is about.")],
    every: Annotated[bool, typer.Option("--all", help="Dry runs and deliveries too.")] = False,
    as_json: Json = False,
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
        if every or not one.minor:
            when = one.at.strftime("%Y-%m-%d %H:%M:%S")
            line = f"{when} {one.source:<8} {one.what}  [{one.place}]"
            console().print(line, markup=False, highlight=False, soft_wrap=True)


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
        moments += await _happened(session, run)
    if not moments:
        raise UnknownName(f"subject: nothing is known about {subject!r}")
    return sorted(set(moments), key=lambda one: (one.at, one.source, one.order, one.reference))


async def _happened(session: Session, run: str) -> list[Moment]:
    """A run's events; several runs are told apart by the end of their ids."""
    events = await session.runs.events(run)
    texts = {digest: await _text(session, event, digest) for event in events for digest in digests(event)}
    known = {digest: text for digest, text in texts.items() if text}
    return [
        Moment(
            at=event.recorded_at,
            source="ledger",
            what=f"{run[-6:]} {told(event, known)}",
            reference=event.event_id,
            place=f"event {event.seq}",
            order=event.seq,
            minor=is_minor(event),
        )
        for event in events
    ]


async def _text(session: Session, event: Event, digest: str) -> str:
    """A proposal's title or a person's comment; empty once it is gone."""
    try:
        data = await session.content.get(session.tenant, Ref(digest=digest, size=0))
        text = data.decode()
        return str(json.loads(text)["title"]) if event.type is EventType.PROPOSAL else text
    except (Final, ValueError, KeyError):
        return ""


def _remembered(connection: Connection, tenant: str, subject: str) -> tuple[list[Moment], list[str]]:
    called, read = names_of(connection, tenant, subject), text_reader(connection, tenant)
    about = (MEMORY.c.tenant == tenant, MEMORY.c.subject.in_(called), MEMORY.c.forgotten_at.is_(None))
    rows = connection.execute(select(MEMORY).where(*about)).all()
    names = {row.source_event for row in rows} | {row.source for row in rows}
    changes = select(SNAPSHOT.c.event_id).where(SNAPSHOT.c.tenant == tenant, SNAPSHOT.c.subject.in_(called))
    names |= set(connection.execute(changes).scalars())
    named, runs = (EVENT.c.log_id == tenant) & EVENT.c.event_id.in_(names), select(EVENT.c.correlation_id)
    runs = runs.where(named).union(runs.where(in_runs(tenant, names)))
    moments = [
        Moment(
            at=from_micros(row.recorded_at),
            source="memory",
            what=f"{row.kind}{' (inferred)' if row.origin == Origin.MODEL else ''}, {row.standing}: "
            f"{read(row.title)}",
            reference=row.record_id,
            place=row.record_id[:8],
        )
        for row in rows
    ]
    found = {*connection.execute(runs).scalars(), *_asked(connection, tenant, called, subject)}
    return moments, sorted(found | set(_resting(connection, tenant, subject)))


def _asked(connection: Connection, tenant: str, called: Iterable[str], subject: str) -> Iterator[str]:
    """Runs whose request was about the subject."""
    mine = BLOB.c.subject == subject_id(tenant, subject), BLOB.c.sealed_by.in_(called)
    bodies = select(BLOB.c.digest).where(BLOB.c.tenant == tenant, or_(*mine))
    runs = select(CLAIM.c.workflow_id).where(CLAIM.c.tenant == tenant, CLAIM.c.body_digest.in_(bodies))
    yield from connection.execute(runs).scalars()


def _resting(connection: Connection, tenant: str, subject: str) -> Iterator[str]:
    """Runs that proposed something because of what was believed of the subject."""
    proposals = select(EVENT.c.correlation_id, EVENT.c.envelope).where(
        EVENT.c.log_id == tenant, EVENT.c.type == EventType.PROPOSAL.value
    )
    wanted = f"{PREFIX}{subject}"
    for row in connection.execute(proposals.execution_options(yield_per=CHUNK)):
        if PREFIX.encode() in row.envelope:
            evidence = json.loads(row.envelope)["body"].get("evidence", ())
            if any(str(one["reference"]).partition("#")[0] == wanted for one in evidence):
                yield row.correlation_id


async def _believed(session: Session, subject: str) -> list[Moment]:
    store, moments = Beliefs(session.database, utc_now), list[Moment]()
    for agent in await store.agents(session.tenant, subject):
        before = Belief(tenant=session.tenant, agent=agent, subject=subject)
        for one in await store.history(session.tenant, agent, subject, limit=1000):
            changes = "; ".join(delta.text() for delta in difference(before, one.belief))
            moments.append(
                Moment(
                    at=one.at or utc_now(),
                    source="belief",
                    what=f"{agent} believes, version {one.belief.version}: {changes or 'the same as before'}",
                    reference=one.reason,
                    place=one.reason,
                    order=one.belief.version,
                )
            )
            before = one.belief
    return moments
