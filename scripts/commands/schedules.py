"""`countersign schedules`: what Temporal starts by the clock, from the settings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table

from models.settings import Settings
from scripts.commands.answer import As
from scripts.commands.session import Json, console, reach, said
from scripts.exits import EXPLAINED
from temporal.schedules import Scheduled, Schedules
from workers import config, registry

T = TypeVar("T")
Named = Annotated[str, typer.Argument(metavar="NAME", help="The schedule's name in the settings.")]
schedules = typer.Typer(
    no_args_is_help=True,
    epilog=EXPLAINED,
    add_completion=False,
    help="Temporal schedules from countersign.toml.",
)


@schedules.command(epilog=EXPLAINED)
def apply(as_json: Json = False) -> None:
    """Create, change and delete schedules until Temporal holds those of the settings."""
    known = registry.scheduled()
    changed = _with(lambda each, settings: each.apply(settings.schedules, known))
    if as_json:
        said([one.model_dump(mode="json") for one in changed])
        return
    for one in changed:
        console().print(f"{one.change:<10} {one.name}")
    if not changed:
        console().print("the settings have no [[schedules]], and Temporal has none of ours")


@schedules.command("list", epilog=EXPLAINED)
def list_(as_json: Json = False) -> None:
    """List the schedules of the settings and those in Temporal."""
    found = _with(lambda each, settings: each.listed(settings.schedules))
    if as_json:
        said([one.model_dump(mode="json") for one in found])
    else:
        console().print(_table(found))


@schedules.command(epilog=EXPLAINED)
def pause(name: Named, as_: As = None) -> None:
    """Start no more runs by this schedule."""
    _with(lambda each, settings: each.pause(name, f"paused by {_who(as_, settings)}"))
    console().print(f"paused {name}")


@schedules.command(epilog=EXPLAINED)
def resume(name: Named, as_: As = None) -> None:
    """Start runs by this schedule again."""
    _with(lambda each, settings: each.resume(name, f"resumed by {_who(as_, settings)}"))
    console().print(f"resumed {name}")


def _with(use: Callable[[Schedules, Settings], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        settings = config.load()
        client = await reach(settings)
        return await use(Schedules(client, settings.tenant, settings.temporal), settings)

    return asyncio.run(run())


def _who(named: str | None, settings: Settings) -> str:
    return named or settings.approver or "somebody at the command line"


def _table(found: list[Scheduled]) -> Table:
    table = Table("name", "agent", "cron", "in Temporal", "next", "note", box=None, pad_edge=False)
    for one in found:
        state = f"{one.standing}, paused" if one.paused else str(one.standing)
        soon = one.next[0].strftime("%Y-%m-%d %H:%M UTC") if one.next and not one.paused else "-"
        table.add_row(one.name, one.agent, one.cron, state, soon, one.note)
    return table
