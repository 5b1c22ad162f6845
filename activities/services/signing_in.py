"""Small HTTP servers for those who hold a token: programs send it as a bearer, browsers sign in for a cookie.

Another site's page gets nothing: a request that names an origin is answered only if that origin may ask.
"""

from __future__ import annotations

import hmac
import re
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from html import escape
from typing import ClassVar, Literal

from aiohttp import web
from pydantic import SecretStr

from activities.services.listening import Listening
from models.errors import InvalidInput

SHORTEST_TOKEN = 16
COOKIE_SECONDS = 8 * 3600
INSIDE = re.compile(r"/(?![/\\])[!-~]*")
"""Browsers leave out tabs and line ends, so that a slash, a tab and a slash lead to another server."""
SIGN_IN = """<!doctype html><title>Countersign: {title}</title>
<form method="post"><label>Token of the {title}
<input type="password" name="token" autofocus autocomplete="off"></label>
<input type="hidden" name="next" value="{next}"> <button>Sign in</button></form>
"""
SAFE = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; form-action 'self'; frame-ancestors 'none'",
    # Not stricter: browsers would send no origin with a form of ours, and it could not be told from theirs.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class SignedIn(Listening):
    """A server whose every path but `/signin` needs the token, or the cookie that it gives."""

    title: ClassVar[str]
    """What it is called where the token is asked for."""
    setting: ClassVar[str]
    """Where the token stands, as a path in settings."""
    cookie: ClassVar[str]
    same_site: ClassVar[Literal["Strict", "Lax"]] = "Strict"

    def __init__(
        self, token: SecretStr | None, port: int, origins: Iterable[str] = (), address: str = ""
    ) -> None:
        """Args: token and port; origins whose pages may ask; where browsers find this, if not here.

        Raises:
            InvalidInput: there is no token, or it can be guessed.
        """
        text = token.get_secret_value() if token else ""
        if len(text) < SHORTEST_TOKEN:
            variable = f"COUNTERSIGN_{self.setting.upper().replace('.', '__')}"
            remedy = f"set {variable} to {SHORTEST_TOKEN} or more random characters"
            raise InvalidInput.field(self.setting, "(hidden)" if text else "", remedy)
        self._token = text.encode()
        # Not the token itself, so that a stolen cookie is no bearer, and ends when the token is changed.
        self._session = hmac.digest(self._token, f"{self.cookie} session".encode(), "sha256").hex()
        self._origins = frozenset(origin.rstrip("/") for origin in origins)
        self._address = address.rstrip("/")
        super().__init__(port)

    @abstractmethod
    def _routes(self, app: web.Application) -> None:
        """Add what answers those who are signed in."""

    @abstractmethod
    def _failed(self, request: web.Request, status: int, text: str) -> web.StreamResponse:
        """Say why there is nothing else."""

    def _may_ask(self, request: web.Request, origin: str) -> bool:
        """Whether a page of this origin may ask for this."""
        return origin in self._origins or self._is_own(request, origin)

    def _is_own(self, request: web.Request, origin: str) -> bool:
        return origin in (f"{request.scheme}://{request.host}", self._address)

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=self._limit, middlewares=[self._guarded])
        app.router.add_get("/signin", self._ask)
        app.router.add_post("/signin", self._sign_in)
        self._routes(app)
        return app

    _limit: ClassVar[int] = 64 * 1024
    """Bytes of a body."""

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Origin first, then who asks; every answer carries its headers, refusals too."""
        origin = request.headers.get("Origin", "")
        if origin and not self._may_ask(request, origin):
            response = self._failed(request, 403, self._strange)
        elif request.method == "OPTIONS":
            response: web.StreamResponse = web.Response(status=204)
        elif request.path != "/signin" and not self._signed_in(request):
            response = self._failed(request, 401, "sign in at /signin, or send the token as a bearer")
        else:
            response = await self._answered(request, handler)
        for name, value in SAFE.items():
            response.headers.setdefault(name, value)
        if origin in self._origins:
            response.headers.update(_cors(origin))
        return response

    _strange: ClassVar[str] = "this origin may not ask here"

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPRedirection as error:
            return error
        except web.HTTPException as error:
            return self._failed(request, error.status, error.reason)

    def _signed_in(self, request: web.Request) -> bool:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        bearer = kind.lower() == "bearer" and hmac.compare_digest(token.encode(errors="replace"), self._token)
        cookie = request.cookies.get(self.cookie, "")
        return bearer or hmac.compare_digest(cookie.encode(errors="replace"), self._session.encode())

    async def _ask(self, request: web.Request) -> web.Response:
        page = SIGN_IN.format(title=self.title, next=escape(_inside(request.query.get("next", ""))))
        return web.Response(text=page, content_type="text/html")

    async def _sign_in(self, request: web.Request) -> web.StreamResponse:
        form = await form_of(request)
        given = form.get("token", "")
        text = given.strip()
        if not hmac.compare_digest(text.encode(errors="replace"), self._token):
            return self._failed(request, 401, "that is not the token")
        response = self._welcome(_inside(form.get("next", "")))
        response.set_cookie(
            self.cookie,
            self._session,
            max_age=COOKIE_SECONDS,
            httponly=True,
            samesite=self.same_site,
            secure=self._address.startswith("https:"),
            path="/",
        )
        return response

    @abstractmethod
    def _welcome(self, path: str) -> web.Response:
        """What somebody sees who has just signed in on the way to `path`, which may be empty."""


async def form_of(request: web.Request) -> dict[str, str]:
    """The fields of a form; a file is none.

    Raises:
        HTTPBadRequest: it cannot be read.
    """
    try:
        form = await request.post()
    except (ValueError, LookupError, AssertionError):
        raise web.HTTPBadRequest(reason="this form cannot be read; send it in UTF-8") from None
    return {name: value for name, value in form.items() if isinstance(value, str)}


def refusal(status: int, text: str) -> web.Response:
    """Why there is nothing else, for programs."""
    return web.json_response({"error": text}, status=status)


def _inside(path: str) -> str:
    """A path of this server, or nothing: whoever made the link to sign in by may be anybody."""
    return path if INSIDE.fullmatch(path) else ""


def _cors(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Allow-Methods": "POST, OPTIONS",
        "Access-Control-Allow-Headers": "authorization, content-type, x-namespace",
        "Access-Control-Max-Age": "600",
        "Vary": "Origin",
    }
