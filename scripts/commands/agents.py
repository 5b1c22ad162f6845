"""`countersign agents`: who can be asked, and what policy lets them do."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from models.settings import Settings
from scripts.commands.session import Json, console, said
from workers import config, registry

UNKNOWN = "There is no such agent: correct the name under [policy.agents], or add it"


def agents(as_json: Json = False) -> None:
    """List the agents that were found, and what policy lets them do."""
    found = listed(config.load())
    if as_json:
        said(found)
        return
    table = Table("agent", "may use", "approvals", "does", box=None, pad_edge=False)
    for one in found:
        table.add_row(one["agent"], _connectors(one), _approvals(one), one["summary"])
    console().print(table)


def listed(settings: Settings) -> list[dict[str, Any]]:
    """Every agent with its policy, without which it may do nothing, and policies of agents there are not."""
    found = {agent.SPEC.name: agent.SPEC.summary for agent in registry.agents()}
    unknown = {name: UNKNOWN for name in sorted(settings.policy.agents.keys() - found)}
    rows: list[dict[str, Any]] = []
    for name, summary in (found | unknown).items():
        policy = settings.policy.agents.get(name)
        rows.append(
            {"agent": name, "summary": summary, "policy": policy.model_dump(mode="json") if policy else None}
        )
    return rows


def _connectors(one: dict[str, Any]) -> str:
    return ", ".join(one["policy"]["connectors"]) or "nothing" if one["policy"] else "nothing: no policy"


def _approvals(one: dict[str, Any]) -> str:
    if not one["policy"]:
        return "-"
    gate = one["policy"]["gate"]
    return "automatic" if gate["automatic"] else ", ".join([str(gate["approvals"]), *gate["roles"]])
