"""`countersign policy`: what passes without a person, how it came to that, and proposing that it change."""

from __future__ import annotations

import asyncio
import tomllib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table
from sqlalchemy import Connection

from activities.amendments import SentAmendment
from activities.services.amendments import InForce, Rules
from activities.services.ledger_store import entries_in
from models.amendments import Autonomy, lines, without
from models.autonomy import Advice, Suggestion
from models.canonical import canonical, sha256
from models.card import visible
from models.errors import InvalidInput
from models.ledger import Entry, EventType, policy_stream
from models.loop import Exemption
from models.policy import POLICY_AGENT
from models.settings import Settings
from scripts.commands.answer import As
from scripts.commands.autonomy import force_of, suggested
from scripts.commands.findings import Finding, Health
from scripts.commands.session import Json, Session, console, opened, said, utc_now
from scripts.commands.start import asking, begin, read_file, request_of
from scripts.exits import EXPLAINED
from workers import config

MOVING = (Suggestion.GRANT, Suggestion.NARROW)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The bounds of a grant that a suggestion leads to."""

    targets: list[str]
    uses: int | None
    days: int | None


policy = typer.Typer(
    no_args_is_help=True,
    epilog=EXPLAINED,
    add_completion=False,
    help="What passes without a person, and changing it by an intent.",
)


@policy.command(epilog=EXPLAINED)
def show(
    agent: Annotated[str | None, typer.Argument(help="Of this agent; default: of each.")] = None,
    as_json: Json = False,
) -> None:
    """Say which policy is in force, and whether that is the file's or a change over it."""
    settings = config.load()
    found = asyncio.run(_rules(settings, agent))
    if as_json:
        said([_plain(one) for one in found])
        return
    out = console()
    for one in found:
        out.print(f"{one.agent}: {_source(one)}   digest {one.digest}")
        for line in lines(one.policy):
            out.print(f"  {visible(line)}")


@policy.command(epilog=EXPLAINED)
def history(
    agent: Annotated[str | None, typer.Argument(help="Of this agent; default: of each.")] = None,
    as_json: Json = False,
) -> None:
    """List what was changed by intents, and what was narrowed since."""
    settings = config.load()
    found = asyncio.run(_history(settings, agent))
    if as_json:
        said(found)
        return
    table = Table("when", "agent", "what", "run")
    for one in found:
        table.add_row(one["at"], one["agent"], visible(one["what"]), visible(one["run"]))
    console().print(table if found else "Nothing was changed by an intent.")


@policy.command(epilog=EXPLAINED)
def propose(
    file: Annotated[
        Path | None, typer.Argument(help="TOML: agent, why, and what passes without a person; - is stdin.")
    ] = None,
    from_suggestion: Annotated[
        str | None, typer.Option(help="AGENT/CONNECTOR.OPERATION, as `countersign autonomy` suggests it.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="With a suggestion: what the grant covers, as 'vendure:sku-1*'.")
    ] = None,
    uses: Annotated[int | None, typer.Option(help="With a suggestion: how often.", min=1)] = None,
    days: Annotated[int | None, typer.Option(help="With a suggestion: how long.", min=1, max=3650)] = None,
    earned: Annotated[int, typer.Option(help="As for `countersign autonomy`.", min=500, max=999)] = 950,
    as_: As = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the outcome.")] = False,
    as_json: Json = False,
) -> None:
    """Put a change of policy to the people whom the file names for it; nothing changes before they agree."""
    settings = config.load()
    if (file is None) == (from_suggestion is None):
        raise InvalidInput.field(
            "FILE", file and str(file), "give a FILE, or --from-suggestion, one of the two"
        )
    if not settings.policy.may_change:
        raise InvalidInput.field(
            "policy.agents", POLICY_AGENT, "the file names nobody who may agree to a change; see docs/gate.md"
        )
    if as_ is None and settings.approver is None:
        raise InvalidInput.field("--as", None, "say who asks for the change; they cannot approve it")
    result = asyncio.run(
        _propose(settings, file, from_suggestion or "", Wanted(target or [], uses, days), earned, as_, wait)
    )
    if as_json:
        said(result)
        return
    console().print(f"{result['was']}\nrun      {result['workflow_id']}")
    console().print(f"next     countersign show {result['workflow_id']}")


async def look_at_policy(settings: Settings) -> list[Finding]:
    """For `countersign doctor`: a change that does not count any more."""
    if not settings.policy.may_change or not await _is_there(settings):
        return []
    found: list[Finding] = []
    for one in await _rules(settings, None):
        if one.source == "lapsed":
            use = f"`countersign policy show {one.agent}`; propose it again, or put it into the file"
            found.append(Finding(f"policy {one.agent}", Health.ABSENT, f"a change lapsed: {one.why}", use))
    return found or [Finding("policy", Health.OK, "changes by intents are permitted, and none has lapsed")]


async def proposed(
    settings: Settings, sent: dict[str, Any], requester: str | None, wait: bool = False
) -> dict[str, Any]:
    """Start the run that puts a change to people.

    Raises:
        InvalidInput: a field does not fit; names it.
    """
    force = force_of(settings)
    agent = str(sent.get("agent"))
    try:
        wanted = SentAmendment.model_validate(sent | {"base": force.base})
    except ValidationError as error:
        raise InvalidInput.first(error, "FILE", wrapped={"autonomy"}) from None
    async with opened(settings) as session:
        rules = await _read(session, force, agent)
    data = canonical(wanted)
    # The same rules may be proposed again once they were narrowed.
    key = sha256(data + f"\n{rules.version}".encode())[:20]
    who = asking(settings, POLICY_AGENT, requester)
    return await begin(
        settings, request_of(settings, POLICY_AGENT, data, key, who), data, f"policy of {agent}", wait
    )


async def earned_by(settings: Settings, name: str, wanted: Wanted, earned: int) -> dict[str, Any]:
    """What a suggestion comes to, as a change: one grant more, or nothing left of what it may do alone.

    Raises:
        InvalidInput: nothing is suggested of that name, or a grant has no bounds.
    """
    found = {_name(one): one for one in await suggested(settings, earned)}
    moving = {key: one for key, one in found.items() if one.suggestion in MOVING}
    if name not in moving:
        why = found[name].why if name in found else f"known: {', '.join(moving) or 'none'}"
        raise InvalidInput.field("--from-suggestion", name, f"nothing is suggested for it: {why}")
    one, force = moving[name], force_of(settings)
    async with opened(settings) as session:
        rules = await _read(session, force, one.action.agent)
    if one.suggestion is Suggestion.NARROW:
        nothing = Autonomy().over(rules.policy)
        autonomy = Autonomy.of(without(rules.policy, nothing, one.action))
    else:
        autonomy = Autonomy.of(rules.policy)
        grants = (*autonomy.grants, _grant(one, wanted, rules.version))
        autonomy = autonomy.model_copy(update={"grants": grants})
    return {
        "agent": one.action.agent,
        "autonomy": autonomy.model_dump(mode="json"),
        "why": f"suggested by the record: {one.why}",
    }


def _grant(one: Advice, wanted: Wanted, version: int) -> Exemption:
    if not wanted.targets or wanted.uses is None or wanted.days is None:
        raise InvalidInput.field(
            "--target", wanted.targets, "give --target, --uses and --days; none is guessed"
        )
    return Exemption(
        name=f"earned-{version + 1}-{one.action.operation}"[:63],
        connector=one.action.connector,
        operations=(one.action.operation,),
        targets=tuple(wanted.targets),
        up_to=one.action.reversibility,
        max_uses=wanted.uses,
        valid_until=(utc_now() + timedelta(days=wanted.days)).replace(microsecond=0),
    )


async def _propose(
    settings: Settings,
    file: Path | None,
    suggestion: str,
    wanted: Wanted,
    earned: int,
    as_: str | None,
    wait: bool,
) -> dict[str, Any]:
    sent = await earned_by(settings, suggestion, wanted, earned) if file is None else _sent(file)
    return await proposed(settings, sent, as_, wait)


def _sent(file: Path) -> dict[str, Any]:
    """A change as people write it."""
    try:
        tree = tomllib.loads(read_file(file).decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput.field("FILE", str(file), f"correct the TOML: {error}") from None
    beside = {name: tree.pop(name) for name in ("agent", "why") if name in tree}
    return beside | {"autonomy": tree}


async def _is_there(settings: Settings) -> bool:
    from sqlalchemy import make_url

    url = make_url(settings.database_url)
    return not url.drivername.startswith("sqlite") or Path(url.database or "").exists()


async def _rules(settings: Settings, agent: str | None) -> list[Rules]:
    force = force_of(settings)
    names = sorted(settings.policy.agents) if agent is None else [agent]
    async with opened(settings) as session:
        return [await _read(session, force, name) for name in names]


async def _read(session: Session, force: InForce, agent: str) -> Rules:
    return await session.database.read(lambda link: force.rules(link, session.tenant, agent))


async def _history(settings: Settings, agent: str | None) -> list[dict[str, Any]]:
    names = sorted(settings.policy.agents) if agent is None else [agent]

    def read(link: Connection) -> list[Entry]:
        return [one for name in names for one in entries_in(link, settings.tenant, policy_stream(name))]

    async with opened(settings) as session:
        entries = await session.database.read(read)
    entries.sort(key=lambda one: one.recorded_at)
    return [
        {
            "at": one.recorded_at.isoformat(timespec="seconds"),
            "agent": one.body["agent"],
            "what": _what(one),
            "run": str(one.body.get("run", "")),
            "event": one.type.value,
            "body": one.body,
        }
        for one in entries
    ]


def _what(entry: Entry) -> str:
    body = entry.body
    if entry.type is EventType.POLICY_NARROWED:
        of = body["class"]
        return f"narrowed: {of['connector']}.{of['operation']} ({of['reversibility']}), since {body['why']}"
    return "withdrawn" if "withdraws" in body else f"changed on intent {body['digest'][:12]}"


def _name(one: Advice) -> str:
    return f"{one.action.agent}/{one.action.connector}.{one.action.operation}"


def _source(one: Rules) -> str:
    if one.source == "narrowed":
        lost = ", ".join(f"{of.connector}.{of.operation}" for of in one.narrowed)
        return f"changed by an intent, then narrowed for {lost}; people have to agree anew"
    words = {
        "file": "as in the file",
        "changed": "changed by an intent",
        "lapsed": f"a change lapsed: {one.why}",
    }
    return words[one.source]


def _plain(one: Rules) -> dict[str, Any]:
    plain = one.model_dump(mode="json", exclude={"policy", "version"})
    return plain | {"autonomy": Autonomy.of(one.policy).model_dump(mode="json")}
