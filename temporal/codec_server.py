"""Opens sealed payloads for the Temporal UI, for people who hold its token; on this machine only.

The UI asks from the browser, so that Temporal itself never sees anything in clear. Who signs in gets a
cookie; programs send the token as a bearer. Nothing that passes through is kept or logged.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

from aiohttp import web
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.converter import PayloadCodec

from activities.services.listening import Listening
from models.errors import InvalidInput
from models.settings import CodecServerSettings

LIMIT_BYTES = 8 * 1024 * 1024
"""A page of a history, with room to spare."""
MOST_PAYLOADS = 2_000
SHORTEST_TOKEN = 16
COOKIE = "countersign_codec"
COOKIE_SECONDS = 8 * 3600
SIGN_IN = """<!doctype html><title>Countersign: sealed payloads</title>
<form method="post"><label>Token of the codec server
<input type="password" name="token" autofocus autocomplete="off"></label> <button>Sign in</button></form>
"""
SAFE = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class CodecServer(Listening):
    """`POST /encode` and `POST /decode` in the shape the Temporal UI and CLI speak, and `/signin`."""

    def __init__(self, codec: PayloadCodec, settings: CodecServerSettings, origins: tuple[str, ...]) -> None:
        """Args: what opens payloads; port and token; the origins whose pages may ask.

        Raises:
            InvalidInput: there is no token, or it can be guessed.
        """
        token = settings.token.get_secret_value() if settings.token else ""
        if len(token) < SHORTEST_TOKEN:
            raise InvalidInput.field(
                "encryption.server.token",
                "(hidden)" if token else "",
                f"set COUNTERSIGN_ENCRYPTION__SERVER__TOKEN to {SHORTEST_TOKEN} or more random characters",
            )
        self._codec = codec
        self._token = token.encode()
        # Not the token itself, so that a stolen cookie is no bearer, and ends when the token is changed.
        self._session = hmac.digest(self._token, b"countersign codec session", "sha256").hex()
        self._origins = frozenset(origin.rstrip("/") for origin in origins)
        super().__init__(settings.port)

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=LIMIT_BYTES, middlewares=[self._guarded])
        app.router.add_post("/encode", self._encode)
        app.router.add_post("/decode", self._decode)
        app.router.add_get("/signin", self._ask)
        app.router.add_post("/signin", self._sign_in)
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Origin first, then who asks; every answer carries its headers, refusals too."""
        origin = request.headers.get("Origin", "")
        if origin and not self._may_ask(request, origin):
            response: web.StreamResponse = _refusal(
                403, "this origin is not one of encryption.server.origins"
            )
        elif request.method == "OPTIONS":
            response = web.Response(status=204)
        elif request.path != "/signin" and not self._signed_in(request):
            response = _refusal(401, "sign in at /signin, or send the token as a bearer")
        else:
            response = await _answered(request, handler)
        response.headers.update(SAFE)
        if origin in self._origins:
            response.headers.update(_cors(origin))
        return response

    def _may_ask(self, request: web.Request, origin: str) -> bool:
        own = request.path == "/signin" and origin == f"{request.scheme}://{request.host}"
        return own or origin in self._origins

    def _signed_in(self, request: web.Request) -> bool:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        bearer = kind.lower() == "bearer" and hmac.compare_digest(token.encode(), self._token)
        cookie = request.cookies.get(COOKIE, "")
        return bearer or hmac.compare_digest(cookie.encode(), self._session.encode())

    async def _encode(self, request: web.Request) -> web.Response:
        return _shown(await self._codec.encode((await _read(request)).payloads))

    async def _decode(self, request: web.Request) -> web.Response:
        return _shown(await self._codec.decode((await _read(request)).payloads))

    async def _ask(self, _: web.Request) -> web.Response:
        return web.Response(text=SIGN_IN, content_type="text/html")

    async def _sign_in(self, request: web.Request) -> web.Response:
        given = (await request.post()).get("token", "")
        if not isinstance(given, str) or not hmac.compare_digest(given.strip().encode(), self._token):
            return _refusal(401, "that is not the token")
        response = web.Response(text="Signed in. Reload the Temporal page.")
        response.set_cookie(
            COOKIE, self._session, max_age=COOKIE_SECONDS, httponly=True, samesite="Strict", path="/"
        )
        return response


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _refusal(error.status, error.reason)


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


def _refusal(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


def _cors(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Allow-Methods": "POST, OPTIONS",
        "Access-Control-Allow-Headers": "authorization, content-type, x-namespace",
        "Access-Control-Max-Age": "600",
        "Vary": "Origin",
    }


def origins_of(settings: CodecServerSettings, ui_port: int) -> tuple[str, ...]:
    """Where the UI is opened: what settings say, else the dev server's two names."""
    return settings.origins or (f"http://127.0.0.1:{ui_port}", f"http://localhost:{ui_port}")
