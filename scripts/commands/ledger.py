"""`countersign ledger tail`: what happened, as it stands in the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.text import Text

from models.card import visible
from models.ledger import Event, EventType
from scripts.commands.ledger_proofs import checkpoint, export, key, prove, rotate, verify
from scripts.commands.session import Json, Session, console, opened
from scripts.exits import EXPLAINED
from workers import config

FOLLOW_SECONDS = 0.5
ALL = 2**31
ledger = typer.Typer(
    no_args_is_help=True, epilog=EXPLAINED, help="Read what stands in the ledger, and prove it."
)
for proving in (prove, export, checkpoint, key, rotate):
    ledger.command(epilog=EXPLAINED)(proving)
ledger.command(epilog="Exit codes: 0 sound, 1 tampered, 2 something is missing.")(verify)
SHOWN = (
    "agent",
    "status",
    "reason",
    "digest",
    "approver",
    "kind",
    "field",
    "remedy",
    "task",
    "tier",
    "standing",
)


@ledger.command(epilog=EXPLAINED)
def tail(
    limit: Annotated[int, typer.Option(min=1, max=ALL, help="How many of the newest events.")] = 200,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    run: Annotated[str | None, typer.Option(help="Only this run's events; by its workflow id.")] = None,
    as_json: Json = False,
) -> None:
    """Print the newest events, oldest first; with --json one event a line."""
    with suppress(KeyboardInterrupt):
        asyncio.run(_tail(limit, follow, run, as_json))


async def _tail(limit: int, follow: bool, run: str | None, as_json: bool) -> None:
    async with opened(config.load()) as session:
        last = _print(await _newest(session, limit, 0, run), as_json)
        while follow:
            await asyncio.sleep(FOLLOW_SECONDS)
            # Everything beyond the last one: a limit here would leave gaps.
            last = _print(await _newest(session, ALL, last, run), as_json) or last


async def _newest(session: Session, limit: int, after: int, run: str | None) -> Sequence[Event]:
    if run is None:
        return await session.ledger.tail(session.tenant, limit, after)
    found = [event for event in await session.runs.events(run) if event.seq > after]
    return found[-limit:]


def _print(events: Sequence[Event], as_json: bool) -> int:
    out = console()
    for event in events:
        if as_json:
            typer.echo(event.model_dump_json())
        else:
            out.print(line(event), soft_wrap=True)
    return events[-1].seq if events else 0


def line(event: Event) -> Text:
    """One event for a person."""
    text = Text(f"{event.seq:>6} ", style="dim")
    text.append(event.recorded_at.strftime("%Y-%m-%d %H:%M:%S "), style="dim")
    text.append(f"{event.type:<13}", style="bold")
    text.append(f" {visible(event.correlation_id)} {visible(event.actor_ref)}")
    text.append(f" {detail(event)}", style="dim")
    return text


def detail(event: Event) -> str:
    """The telling fields of an event's body, short."""
    body: dict[str, Any] = dict(event.body)
    if event.type is EventType.ROUTE:
        body |= {"task": body["route"]["purpose"], "tier": ", ".join(body["route"]["tiers"])}
    parts = [f"{name}={_short(body[name])}" for name in SHOWN if body.get(name)]
    return visible(" ".join(parts)).replace("\n", " ")


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text[:120]
