"""`countersign route explain ID`: every candidate of a recorded route, and why it lost; `retract`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table
from sqlalchemy import Connection, select

from activities.services.cache import Cache
from activities.services.content import get_blob
from activities.services.ledger_store import EVENT
from models.card import visible
from models.errors import InvalidInput, UnknownName
from models.inference import Candidate
from models.ledger import Event, EventType
from models.routing import RoutePolicy, RouteRecord, replayed
from scripts.commands.session import Json, Session, console, opened, said, utc_now
from scripts.exits import EXPLAINED
from workers import config

route = typer.Typer(no_args_is_help=True, help="See how calls were routed to models.")


@dataclass(frozen=True, slots=True)
class Explained:
    """One route, as the ledger has it."""

    event: Event
    record: RouteRecord
    replay: str
    """Whether the same decision comes out again today."""
    fallbacks: tuple[dict[str, Any], ...] = ()
    similar: tuple[dict[str, Any], ...] = ()
    """What it was given that similar calls got."""

    def plain(self) -> dict[str, Any]:
        """For programs."""
        return {
            "event_id": self.event.event_id,
            "workflow_id": self.event.correlation_id,
            "recorded_at": self.event.recorded_at.isoformat(),
            "replay": self.replay,
            "fallbacks": list(self.fallbacks),
            "similar": list(self.similar),
            **self.record.model_dump(mode="json"),
        }


@route.command(epilog=EXPLAINED)
def explain(
    wanted: Annotated[str, typer.Argument(metavar="ID", help="A run's workflow id, or a route's event id.")],
    as_json: Json = False,
) -> None:
    """Show every candidate of a route, why it lost, and whether the decision can be made again."""
    asyncio.run(_explain(wanted, as_json))


@route.command(epilog=EXPLAINED)
def retract(
    task: Annotated[str | None, typer.Option(help="Only answers to this task; `explain` names it.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="The tenant's answers to every task.")] = False,
    as_json: Json = False,
) -> None:
    """Take cached answers back: within a second nobody is given one of them any more."""
    if (task is None) is not everything:
        raise InvalidInput.field("--task", task, "name one task, or say --all and no task")
    gone = asyncio.run(_retract(task))
    if as_json:
        said({"retracted": gone})
    else:
        console().print(f"{gone} answers were taken back")


async def _retract(task: str | None) -> int:
    async with opened(config.load()) as session:
        return await Cache(session.database, utc_now).retract(session.tenant, task=task)


async def _explain(wanted: str, as_json: bool) -> None:
    async with opened(config.load()) as session:
        found = await explained(session, wanted)
    if as_json:
        said([one.plain() for one in found])
        return
    for one in found:
        show(one)


async def explained(session: Session, wanted: str) -> tuple[Explained, ...]:
    """The routes of a run, or the one with that event id.

    Raises:
        UnknownName: the ledger has none.
    """
    events = await session.runs.events(wanted) or await session.runs.events(await _run_of(session, wanted))
    run = any(event.correlation_id == wanted for event in events)
    routes = [one for one in events if one.type is EventType.ROUTE and (run or one.event_id == wanted)]
    if not routes:
        raise UnknownName(f"route: {wanted!r} has none on record; name a run, or a route's event id")
    falls = [event.body for event in events if event.type is EventType.FALLBACK]
    given = [event.body for event in events if event.type is EventType.SIMILAR]
    return tuple([await read(session, event, falls, given) for event in routes])


async def _run_of(session: Session, event_id: str) -> str:
    wanted = (EVENT.c.log_id == session.tenant) & (EVENT.c.event_id == event_id)
    query = select(EVENT.c.correlation_id).where(wanted)
    return await session.database.read(lambda link: link.execute(query).scalar_one_or_none()) or ""


async def read(
    session: Session, event: Event, falls: Sequence[dict[str, Any]], given: Sequence[dict[str, Any]] = ()
) -> Explained:
    """One event as a route, made again with the policy it names.

    Raises:
        InvalidInput: it holds what this version does not know.
    """
    try:
        record = RouteRecord.model_validate(event.body)
    except ValidationError as error:
        raise InvalidInput.field(
            "event", event.event_id, f"it was written by a version that knows more ({error.error_count()})"
        ) from None
    mine = tuple(fall for fall in falls if fall["task"] == record.route.purpose)
    similar = tuple(one for one in given if one["route"] == event.event_id)
    return Explained(event, record, await _replay(session, record), mine, similar)


async def _replay(session: Session, record: RouteRecord) -> str:
    digest = record.policy
    if digest is None or record.snapshot_digest is None:
        return "not possible: recorded by an older version"
    if record.snapshot.digest() != record.snapshot_digest:
        return "not possible: the snapshot does not hash to its name"

    def policy(link: Connection) -> bytes:
        return get_blob(link, session.tenant, digest)

    stored = RoutePolicy.model_validate(json.loads(await session.database.read(policy)))
    same = replayed(record, stored) == record.decision()
    return "the same decision" if same else "another decision: the rule has changed since"


def show(one: Explained) -> None:
    """One route for a person."""
    out, record = console(), one.record
    needs = record.needs
    out.print(f"{record.route.purpose}  {one.event.correlation_id}  {one.event.event_id}", style="bold")
    bound = f", region {needs.region}" if needs.region else ""
    shape = ", held to a schema" if needs.structured else ""
    waits = f", within {needs.within_milliseconds} ms" if needs.within_milliseconds else ""
    out.print(f"needs: {needs.data_class}, {needs.context_tokens} tokens{bound}{shape}{waits}")
    table = Table("", "tier", "expected", "cost", "why", box=None, pad_edge=False)
    for candidate in record.route.candidates:
        table.add_row(*_row(candidate, record.route.tiers))
    out.print(table)
    if (bar := record.route.bar) is not None:
        out.print(
            f"{bar.tier}: an answer of {bar.model} below {bar.confidence} of 1000 goes on to the next tier"
        )
    for name in _silent(record):
        out.print(f"{name}: its server gives no logprobs; none of its answers is doubted")
    for account in record.snapshot.accounts:
        out.print(f"budget {account.name}: {account.left / 1e6:.6f} of {account.cap / 1e6:.6f} were left")
    if record.refusal:
        out.print(visible(f"refused as {record.refused_as}: {record.refusal}"), soft_wrap=True)
    for fall in one.fallbacks:
        out.print(visible(f"{fall['tier']} failed: {fall['reason']}"), soft_wrap=True)
    for given in one.similar:
        out.print(_given(given), soft_wrap=True)
    out.print(f"replay: {one.replay}", style="dim")


def _silent(record: RouteRecord) -> list[str]:
    """Tiers of a weighed call that cannot say how sure they are."""
    if record.wrong is None and not record.both:
        return []
    return [name for name in record.route.tiers if record.snapshot.of(name).logprobs is False]


def _given(given: dict[str, Any]) -> str:
    """Which similar call's answer it was given, and why it might be."""
    return (
        f"{given['tier']} was not asked: a similar call's answer was given, {given['entry'][:12]}, texts "
        f"alike by {given['similarity']} of 1000, of such at most {given['wrong_permille']} of 1000 wrong "
        f"({given['permitted']} permitted)"
    )


def _row(candidate: Candidate, tiers: Sequence[str]) -> tuple[str, ...]:
    place = tiers.index(candidate.tier) if candidate.tier in tiers else None
    mark = "" if place is None else ("first", "then")[min(place, 1)]
    milliseconds = candidate.predicted_milliseconds
    took = "unknown" if milliseconds is None else f"{milliseconds} ms"
    amount = candidate.predicted_amount
    cost = "unknown" if amount is None else f"{amount} {candidate.currency or ''}"
    return mark, candidate.tier, took, cost, visible(candidate.lost or "")
