"""`countersign beliefs`: what agents believe about a subject, how it came to be, and what changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer

from activities.services.beliefs import Beliefs
from models.beliefs import Belief, difference
from models.errors import UnknownName
from scripts.commands.session import Json, Session, console, opened, said
from scripts.exits import EXPLAINED
from workers import config
from workers.compose import utc_now

T = TypeVar("T")
beliefs = typer.Typer(no_args_is_help=True, help="Read what agents believe.")
Subject = Annotated[str, typer.Argument(help="What or whom it is about.")]
Agent = Annotated[str | None, typer.Option(help="Whose belief; may be left out if only one has any.")]
Version = Annotated[int | None, typer.Option(min=1, help="An earlier version.")]


@beliefs.command(epilog=EXPLAINED)
def show(subject: Subject, agent: Agent = None, version: Version = None, as_json: Json = False) -> None:
    """Print a belief, newest unless a version is named."""

    async def run(session: Session, store: Beliefs) -> Belief:
        who = await _agent(session, store, subject, agent)
        if version is None:
            return await store.now(session.tenant, who, subject)
        return await store.at(session.tenant, who, subject, version)

    found = _with(run)
    if as_json:
        said(found.model_dump(mode="json"))
        return
    console().print(f"{found.agent} believes about {found.subject}, version {found.version}:")
    for key, known in sorted(found.fields.items()):
        console().print(f"  {key}: {known.value}  (since {known.since})")
    if found.folded or found.folded_more:
        console().print(f"  folded: {len(found.folded) + found.folded_more} older fields")


@beliefs.command(epilog=EXPLAINED)
def history(
    subject: Subject,
    agent: Agent = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    as_json: Json = False,
) -> None:
    """List the newest versions, oldest first, with what changed each."""

    async def run(session: Session, store: Beliefs) -> Any:
        who = await _agent(session, store, subject, agent)
        return await store.history(session.tenant, who, subject, limit)

    found = _with(run)
    if as_json:
        said([one.model_dump(mode="json") for one in found])
        return
    before: Belief | None = None
    for one in found:
        changes = "; ".join(delta.text() for delta in difference(before, one.belief)) if before else ""
        when = one.at.strftime("%Y-%m-%d %H:%M:%S") if one.at else ""
        console().print(f"{one.belief.version:>6} {when} {one.reason} {changes}")
        before = one.belief


@beliefs.command(epilog=EXPLAINED)
def diff(
    subject: Subject,
    first: Annotated[int, typer.Argument(min=0, metavar="FROM")],
    second: Annotated[int | None, typer.Argument(min=1, metavar="TO")] = None,
    agent: Agent = None,
    as_json: Json = False,
) -> None:
    """Print what changed between two versions, or since one."""

    async def run(session: Session, store: Beliefs) -> Any:
        who = await _agent(session, store, subject, agent)
        tenant = session.tenant
        before = (
            await store.at(tenant, who, subject, first)
            if first
            else Belief(tenant=tenant, agent=who, subject=subject)
        )
        after = await (store.at(tenant, who, subject, second) if second else store.now(tenant, who, subject))
        return difference(before, after)

    found = _with(run)
    if as_json:
        said([delta.model_dump(mode="json") for delta in found])
        return
    for delta in found:
        console().print(delta.text())


async def _agent(session: Session, store: Beliefs, subject: str, named: str | None) -> str:
    known = await store.agents(session.tenant, subject)
    if named is not None and named in known:
        return named
    if named is None and len(known) == 1:
        return known[0]
    remedy = f"name one of {', '.join(known)} with --agent" if known else "nobody believes anything about it"
    raise UnknownName(f"subject: {subject!r} of agent {named or 'unnamed'}: {remedy}")


def _with(use: Callable[[Session, Beliefs], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        async with opened(config.load()) as session:
            return await use(session, Beliefs(session.database, utc_now))

    return asyncio.run(run())
