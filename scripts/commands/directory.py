"""`countersign people` and `countersign tenants`: who may answer, with which keys, and whose records."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rich.table import Table

from activities.services.signatures import fingerprint, unusable
from activities.services.tenants import tenants_of
from models.card import visible
from models.errors import Unavailable
from models.people import Key
from models.policy import policy_digest
from models.settings import Settings
from scripts.commands.session import Json, console, opened, said, utc_now
from workers import config


def people(as_json: Json = False) -> None:
    """List who may answer: their roles, and their keys with what is wrong with them."""
    found = people_of(config.load(), utc_now())
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
        keys = [f"{key['fingerprint']} ({key['state']})" for key in one["keys"]]
        table.add_row(visible(one["person"]), ", ".join(one["roles"]) or "none", "\n".join(keys) or "none")
    console().print(table)


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


def _key(key: Key, now: datetime) -> dict[str, Any]:
    why = unusable(key, now)
    return {
        "fingerprint": fingerprint(key.public),
        "state": "counts" if why is None else why,
        "valid_after": key.valid_after,
        "valid_before": key.valid_before,
    }


def _text(value: Any) -> str:
    if value is None:
        return "?"
    return ", ".join(value) or "none" if isinstance(value, dict) else str(value)
