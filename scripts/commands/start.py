"""`countersign start AGENT FILE`: a file becomes a request, checked before anything is kept."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from temporalio.client import WorkflowFailureError

from activities.external import SentProposal
from activities.services.content import LIMIT_BYTES
from models.canonical import sha256
from models.card import visible
from models.content import parse_brief
from models.errors import InvalidInput, UnknownName
from models.ledger import EventType
from models.loop import Outcome, Ref, Request, Status, workflow_id
from models.people import PERSON, People, unfit
from models.privacy import found_in
from models.regions import misplaced
from models.settings import Settings
from scripts.commands.session import Json, Session, console, opened, reach, said
from scripts.commands.show import print_outcome
from scripts.exits import Exit, Refused
from temporal.client import is_open, submit
from workers import config, registry

MEDIA = {"content": "text/markdown; charset=utf-8", "external": "application/json"}
NOT_OPAQUE = "--key: it stands in the ledger in clear, and stays there; better name requests by opaque ids"
SAID_NO = (Status.REJECTED, Status.EXPIRED)


def start(
    agent: Annotated[str, typer.Argument(help="Who is asked; `countersign agents` lists them.")],
    file: Annotated[Path, typer.Argument(help="The request, for instance a brief; - reads standard input.")],
    key: Annotated[
        str | None, typer.Option(help="Names the request; the same key acts once. Default: from the content.")
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="Whom it is about: its texts go when that subject is forgotten.")
    ] = None,
    as_: Annotated[
        str | None,
        typer.Option("--as", help="Who wants it, and cannot approve it; default: approver in the settings."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the outcome.")] = False,
    as_json: Json = False,
) -> None:
    """Start a run from a file, or find the run that this very file has started before."""
    settings = config.load()
    data = read_file(file)
    title = check(settings, agent, data)
    request = about(request_of(settings, agent, data, key, asking(settings, agent, as_)), subject)
    if key is not None and settings.sealing.enabled and found_in(key):
        console(stderr=True).print(NOT_OPAQUE)
    result = asyncio.run(begin(settings, request, data, title, wait))
    if as_json:
        said(result)
    else:
        _print(result)
    outcome = result["outcome"]
    if wait and outcome is not None:
        _end(Outcome.model_validate(outcome))


def read_file(file: Path) -> bytes:
    """The bytes of a request.

    Raises:
        InvalidInput: it cannot be read, is empty, or is too long.
    """
    try:
        if str(file) == "-":
            data = sys.stdin.buffer.read(LIMIT_BYTES + 1)
        else:
            with file.open("rb") as opened_file:
                data = opened_file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise InvalidInput.field("FILE", str(file), f"name a file you can read ({error.strerror})") from None
    if len(data) > LIMIT_BYTES:
        raise InvalidInput.field(
            "FILE", f"more than {LIMIT_BYTES} bytes", f"keep it under {LIMIT_BYTES} bytes"
        )
    if not data.strip():
        raise InvalidInput.field("FILE", str(file), "it is empty; write the request into it")
    return data


def check(settings: Settings, agent: str, data: bytes) -> str:
    """Refuse what the agent would refuse, before it costs anything; returns a title.

    Raises:
        UnknownName: there is no such agent.
        InvalidInput: names field, value and remedy.
    """
    known = [one.SPEC.name for one in registry.agents()]
    if agent not in known:
        raise UnknownName(f"agent: {agent!r} is not known; known agents: {', '.join(known)}")
    settings.policy.of(agent)
    match agent:
        case "content":
            return _check_brief(settings, data)
        case "external":
            return _check_proposal(data)
        case _:
            return ""


def asking(settings: Settings, agent: str, named: str | None) -> str | None:
    """Who wants a run; `None` where nobody says it and policy does not ask.

    Raises:
        InvalidInput: it is no name, or not that of somebody who may start it.
    """
    who = named or settings.approver
    if who is not None and not PERSON.fullmatch(who):
        raise InvalidInput.field("--as", who, "write 1 to 200 characters without spaces")
    policy = settings.policy.of(agent)
    why = unfit(People(people=settings.people), policy.start_roles, who)
    if why is not None:
        raise InvalidInput.field("--as", who, why)
    return who


def request_of(
    settings: Settings,
    agent: str,
    data: bytes,
    key: str | None = None,
    requester: str | None = None,
    subject: str | None = None,
) -> Request:
    """The request for these bytes; without a key the content names it.

    Raises:
        InvalidInput: the key is too long or empty, or the tenant's requests are another region's.
    """
    ref = Ref(digest=sha256(data), size=len(data), media_type=MEDIA.get(agent, "application/octet-stream"))
    key = sha256(agent.encode() + b"\n" + data)[:20] if key is None else key
    try:
        request = Request(
            tenant=settings.tenant,
            agent=agent,
            region=settings.region,
            key=key,
            body=ref,
            requester=requester,
        )
    except ValidationError:
        raise InvalidInput.field("--key", key, "write 1 to 200 characters") from None
    if (wrong := misplaced(settings, request)) is not None:
        raise InvalidInput(wrong)
    return request


def about(request: Request, subject: str | None) -> Request:
    """The request, said to be about somebody.

    Raises:
        InvalidInput: that is no subject.
    """
    try:
        return Request.model_validate(request.model_dump() | {"subject": subject})
    except ValidationError:
        raise InvalidInput.field("--subject", subject, "write 1 to 200 characters in one line") from None


async def begin(settings: Settings, request: Request, data: bytes, title: str, wait: bool) -> dict[str, Any]:
    """Start the run of a request, unless it has ended; one whose review is still due is taken up again.

    Raises:
        InvalidInput: its key names another request.
    """
    run = workflow_id(request.tenant, request.agent, request.key)
    async with opened(settings) as session:
        await _refuse_other_body(session, request, run)
        outcome = await session.requests.outcome(request.tenant, request.agent, request.key)
        if outcome is not None and not (await session.runs.read(run)).reviewing:
            return _result("ended earlier", request, run, outcome)
        client = await reach(settings)
        word = "found" if await is_open(client, run) else "started"
        await session.content.put(request.tenant, data, _media(request), request.subject, plainly=True)
        started = await submit(client, request, settings.temporal, title)
        if wait:
            outcome = await _outcome(session, request, started.handle.result())
        return _result(word, request, run, outcome)


def _media(request: Request) -> str:
    return request.body.media_type if isinstance(request.body, Ref) else "text/plain; charset=utf-8"


async def _refuse_other_body(session: Session, request: Request, run: str) -> None:
    for event in await session.runs.events(run):
        if event.type is EventType.REQUEST and isinstance(request.body, Ref):
            _compare(request, str(event.body["body"]["digest"]))


def _compare(request: Request, before: str) -> None:
    if isinstance(request.body, Ref) and request.body.digest != before:
        raise InvalidInput.field(
            "--key",
            request.key,
            f"it names another request (content {before[:12]}…, this is {request.body.digest[:12]}…); "
            "use a new key, or send that content again",
        )


async def _outcome(session: Session, request: Request, result: Any) -> Outcome:
    """The ledger has the outcome of a failed run too."""
    try:
        return Outcome.model_validate(await result)
    except WorkflowFailureError as error:
        found = await session.requests.outcome(request.tenant, request.agent, request.key)
        if found is not None:
            return found
        cause = error.cause or error
        raise InvalidInput.field("FILE", request.key, str(getattr(cause, "message", cause))) from None


def _result(word: str, request: Request, run: str, outcome: Outcome | None) -> dict[str, Any]:
    return {
        "workflow_id": run,
        "was": word,
        "agent": request.agent,
        "key": request.key,
        "requester": request.requester,
        "outcome": outcome.model_dump(mode="json") if outcome else None,
    }


def _print(result: dict[str, Any]) -> None:
    out = console()
    words = {
        "found": "this was started before; found the run that has it",
        "ended earlier": "this was asked before and has ended; nothing was started",
    }
    out.print(words.get(str(result["was"]), "started"))
    out.print(f"run      {result['workflow_id']}")
    if result["was"] == "started" and result["requester"] is not None:
        # Whoever works alone finds out here, and not when an approval does not count.
        out.print(f"for      {visible(result['requester'])}, who may approve it only where policy says so")
    if result["outcome"] is not None:
        print_outcome(out, Outcome.model_validate(result["outcome"]))
    else:
        out.print(f"next     countersign show {result['workflow_id']}")


def _end(outcome: Outcome) -> None:
    if outcome.status in SAID_NO:
        raise Refused(f"the run ended {outcome.status}")
    if outcome.status is not Status.EXECUTED:
        raise typer.Exit(Exit.UNEXPECTED)


def _check_brief(settings: Settings, data: bytes) -> str:
    brief = parse_brief(data)
    sites = [site.name for site in settings.sites]
    if brief.target.site not in sites:
        known = ", ".join(sites) or "none"
        raise InvalidInput.field("target", brief.target.site, f"write the name of a site; known: {known}")
    return brief.title


def _check_proposal(data: bytes) -> str:
    try:
        return SentProposal.model_validate_json(data).title
    except ValidationError as error:
        raise InvalidInput.first(error, "FILE") from None
