"""The desk: what waits, as pages for people and as JSON for programs, and the way to answer over HTTP.

It shows the card that was bound and hands answers to the run as every channel does. Its token says who may
come here, not who they are: a name counts as claimed unless the answer is signed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast
from urllib.parse import quote

from aiohttp import web
from temporalio.client import Client
from temporalio.service import RPCError

from activities.services import pages
from activities.services.ledger_store import LedgerStore
from activities.services.runs import Reading, Runs
from activities.services.signing_in import Handler, SignedIn, form_of, refusal
from models.channels import DeskSettings, path_of
from models.errors import CountersignError, InvalidInput, LedgerBroken
from models.gate import Judged, Kind, Refusal, read_message
from temporal.answering import Answering
from temporal.inbox import waiting

HTML = "text/html"


class Desk(SignedIn):
    """`GET /`, `GET /runs/ID` and `POST /runs/ID/approve|reject|revise|delegate`."""

    title = "desk"
    setting = "desk.token"
    cookie = "countersign_desk"
    same_site = "Lax"  # Whoever follows the link in a mail shall not have to sign in again.

    def __init__(
        self,
        client: Client,
        runs: Runs,
        ledger: LedgerStore,
        tenant: str,
        settings: DeskSettings,
        people: Sequence[str] = (),
    ) -> None:
        """Args: Temporal and the ledger of one tenant; port, token and address; names to offer.

        Raises:
            InvalidInput: there is no token, or it can be guessed.
        """
        super().__init__(settings.token, settings.port, address=settings.found_at)
        self._client = client
        self._runs = runs
        self._tenant = tenant
        self._answering = Answering(client, runs, ledger, tenant)
        self._people = tuple(people)

    def _routes(self, app: web.Application) -> None:
        app.router.add_get("/", self._list)
        app.router.add_get("/runs/{run}", self._show)
        app.router.add_post("/runs/{run}/{kind}", self._take)
        app.router.add_get("/runs/{run}/{kind}", self._back)

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await super()._answered(request, handler)
        except InvalidInput as error:
            return self._failed(request, 404 if error.message.startswith("ID:") else 422, error.message)
        except LedgerBroken as error:
            return self._failed(request, 500, error.message)
        except CountersignError as error:
            return self._failed(request, 503, error.message)
        except RPCError:
            return self._failed(request, 503, "Temporal does not answer; look with `countersign doctor`")

    def _failed(self, request: web.Request, status: int, text: str) -> web.StreamResponse:
        if not _reads_pages(request):
            return refusal(status, text)
        if status == 401 and request.method == "GET":
            return _to(f"/signin?next={quote(request.path_qs, safe='')}")
        return _page(pages.word_page(text), status)

    def _welcome(self, path: str) -> web.Response:
        return _to(path or "/")

    async def _list(self, request: web.Request) -> web.Response:
        rows = await waiting(self._client, self._runs, self._tenant)
        return _page(pages.list_page(rows)) if _reads_pages(request) else web.json_response(rows)

    async def _show(self, request: web.Request) -> web.Response:
        reading = await self._runs.read(request.match_info["run"])
        if _reads_pages(request):
            return _page(await self._drawn(reading))
        return web.json_response(reading.plain() | {"card": reading.card.full if reading.card else ""})

    async def _drawn(self, reading: Reading, judged: Judged | None = None) -> str:
        # A diff may be of megabytes, and the role does other things besides.
        return await asyncio.to_thread(pages.run_page, reading, self._people, judged)

    async def _back(self, request: web.Request) -> web.Response:
        """A browser that comes again to where it answered."""
        return _to(path_of(request.match_info["run"]))

    async def _take(self, request: web.Request) -> web.Response:
        run, kind = request.match_info["run"], _kind(request.match_info["kind"])
        message = await _message(request)
        read = read_message(kind, [message])
        if isinstance(read, Refusal):
            raise InvalidInput.field(read.field, message.get(read.field), read.remedy)
        judged = await self._answering.give(run, kind, message)
        status = 200 if judged.counted else 409
        if _reads_pages(request):
            return _page(await self._drawn(await self._runs.read(run), judged), status)
        return web.json_response(judged.model_dump(mode="json"), status=status)


def _reads_pages(request: web.Request) -> bool:
    """A browser; programs that name nothing get JSON."""
    return HTML in request.headers.get("Accept", "")


def _kind(name: str) -> Kind:
    try:
        return Kind(name)
    except ValueError:
        raise web.HTTPNotFound(reason=f"post to one of {', '.join(Kind)}") from None


async def _message(request: web.Request) -> dict[str, Any]:
    """What was sent, from a form or as JSON; fields that were left empty are left out."""
    if request.content_type == "application/json":
        return _object(await request.read())
    message: dict[str, Any] = {name: value for name, value in (await form_of(request)).items() if value}
    return message | {"review": True} if message.get("review") == "true" else message


def _object(data: bytes) -> dict[str, Any]:
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise web.HTTPBadRequest(reason="send one JSON object with digest and approver")
    return cast(dict[str, Any], given)


def _page(text: str, status: int = 200) -> web.Response:
    headers = {"Content-Security-Policy": pages.POLICY}
    return web.Response(text=text, status=status, content_type=HTML, headers=headers)


def _to(path: str) -> web.Response:
    return web.Response(status=303, headers={"Location": path})
