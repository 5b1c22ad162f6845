"""`countersign memory`: search what is remembered, count it, promote it, mend its index, forget a subject."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.table import Table
from sqlalchemy import Connection, func, select

from activities.services.erasure import Erasure
from activities.services.knowing import use_of
from activities.services.leases import Leases
from activities.services.memory_store import MemoryStore
from activities.services.vectors import EMBEDDING, MEMORY, ExactVectors
from models.canonical import sha256
from models.card import visible
from models.errors import InvalidInput
from models.loop import Ref
from models.memory import Recall, Search
from scripts.commands.session import Json, Session, console, opened, said
from scripts.exits import EXPLAINED
from workers import config
from workers.compose import DIMENSIONS_WITHOUT_MODEL, embedding_adapter, http_client, utc_now

T = TypeVar("T")
HOLDER = "command line"
memory = typer.Typer(no_args_is_help=True, help="Search and look after what is remembered.")
As = Annotated[str | None, typer.Option("--as", help="Who asks for it.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask again.")]


@dataclass(frozen=True, slots=True)
class Parts:
    """Memory as a command uses it."""

    session: Session
    store: MemoryStore
    index: Any
    """Weaviate, if settings name one."""
    model: str


@memory.command(epilog=EXPLAINED)
def search(
    query: Annotated[str, typer.Argument(help="Words, or what it is about.")],
    by: Annotated[Search, typer.Option(help="How to look.")] = Search.HYBRID,
    kind: Annotated[list[str], typer.Option(help="Only this kind; may be repeated.")] = [],  # noqa: B006
    agent: Annotated[str | None, typer.Option(help="Only this agent's and everybody's.")] = None,
    as_of: Annotated[datetime | None, typer.Option(help="What counted then, in UTC.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=50)] = 10,
    as_json: Json = False,
) -> None:
    """Find records, best first."""

    async def run(parts: Parts) -> Any:
        tenant = parts.session.tenant
        # Only named and not kept: what somebody looks for is nobody's to remember.
        data = query.encode()
        ref = Ref(digest=sha256(data), size=len(data))
        moment = as_of.replace(tzinfo=utc_now().tzinfo) if as_of else None
        try:
            asked = Recall(
                tenant=tenant, query=ref, kinds=tuple(kind), limit=limit, agent=agent, as_of=moment, by=by
            )
        except ValidationError as error:
            raise InvalidInput.first(error, "query") from None
        return await parts.store.recall(asked, query)

    found = _with(run)
    if as_json:
        said(found.model_dump(mode="json"))
        return
    table = Table("score", "kind", "recorded", "title", "id", box=None, pad_edge=False)
    for hit in found.hits:
        when = hit.recorded_at.strftime("%Y-%m-%d %H:%M")
        table.add_row(str(hit.score_permille), hit.kind, when, hit.title, hit.record_id)
    console().print(table)
    if found.degraded:
        console(stderr=True).print(found.degraded)


@memory.command(epilog=EXPLAINED)
def stats(as_json: Json = False) -> None:
    """Count what is remembered, what waits for a vector, a merge or the index, and short-term hits."""

    async def run(parts: Parts) -> dict[str, Any]:
        tenant = parts.session.tenant
        counts = await parts.session.database.read(lambda link: _counts(link, tenant))
        merges = len(await parts.store.merges(tenant))
        behind = await parts.index.behind(parts.model) if parts.index else 0
        use = await parts.session.database.read(lambda link: use_of(link, utc_now()))
        counts |= {"merge_proposals": merges, "index_behind": behind}
        return counts | {
            "short_term_hits": use.hits,
            "short_term_misses": use.misses,
            "short_term_prewarmed": use.warmed,
            "short_term_hit_permille": use.permille,
        }

    found = _with(run)
    if as_json:
        said(found)
        return
    for name, count in found.items():
        console().print(f"{name:<24} {'unknown' if count is None else count}")


@memory.command(epilog=EXPLAINED)
def promote(record_id: Annotated[str, typer.Argument(metavar="ID")], as_: As = None) -> None:
    """Agree with what a model inferred, so that it counts."""
    who = _who(as_)
    _with(lambda parts: parts.store.promote(parts.session.tenant, record_id, f"person:{who}"))
    console().print(f"promoted {record_id}")


@memory.command(epilog=EXPLAINED)
def diff(as_json: Json = False) -> None:
    """Compare the vector index with SQL; with the exact store there is nothing that could differ."""

    async def run(parts: Parts) -> dict[str, list[str]]:
        if parts.index is None:
            return {"missing": [], "surplus": [], "changed": []}
        gap = await parts.index.diff(parts.session.tenant, parts.model)
        return {"missing": list(gap.missing), "surplus": list(gap.surplus), "changed": list(gap.changed)}

    found = _with(run)
    if as_json:
        said(found)
    else:
        for name, ids in found.items():
            console().print(f"{name:<8} {len(ids)} {' '.join(ids[:5])}")


@memory.command(epilog=EXPLAINED)
def rebuild() -> None:
    """Fill the vector index anew from SQL; search goes on by words meanwhile."""

    async def run(parts: Parts) -> int | None:
        return None if parts.index is None else await parts.index.rebuild(parts.model)

    done = _with(run)
    text = "the exact store reads SQL itself; nothing to rebuild" if done is None else f"{done} vectors"
    console().print(text)


@memory.command(epilog=EXPLAINED)
def forget(
    subject: Annotated[str, typer.Option(help="What or whom to forget, exactly as it was recorded.")],
    yes: Yes = False,
    as_: As = None,
    as_json: Json = False,
) -> None:
    """Erase a subject for good, look everywhere again, and issue a receipt."""
    who = _who(as_)
    if not yes:
        if not sys.stdin or not sys.stdin.isatty():
            raise InvalidInput.field("--yes", False, "give it where nobody can be asked; it cannot be undone")
        typer.confirm(
            f"Erase everything about {visible(subject)}? This cannot be undone", abort=True, err=True
        )

    async def run(parts: Parts) -> Any:
        notices = parts.session.settings.data / "notices"
        erasure = Erasure(parts.session.database, utc_now, parts.index, notices=notices)
        return await erasure.forget(parts.session.tenant, subject, who)

    receipt = _with(run)
    if as_json:
        said(receipt.model_dump(mode="json"))
        return
    removed = ", ".join(f"{count} {name}" for name, count in receipt.removed.items())
    console().print(f"erased {removed}; nothing is left; receipt {receipt.event_id}")


@asynccontextmanager
async def _opened() -> AsyncGenerator[Parts]:
    settings = config.load()
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(opened(settings))
        embedder, dimensions = None, DIMENSIONS_WITHOUT_MODEL
        if (server := settings.embedding_server) is not None:
            client = await stack.enter_async_context(http_client(server))
            embedder, dimensions = embedding_adapter(server, client), server.dimensions
        index: Any = None
        if settings.vector_index is not None:
            from activities.services.weaviate_store import WeaviateVectors, connected

            leases = Leases(session.database, HOLDER, utc_now)
            reached = await stack.enter_async_context(connected(settings.vector_index))
            index = WeaviateVectors(session.database, reached, leases, dimensions)
        vectors = index or ExactVectors(session.database, dimensions)
        store = MemoryStore(session.database, session.content, embedder, vectors)
        yield Parts(session, store, index, embedder.model if embedder else "")


def _with(use: Callable[[Parts], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        async with _opened() as parts:
            return await use(parts)

    return asyncio.run(run())


def _who(named: str | None) -> str:
    who = named or config.load().approver
    if not who:
        raise InvalidInput.field("--as", "nothing", "say who you are, or set approver in countersign.toml")
    return who


def _counts(connection: Connection, tenant: str) -> dict[str, Any]:
    live = (MEMORY.c.tenant == tenant, MEMORY.c.forgotten_at.is_(None))
    by = select(MEMORY.c.kind, MEMORY.c.standing, func.count()).where(*live)
    rows = connection.execute(by.group_by(MEMORY.c.kind, MEMORY.c.standing)).all()
    counts = {f"{kind} {standing}": count for kind, standing, count in sorted(map(tuple, rows))}
    full = select(func.count()).where(EMBEDDING.c.tenant == tenant, func.length(EMBEDDING.c.vector) > 0)
    return counts | {"vectors": connection.execute(full).scalar_one()}
