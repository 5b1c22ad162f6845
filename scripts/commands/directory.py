"""`countersign people` and `countersign tenants`: who may answer, with which keys, and whose records."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.table import Table
from sqlalchemy import Connection

from activities.services.key_life import log_rotation, people_changes
from activities.services.signatures import fingerprint, unusable
from activities.services.signers import signers_lines
from activities.services.tenants import tenants_of
from models.card import visible
from models.errors import InvalidInput, Unavailable
from models.people import SECURITY_KEYS, Key
from models.policy import policy_digest
from models.settings import Settings
from scripts.commands.session import Json, console, opened, said, utc_now
from workers import config

HEADER = (
    "# Who may answer, for `countersign ledger verify --signers`; `ssh-keygen -Y verify -f` reads it too.",
    "# Whoever checks keeps it, and the lines of those who have left, with valid-before.",
)


def people(
    record: Annotated[
        bool, typer.Option("--record", help="Log which keys were added, changed, revoked or removed since.")
    ] = False,
    as_: Annotated[str | None, typer.Option("--as", help="Who changed them, for --record.")] = None,
    signers: Annotated[
        bool, typer.Option("--signers", help="Print their keys as OpenSSH's allowed signers, for auditors.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List who may answer: their roles, and their keys with what is wrong with them."""
    settings = config.load()
    if signers:
        if record or as_:
            raise InvalidInput.field("--signers", "--record", "it only prints; give one of them")
        _allowed(settings, as_json)
        return
    if record:
        _recorded(settings, as_, as_json)
        return
    found = people_of(settings, utc_now())
    if as_json:
        said(found)
        return
    if not found:
        console().print(
            "Nobody is named, so any name counts, as claimed; name some under [[people]] in countersign.toml."
        )
        return
    table = Table("person", "roles", "keys", box=None, pad_edge=False)
    for one in found:
        keys = [_shown(key) for key in one["keys"]]
        table.add_row(visible(one["person"]), ", ".join(one["roles"]) or "none", "\n".join(keys) or "none")
    console().print(table)


def _allowed(settings: Settings, as_json: bool) -> None:
    """As of now: the auditor keeps the lines of those who have left."""
    written = list(signers_lines(sorted(settings.people, key=lambda one: one.name)))
    if as_json:
        found = [(one.name, fingerprint(key.public), line) for one, key, line in written]
        said([{"person": name, "fingerprint": key, "line": line} for name, key, line in found])
        return
    # No table and no colours: what is printed is the file.
    typer.echo("\n".join((*HEADER, *(line for _, _, line in written))))


def _recorded(settings: Settings, as_: str | None, as_json: bool) -> None:
    who = as_ or settings.approver
    if not who:
        raise InvalidInput.field("--as", "nothing", "say who you are, or set approver in countersign.toml")
    changes = asyncio.run(_record(settings, who))
    if as_json:
        said(changes)
        return
    for one in changes:
        console().print(f"{one['change']:<8} {one['key']} of {visible(one['person'])}")
    console().print(f"{len(changes)} changes of keys recorded")


async def _record(settings: Settings, who: str) -> list[dict[str, Any]]:
    def work(link: Connection) -> list[dict[str, Any]]:
        changes = people_changes(link, settings.tenant, settings.people)
        for change in changes:
            log_rotation(link, settings.tenant, who, utc_now(), change)
        return changes

    async with opened(settings) as session:
        return await session.database.write(work)


def tenants(as_json: Json = False) -> None:
    """List the tenants: the one these settings are for, and every other that has records here."""
    settings = config.load()
    found = tenants_in(settings, asyncio.run(_events(settings)))
    if as_json:
        said(found)
        return
    table = Table("tenant", "here", "events", "people", "agents", box=None, pad_edge=False)
    for one in found:
        here = "yes" if one["configured"] else "no"
        table.add_row(one["tenant"], here, *(_text(one[name]) for name in ("events", "people", "agents")))
    console().print(table)


def people_of(settings: Settings, now: datetime) -> list[dict[str, Any]]:
    """Everyone who may answer, by name."""
    return [
        {"person": one.name, "roles": list(one.roles), "keys": [_key(key, now) for key in one.keys]}
        for one in sorted(settings.people, key=lambda one: one.name)
    ]


def tenants_in(settings: Settings, events: Mapping[str, int] | None) -> list[dict[str, Any]]:
    """The tenant of these settings first; `None` is unknown, since there is no database yet."""
    others = sorted(set(events or ()) - {settings.tenant})
    rows: list[dict[str, Any]] = []
    for name in (settings.tenant, *others):
        ours = name == settings.tenant
        agents = {agent: policy_digest(policy) for agent, policy in sorted(settings.policy.agents.items())}
        rows.append(
            {
                "tenant": name,
                "configured": ours,
                "events": None if events is None else events.get(name, 0),
                "people": len(settings.people) if ours else None,
                "agents": agents if ours else None,
            }
        )
    return rows


async def _events(settings: Settings) -> dict[str, int] | None:
    try:
        async with opened(settings) as session:
            return await tenants_of(session.database)
    except Unavailable:
        return None


def _shown(key: Mapping[str, Any]) -> str:
    device = "security key, " if key["kind"] in SECURITY_KEYS else ""
    return f"{key['fingerprint']} ({device}{key['state']})"


def _key(key: Key, now: datetime) -> dict[str, Any]:
    why = unusable(key, now)
    return {
        "fingerprint": fingerprint(key.public),
        "kind": key.kind,
        "state": "counts" if why is None else why,
        "valid_after": key.valid_after,
        "valid_before": key.valid_before,
    }


def _text(value: Any) -> str:
    if value is None:
        return "?"
    return ", ".join(value) or "none" if isinstance(value, dict) else str(value)
