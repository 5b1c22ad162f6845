"""`countersign demo`: three briefs through the whole loop on this machine, and then nothing is left running.

Everything is kept in the data folder, so that `countersign up` and `countersign ledger tail` show it
afterwards. A brief whose run has ended is asked for again as a new edition under another address: a request
that was answered once is answered for ever.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.status import Status as Spinner
from temporalio.client import Client, WorkflowFailureError
from temporalio.service import RPCError

from models.card import visible
from models.content import Brief, Target, parse_brief, render_brief, slug_candidates
from models.errors import ConnectorUnavailable, Unavailable
from models.ledger import Event, EventType
from models.loop import Outcome, Request, Status
from models.settings import Settings
from models.visibility import State
from scripts import stack
from scripts.commands.pages import Page, read_page
from scripts.commands.people import AtTerminal, Person, Played, typed_line
from scripts.commands.ports import with_free_ports
from scripts.commands.session import Json, Session, console, on_terminal, opened, reach, said
from scripts.commands.start import check, request_of
from scripts.commands.up import Progress
from scripts.exits import Exit
from temporal.client import Started, submit
from workers import config

BRIEFS = Path(__file__).resolve().parents[2] / "examples" / "briefs"
AGENT = "content"
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 900.0
"""Without any news from any run; a model on a busy machine may take minutes for one answer."""
SLUG_ROOM = 70


@dataclass(slots=True)
class Piece:
    """One brief on its way."""

    brief: Brief
    request: Request
    started: Started
    result: asyncio.Task[Outcome]
    seen: int = 0
    """The newest event that was told."""
    answered: dict[str, int] = field(default_factory=dict[str, int])
    """Digest to the newest event before its answer was sent."""
    outcome: Outcome | None = None
    page: Page | None = None
    problem: str = ""

    @property
    def run(self) -> str:
        """Its workflow id."""
        return self.started.workflow_id


def demo(
    data: Annotated[Path | None, typer.Option(help="Folder for everything that is kept.")] = None,
    as_json: Json = False,
) -> None:
    """Draft three posts with the local model, ask you about each, publish what you approve, and stop."""
    settings = config.load()
    if data is not None:
        settings = settings.model_copy(update={"data": data})
    began = time.monotonic()
    out = console(stderr=as_json)
    try:
        settings, pieces, person = asyncio.run(_demo(settings, out))
    except asyncio.CancelledError:
        raise Unavailable("stopped before the demo was done; run it again to go on") from None
    summary = _summary(settings, pieces, person, time.monotonic() - began)
    if as_json:
        said(summary)
    else:
        _print(out, summary)
    raise typer.Exit(Exit.DONE if summary["complete"] else Exit.UNEXPECTED)


async def _demo(settings: Settings, out: Console) -> tuple[Settings, list[Piece], str]:
    _stop_on_terminate()
    person = await _person(settings, out)
    if stack.holder(settings) is None:
        settings = with_free_ports(settings, lambda text: out.print(text))
    out.print("starting Temporal, the model servers and the workers")
    async with AsyncExitStack() as all_of_it:
        running = await all_of_it.enter_async_context(stack.stack(settings, Progress(out).take))
        session = await all_of_it.enter_async_context(opened(settings))
        client = await reach(settings)
        for name, address in running.addresses.items():
            out.print(f"{name:<12} {address}")
        show = Demo(session, client, person, out)
        pieces = await show.submit(sorted(BRIEFS.glob("*.md")))
        await show.follow(pieces)
        await show.look(pieces)
        out.print("stopping everything")
    return settings, pieces, person.name


class Demo:
    """Runs briefs to their ends against a running stack."""

    def __init__(self, session: Session, client: Client, person: Person, out: Console) -> None:
        """`person` answers every card; `out` is told what happens."""
        self._session = session
        self._client = client
        self._person = person
        self._out = out
        self._spinner = Spinner("", console=out) if out.is_terminal else None

    async def submit(self, files: Sequence[Path]) -> list[Piece]:
        """Start one run per brief."""
        return [await self._submit(file) for file in files]

    async def follow(self, pieces: Sequence[Piece]) -> None:
        """Tell what happens, have every card answered, and return once all runs have ended.

        Raises:
            Unavailable: nothing moves any more.
        """
        news = time.monotonic()
        try:
            while open_ := [piece for piece in pieces if piece.outcome is None and not piece.problem]:
                moved = [await self._step(piece) for piece in open_]
                self._spin(open_)
                if any(moved):
                    news = time.monotonic()
                elif time.monotonic() - news > PATIENCE_SECONDS:
                    raise Unavailable(
                        f"nothing has moved for {PATIENCE_SECONDS:.0f} s; see the logs in "
                        f"{stack.log_folder(self._session.settings)}, and run it again to go on"
                    )
                await asyncio.sleep(POLL_SECONDS)
        finally:
            for piece in pieces:
                piece.result.cancel()
            self._still()

    async def look(self, pieces: Sequence[Piece]) -> None:
        """Read every published page as its readers do."""
        async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
            for piece in pieces:
                links = [link for r in (piece.outcome.receipts if piece.outcome else ()) for link in r.links]
                if not links:
                    continue
                try:
                    piece.page = await read_page(
                        self._session.settings, client, links[0], piece.brief.key_facts
                    )
                except ConnectorUnavailable as error:
                    piece.problem = error.message

    async def _submit(self, file: Path) -> Piece:
        settings, session = self._session.settings, self._session
        data, request = await self._unanswered(file.read_bytes())
        brief = parse_brief(data)
        await session.content.put(request.tenant, data, "text/markdown; charset=utf-8")
        started = await submit(self._client, request, settings.temporal, brief.title)
        self._out.print(f"asked for {brief.title!r} ({file.name}) as {started.workflow_id}")
        return Piece(brief, request, started, asyncio.ensure_future(started.handle.result()))

    async def _unanswered(self, original: bytes) -> tuple[bytes, Request]:
        """The first edition whose run has not ended yet."""
        number = 1
        while True:
            data = edition(original, number)
            check(self._session.settings, AGENT, data)
            request = request_of(self._session.settings, AGENT, data)
            if await self._session.requests.outcome(request.tenant, request.agent, request.key) is None:
                return data, request
            number += 1

    async def _step(self, piece: Piece) -> bool:
        """Look at one run; whether there was news."""
        events = await self._session.runs.events(piece.run)
        fresh = [event for event in events if event.seq > piece.seen]
        for event in fresh:
            self._tell(piece, event)
        piece.seen = events[-1].seq if events else 0
        if piece.result.done():
            await self._end(piece)
            return True
        if await self._waits(piece, events):
            await self._answer(piece)
            return True
        return bool(fresh)

    async def _waits(self, piece: Piece, events: Sequence[Event]) -> bool:
        """Whether a card is open that has no answer, or none that counted."""
        try:
            status = await piece.started.handle.query("status")
        except RPCError:
            # No worker at this moment; the launcher starts it again.
            return False
        digest = str(status["intent"] or "")
        if status["state"] != State.WAITING.value or not digest:
            return False
        sent = piece.answered.get(digest)
        refused = [e for e in events if e.type is EventType.REFUSAL and sent is not None and e.seq > sent]
        return sent is None or bool(refused)

    async def _answer(self, piece: Piece) -> None:
        reading = await self._session.runs.read(piece.run)
        if reading.card is None or reading.waiting is None:
            return
        self._still()
        reply = await self._person.answer(piece.run, reading.card)
        piece.answered[reading.card.digest] = piece.seen
        await piece.started.handle.signal(reply.kind.value, reply.message)

    async def _end(self, piece: Piece) -> None:
        try:
            piece.outcome = await piece.result
        except WorkflowFailureError as error:
            key = piece.request
            piece.outcome = await self._session.requests.outcome(key.tenant, key.agent, key.key)
            cause = error.cause or error
            piece.problem = str(getattr(cause, "message", cause))
        self._out.print(f"{piece.brief.title}: ended {piece.outcome.status if piece.outcome else 'failed'}")

    def _tell(self, piece: Piece, event: Event) -> None:
        text = told(event)
        if text:
            self._out.print(f"{piece.brief.title}: {visible(text)}")

    def _spin(self, open_: Sequence[Piece]) -> None:
        if self._spinner is not None:
            self._spinner.update(f"{len(open_)} of them under way; the model works")
            self._spinner.start()

    def _still(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()


def edition(data: bytes, number: int) -> bytes:
    """The brief itself, or from the second on the same under an address of its own."""
    if number == 1:
        return data
    brief = parse_brief(data)
    slug = f"{slug_candidates(brief)[0][:SLUG_ROOM].rstrip('-')}-{number}"
    return render_brief(brief.model_copy(update={"target": Target(site=brief.target.site, slug=slug)}))


def told(event: Event) -> str:
    """An event in words for somebody who watches; empty for what is no news."""
    body = event.body
    match event.type:
        case EventType.ROUTE:
            return f"the model ({', '.join(body['route']['tiers'][:1])}) works on: {body['route']['purpose']}"
        case EventType.FALLBACK:
            return f"{body['tier']} failed ({body['reason']}); next: {body['to'] or 'nobody'}"
        case EventType.INTENT:
            return f"intent {body['number']} is logged and waits for a person"
        case EventType.VERDICT:
            return f"{body['kind']} by {body['approver']} counted"
        case EventType.REFUSAL:
            return f"an answer did not count: {body.get('field', '')}: {body.get('remedy', '')}"
        case EventType.APPLY:
            return "publishing"
        case _:
            return ""


def _stop_on_terminate() -> None:
    task, asked = asyncio.current_task(), asyncio.Event()

    def stop() -> None:
        # Only once: a second cancel would interrupt the orderly stop, which has limits of its own.
        if task is not None and not asked.is_set():
            asked.set()
            task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)


async def _person(settings: Settings, out: Console) -> Person:
    if not on_terminal():
        return Played(out)
    name = settings.approver or ""
    while not name or " " in name:
        out.print(
            "Your name or address, without blanks; it stands in the ledger beside each answer:", end=" "
        )
        name = (await typed_line()).strip()
    return AtTerminal(out, name, typed_line)


def _summary(settings: Settings, pieces: Sequence[Piece], person: str, seconds: float) -> dict[str, Any]:
    shown = [_shown(piece) for piece in pieces]
    return {
        "approver": person,
        "played": person == Played.name,
        "data": str(settings.data.absolute()),
        "seconds": round(seconds, 1),
        "posts": shown,
        # A rejected post is no failure when a person rejected it.
        "complete": bool(pieces) and all(_well(piece) for piece in pieces),
    }


def _well(piece: Piece) -> bool:
    if piece.problem or piece.outcome is None:
        return False
    if piece.outcome.status is Status.EXECUTED:
        return piece.page is not None and piece.page.complete
    return piece.outcome.status is Status.REJECTED


def _shown(piece: Piece) -> dict[str, Any]:
    page = piece.page
    return {
        "title": piece.brief.title,
        "workflow_id": piece.run,
        "outcome": piece.outcome.status.value if piece.outcome else None,
        "reason": piece.problem or (piece.outcome.reason if piece.outcome else ""),
        "digest": piece.outcome.digest if piece.outcome else None,
        "address": page.address if page else None,
        "file": str(page.file) if page else None,
        "bytes": page.size if page else 0,
        "facts": len(piece.brief.key_facts),
        "missing_facts": list(page.missing) if page else [],
    }


def _print(out: Console, summary: dict[str, Any]) -> None:
    for post in summary["posts"]:
        out.print()
        out.print(f"{post['title']}: {post['outcome'] or 'no outcome'}", style="bold")
        if post["reason"]:
            out.print(f"  {visible(post['reason'])}")
        if post["address"]:
            found = post["facts"] - len(post["missing_facts"])
            out.print(f"  {post['address']}")
            out.print(f"  {post['file']} ({post['bytes']} bytes, {found} of {post['facts']} key facts)")
        for fact in post["missing_facts"]:
            out.print(f"  missing: {visible(fact)}")
    out.print(
        f"\n{summary['seconds']:.0f} s in all. Nothing is left running; all of it is in {summary['data']}."
    )
    out.print("`countersign up` serves the site and the Temporal UI again.")
    out.print("`countersign ledger tail` shows the record.")
