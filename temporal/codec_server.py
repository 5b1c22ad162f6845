"""Opens sealed payloads for the Temporal UI, for people who hold its token; on this machine only.

The UI asks from the browser, so that Temporal itself never sees anything in clear. Who signs in gets a
cookie; programs send the token as a bearer. Nothing that passes through is kept or logged.
"""

from __future__ import annotations

from typing import ClassVar

from aiohttp import web
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.converter import PayloadCodec

from activities.services.signing_in import SignedIn, refusal
from models.settings import CodecServerSettings

LIMIT_BYTES = 8 * 1024 * 1024
"""A page of a history, with room to spare."""
MOST_PAYLOADS = 2_000


class CodecServer(SignedIn):
    """`POST /encode` and `POST /decode` in the shape the Temporal UI and CLI speak, and `/signin`."""

    title = "codec server"
    setting = "encryption.server.token"
    cookie = "countersign_codec"
    _limit: ClassVar[int] = LIMIT_BYTES
    _strange: ClassVar[str] = "this origin is not one of encryption.server.origins"

    def __init__(self, codec: PayloadCodec, settings: CodecServerSettings, origins: tuple[str, ...]) -> None:
        """Args: what opens payloads; port and token; the origins whose pages may ask.

        Raises:
            InvalidInput: there is no token, or it can be guessed.
        """
        super().__init__(settings.token, settings.port, origins)
        self._codec = codec

    def _routes(self, app: web.Application) -> None:
        app.router.add_post("/encode", self._encode)
        app.router.add_post("/decode", self._decode)

    def _may_ask(self, request: web.Request, origin: str) -> bool:
        return origin in self._origins or (request.path == "/signin" and self._is_own(request, origin))

    def _failed(self, request: web.Request, status: int, text: str) -> web.StreamResponse:
        return refusal(status, text)

    def _welcome(self, path: str) -> web.Response:
        return web.Response(text="Signed in. Reload the Temporal page.")

    async def _encode(self, request: web.Request) -> web.Response:
        return _shown(await self._codec.encode((await _read(request)).payloads))

    async def _decode(self, request: web.Request) -> web.Response:
        return _shown(await self._codec.decode((await _read(request)).payloads))


async def _read(request: web.Request) -> Payloads:
    try:
        given = await request.json()
        payloads = ParseDict(given if isinstance(given, dict) else {"": given}, Payloads())
    except (ParseError, ValueError, LookupError, AttributeError, TypeError):
        raise web.HTTPBadRequest(reason='send {"payloads": [...]} as JSON') from None
    if len(payloads.payloads) > MOST_PAYLOADS:
        raise web.HTTPRequestEntityTooLarge(MOST_PAYLOADS, len(payloads.payloads))
    return payloads


def _shown(payloads: list[Payload]) -> web.Response:
    return web.json_response(MessageToDict(Payloads(payloads=payloads)))


def origins_of(settings: CodecServerSettings, ui_port: int) -> tuple[str, ...]:
    """Where the UI is opened: what settings say, else the dev server's two names."""
    return settings.origins or (f"http://127.0.0.1:{ui_port}", f"http://localhost:{ui_port}")
