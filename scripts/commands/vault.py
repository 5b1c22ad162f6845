"""`countersign vault`: the data keys that stored content is sealed under, and which master key wraps them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.progress import track
from sqlalchemy import Connection, func, select

from activities.services.content import vault_of
from activities.services.key_life import BATCH, rewrap
from activities.services.vault import KEY, Vault
from models.errors import InvalidInput
from models.settings import Settings
from scripts.commands.session import Json, console, opened, said, utc_now
from scripts.exits import EXPLAINED
from workers import config

vault = typer.Typer(no_args_is_help=True, epilog=EXPLAINED, help="Look after the keys of sealed content.")
As = Annotated[str | None, typer.Option("--as", help="Who asks for it; default: approver in the settings.")]
Heard = Callable[[int, int], None]


@vault.command(epilog=EXPLAINED)
def status(as_json: Json = False) -> None:
    """Count data keys by the master key that wraps them, and those that were destroyed."""
    found = asyncio.run(_status(config.load()))
    if as_json:
        said(found)
        return
    for name, count in found["keys"].items():
        console().print(f"{count} data keys under {name}{' (current)' if name == found['current'] else ''}")
    console().print(f"{found['destroyed']} destroyed")


@vault.command(name="rewrap", epilog=EXPLAINED)
def rewrap_command(as_: As = None, as_json: Json = False) -> None:
    """Wrap every data key under the current master key, so that an old one can be dropped.

    Content stays as it is. The ledger of each tenant says so; starting again goes on where it stopped.
    """
    settings = config.load()
    who = as_ or settings.approver
    if not who:
        raise InvalidInput.field("--as", "nothing", "say who you are, or set approver in countersign.toml")
    done = asyncio.run(_rewrap(settings, who, quiet=as_json))
    if as_json:
        said(done)
    else:
        console().print(f"{done['rewrapped']} data keys are under {done['current']} now")


async def _status(settings: Settings) -> dict[str, Any]:
    async with opened(settings) as session:
        return await session.database.read(_counts)


def _counts(link: Connection) -> dict[str, Any]:
    query = select(KEY.c.wrapped_by, func.count()).where(KEY.c.destroyed_at.is_(None))
    rows = link.execute(query.group_by(KEY.c.wrapped_by).order_by(KEY.c.wrapped_by)).all()
    gone = select(func.count()).select_from(KEY).where(KEY.c.destroyed_at.is_not(None))
    return {
        "current": _vault(link).current,
        "keys": {name: count for name, count in map(tuple, rows)},
        "destroyed": link.execute(gone).scalar_one(),
    }


async def _rewrap(settings: Settings, who: str, quiet: bool) -> dict[str, Any]:
    async with opened(settings) as session:
        database = session.database
        total = await database.read(lambda link: _vault(link).behind(link))
        current = await database.read(lambda link: _vault(link).current)
        parts, rewrapped = range(-(-total // BATCH)), 0
        steps = track(parts, "rewrapping", console=console(stderr=True), disable=quiet or not total)
        for _ in steps:
            rewrapped += await database.write(lambda link: rewrap(link, _vault(link), who, utc_now()))
        # What came under an old key meanwhile, from a process that was not restarted yet.
        while more := await database.write(lambda link: rewrap(link, _vault(link), who, utc_now())):
            rewrapped += more
    return {"current": current, "rewrapped": rewrapped}


def _vault(link: Connection) -> Vault:
    found = vault_of(link)
    if found is None:
        raise InvalidInput.field("encryption.enabled", False, "set it to true; nothing is sealed without")
    return found
