"""What commands stand on: settings, the database, Temporal, and how they speak."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from sqlalchemy import make_url

from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.ledger_store import LedgerStore
from activities.services.requests import Requests
from activities.services.residence import stores
from activities.services.runs import Runs
from models.errors import Unavailable
from models.settings import Settings

if TYPE_CHECKING:
    from temporalio.client import Client

    from temporal.answering import Answering

CONNECT_SECONDS = 10.0
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Run = Annotated[str, typer.Argument(metavar="ID", help="The run's workflow id.")]


@dataclass(frozen=True, slots=True)
class Session:
    """The database as a command sees it; it works while no worker runs."""

    settings: Settings
    database: Database

    @property
    def tenant(self) -> str:
        """Whose records."""
        return self.settings.tenant

    @property
    def ledger(self) -> LedgerStore:
        """Events."""
        return LedgerStore(self.database, utc_now)

    @property
    def content(self) -> ContentStore:
        """Blobs."""
        return ContentStore(self.database)

    @property
    def requests(self) -> Requests:
        """Claims and outcomes."""
        return Requests(self.database, self.settings.policy, self.settings.pace, utc_now)

    @property
    def runs(self) -> Runs:
        """What is recorded of runs."""
        return Runs(self.ledger, self.content, self.tenant)

    def answering(self, client: Client) -> Answering:
        """Answers to what waits."""
        from temporal.answering import Answering

        return Answering(client, self.runs, self.ledger, self.tenant)


def utc_now() -> datetime:
    """The time, aware."""
    return datetime.now(UTC)


@asynccontextmanager
async def opened(settings: Settings) -> AsyncGenerator[Session]:
    """The database, if there is one.

    Raises:
        Unavailable: it was never made; nothing is made here.
    """
    url = make_url(settings.database_url)
    # Connecting would leave an empty file behind, which looks like a database.
    if url.drivername.startswith("sqlite") and not Path(url.database or "").exists():
        raise Unavailable(
            f"database: {url.database} is not there yet; start `countersign up`, or set COUNTERSIGN_DATA"
        )
    held = ExitStack()
    try:
        yield Session(settings, held.enter_context(stores(settings)))
    finally:
        await asyncio.to_thread(held.close)


async def reach(settings: Settings) -> Client:
    """Temporal.

    Raises:
        Unavailable: it does not answer.
    """
    from temporal.client import connect
    from temporal.converter import codec_of

    codec = codec_of(settings.sealing, settings.data, settings.region_url or settings.database_url)
    try:
        return await asyncio.wait_for(connect(settings.temporal, codec), CONNECT_SECONDS)
    except (RuntimeError, TimeoutError):
        raise Unavailable(
            f"temporal.address: {settings.temporal.address} does not answer; start `countersign up`, "
            "or set COUNTERSIGN_TEMPORAL__ADDRESS"
        ) from None


def said(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def console(stderr: bool = False) -> Console:
    """For people; texts are never read as markup, and never cut when nobody's terminal sets a width."""
    out = Console(highlight=False, markup=False, emoji=False, stderr=stderr)
    return (
        out
        if out.is_terminal
        else Console(highlight=False, markup=False, emoji=False, stderr=stderr, soft_wrap=True, width=200)
    )


def on_terminal() -> bool:
    """Whether a person reads and types here."""
    return sys.stdin.isatty() and sys.stdout.isatty()
