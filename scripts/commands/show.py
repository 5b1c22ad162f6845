"""`countersign show ID`: what the approver reads and where the run stands, from the ledger alone.

It needs neither a worker nor Temporal, and every text is checked against the digest that binds it. Where
Temporal answers, a run that somebody stopped is called that.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from temporalio.service import RPCError

from activities.services.runs import Reading
from models.card import visible
from models.errors import Unavailable
from models.loop import Outcome
from models.settings import Settings
from models.visibility import State
from scripts.commands.session import Json, Run, console, opened, reach, said
from temporal.answering import STOPPED
from temporal.client import is_open
from workers import config


def show(
    run: Run,
    full: Annotated[bool, typer.Option("--full", help="The whole card, however long.")] = False,
    as_json: Json = False,
) -> None:
    """Show the card of a run's last intent, and where the run stands."""
    reading, stopped = asyncio.run(_read(run))
    card = reading.card
    text = "" if card is None else card.full if full else card.short
    if as_json:
        said(reading.plain() | {"card": text})
        return
    out = console()
    if text:
        print_card(out, text)
    print_state(out, reading, stopped)


def print_card(out: Console, text: str) -> None:
    """A card, rendered on a terminal and as it is elsewhere."""
    out.print(Markdown(text) if out.is_terminal else text)


def print_state(out: Console, reading: Reading, stopped: bool = False) -> None:
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
    if stopped:
        out.print(f"stopped  {STOPPED}")
    elif reading.reviewing and reading.card is not None:
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


async def _read(run: str) -> tuple[Reading, bool]:
    settings = config.load()
    async with opened(settings) as session:
        reading = await session.runs.read(run)
    return reading, reading.state is not State.DONE and await _is_stopped(settings, run)


async def _is_stopped(settings: Settings, run: str) -> bool:
    """Whether Temporal says that nobody carries it on; nothing is guessed where it does not answer."""
    try:
        return not await is_open(await reach(settings), run)
    except (Unavailable, RPCError):
        return False
