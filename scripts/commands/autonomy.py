"""`countersign autonomy`: which classes of actions people approve unchanged, and what that may suggest."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.table import Table

from activities.services.amendments import InForce
from activities.services.identities import Identities
from activities.services.records import records_of
from models.autonomy import Advice, advice
from models.card import visible
from models.people import People
from models.policy import AgentPolicy
from models.settings import Settings
from scripts.commands.session import Json, Session, console, opened, said, utc_now
from workers import config


def autonomy(
    earned: Annotated[
        int,
        typer.Option(help="How many in a thousand the record must bear, at the least.", min=500, max=999),
    ] = 950,
    as_json: Json = False,
) -> None:
    """Say what the ledger suggests about asking people less, or more; it changes nothing."""
    found = asyncio.run(suggested(config.load(), earned))
    if as_json:
        said([one.model_dump(mode="json") for one in found])
        return
    if not found:
        console().print("No proposal has been decided yet, so nothing is suggested.")
        return
    table = Table("agent", "action", "class", "unchanged", "95 % interval", "undone", "suggestion")
    for one in found:
        table.add_row(*_row(one))
    console().print(table)
    for one in found:
        console().print(f"{_name(one)}: {one.suggestion}, since {one.why}")


async def suggested(settings: Settings, earned: int) -> list[Advice]:
    """Advice on every class of actions that stands in the ledger."""
    async with opened(settings) as session:
        records = await records_of(session.database, session.tenant)
        agents = {one.agent: await _policy(session, one.agent) for one in records}
    now = utc_now()
    found = [advice(one, record, agents[one.agent], now, earned) for one, record in records.items()]
    return sorted(found, key=lambda one: tuple(one.action.model_dump(mode="json").values()))


def force_of(settings: Settings) -> InForce:
    """What knows which policy is in force, as the workers see it."""
    return InForce(settings.policy, Identities(People(people=settings.people), utc_now).doubt)


async def _policy(session: Session, agent: str) -> AgentPolicy | None:
    if agent not in session.settings.policy.agents:
        return None
    force = force_of(session.settings)
    return await session.database.read(lambda link: force.of(link, session.tenant, agent))


def _row(one: Advice) -> tuple[str, ...]:
    return (
        visible(one.action.agent),
        _name(one),
        one.action.reversibility,
        f"{one.record.unchanged} of {one.record.decided}",
        f"{one.lower_permille / 10:.1f} to {one.upper_permille / 10:.1f} %",
        str(one.record.undone),
        one.suggestion,
    )


def _name(one: Advice) -> str:
    return visible(f"{one.action.connector}.{one.action.operation}")
