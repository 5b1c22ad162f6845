"""`countersign show ID`: what the approver reads and where the run stands, from the ledger alone.

It needs neither a worker nor Temporal, and every text is checked against the digest that binds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from models.canonical import sha256
from models.card import visible
from models.errors import InvalidInput, LedgerBroken
from models.gate import Standing
from models.glass import UNSAID
from models.ledger import Entry, Event, EventType
from models.loop import Intent, Outcome, Ref
from models.progress import Progress
from models.visibility import State
from scripts.commands.session import Json, Run, Session, console, opened, said
from workers import config


@dataclass(frozen=True, slots=True)
class Card:
    """The last intent of a run, and its texts as they were bound."""

    digest: str
    intent: Intent
    short: str
    full: str


@dataclass(frozen=True, slots=True)
class Reading:
    """A run as the ledger has it."""

    run: str
    agent: str
    state: State
    progress: Progress
    card: Card | None

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, if it has."""
        return self.progress.outcome

    @property
    def waiting(self) -> str | None:
        """The digest that waits for an answer, if one does."""
        return self.progress.digest if self.state is State.WAITING else None

    @property
    def reviewing(self) -> bool:
        """Whether others have yet to say if breaking the glass was right."""
        return self.state is State.REVIEWING

    def plain(self) -> dict[str, Any]:
        """For programs."""
        progress, card = self.progress, self.card
        return {
            "workflow_id": self.run,
            "agent": self.agent,
            "state": self.state.value,
            "title": card.intent.proposal.title if card else None,
            "digest": card.digest if card else None,
            "waiting": self.waiting,
            "intents": progress.intents,
            "verdicts": [verdict.model_dump(mode="json") for verdict in progress.verdicts],
            "outcome": progress.outcome.model_dump(mode="json") if progress.outcome else None,
        }


def show(
    run: Run,
    full: Annotated[bool, typer.Option("--full", help="The whole card, however long.")] = False,
    as_json: Json = False,
) -> None:
    """Show the card of a run's last intent, and where the run stands."""
    reading = asyncio.run(_read(run))
    card = reading.card
    text = "" if card is None else card.full if full else card.short
    if as_json:
        said(reading.plain() | {"card": text})
        return
    out = console()
    if text:
        print_card(out, text)
    print_state(out, reading)


def print_card(out: Console, text: str) -> None:
    """A card, rendered on a terminal and as it is elsewhere."""
    out.print(Markdown(text) if out.is_terminal else text)


def print_state(out: Console, reading: Reading) -> None:
    """Where a run stands, in a few lines."""
    out.print(f"run      {reading.run}")
    out.print(f"state    {reading.state}")
    if reading.card is not None:
        out.print(f"digest   {reading.card.digest}")
    for verdict in reading.progress.verdicts:
        broke = ", breaking the glass" if verdict.break_glass else ""
        how = f"{verdict.assurance}{', security key' if verdict.hardware else ''}"
        out.print(f"verdict  {verdict.kind} by {visible(verdict.approver)} ({how}){broke}")
    for review in reading.progress.reviews:
        out.print(f"review   {review.kind} by {visible(review.approver)} ({review.assurance})")
    if reading.outcome is not None:
        print_outcome(out, reading.outcome)
    if reading.reviewing and reading.card is not None:
        command = f"countersign approve {reading.run} --review --digest {reading.card.digest}"
        out.print(f"review   the glass was broken; say whether that was right: {command} --as YOUR-NAME")
    elif reading.waiting:
        out.print(f"answer   countersign approve {reading.run} --digest {reading.waiting} --as YOUR-NAME")


def print_outcome(out: Console, outcome: Outcome) -> None:
    """How a run ended, in a few lines."""
    reason = f" ({visible(outcome.reason)})" if outcome.reason else ""
    out.print(f"outcome  {outcome.status}{reason}")
    for receipt in outcome.receipts:
        links = " ".join(visible(link) for link in receipt.links)
        out.print(f"receipt  {visible(receipt.reference)} {links}".rstrip())


async def read_run(session: Session, run: str) -> Reading:
    """A run from its events and the bytes they name.

    Raises:
        InvalidInput: nothing is recorded of such a run.
        LedgerBroken: a text is not the one that was bound.
    """
    events = await session.events(run)
    if not events:
        raise unknown(run)
    progress = Progress()
    progress.take(_entries(event for event in events if event.stream == run))
    card = await _card(session, events)
    return Reading(run, _agent(events), _state(progress, card), progress, card)


def unknown(run: str) -> InvalidInput:
    """No run of this id."""
    return InvalidInput.field(
        "ID", run, "no such run is recorded; `countersign pending` lists those that wait"
    )


async def _read(run: str) -> Reading:
    async with opened(config.load()) as session:
        return await read_run(session, run)


async def _card(session: Session, events: Iterable[Event]) -> Card | None:
    logged = [event.body for event in events if event.type is EventType.INTENT]
    if not logged:
        return None
    digest = str(logged[-1]["digest"])
    data = await _blob(session, digest)
    intent = Intent.model_validate_json(data)
    full = await _blob(session, str(logged[-1]["card"]))
    # The bytes that were bound, not what this version would make of them: it may know more fields.
    if sha256(data) != digest or intent.card_digest != sha256(full):
        raise LedgerBroken(f"intent {digest} does not bind the card that is stored; answer nothing, look why")
    short = await _blob(session, str(logged[-1]["short_card"]))
    return Card(digest, intent, short.decode(), full.decode())


async def _blob(session: Session, digest: str) -> bytes:
    return await session.content.get(session.tenant, Ref(digest=digest, size=0))


def _entries(events: Iterable[Event]) -> list[Entry]:
    return [Entry(version=e.version, type=e.type, body=e.body, recorded_at=e.recorded_at) for e in events]


def _agent(events: Iterable[Event]) -> str:
    return next((str(e.body["agent"]) for e in events if e.type is EventType.REQUEST), "unknown")


def _state(progress: Progress, card: Card | None) -> State:
    if progress.outcome is not None:
        glass = UNSAID if card is None else card.intent.gate.break_glass or UNSAID
        return State.REVIEWING if progress.reviewing(glass) else State.DONE
    if progress.digest is None or card is None:
        return State.THINKING
    stands = Standing.EXPIRED if progress.expired else progress.stands(card.intent)
    return State.WAITING if stands is Standing.WAITING else State.ACTING
