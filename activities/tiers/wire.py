"""What every model server's HTTP has in common: one client, one deadline, and an answer or an error.

Retries nothing. An error's text names the tier, the status and the server's own error type, never its
message, because a message may quote the prompt.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, cast

import httpx
from httpx_aiohttp import AiohttpTransport

from models.errors import (
    CountersignError,
    CredentialsRejected,
    InvalidInput,
    RateLimited,
    TierUnavailable,
)
from models.inference import Completion, Prompt
from models.settings import EmbeddingSettings, TierSettings

CHAT_PATH = "/v1/chat/completions"
CONNECT_SECONDS = 5.0
IDENTITY_SECONDS = 60.0
"""How long a server's own name for its model is believed before it is asked again."""
READY_SECONDS = 2.0
LOADING_RETRY = timedelta(seconds=2)
LONGEST_RETRY = timedelta(hours=1)
FINISHES = {"stop": "stop", "eos_token": "stop", "stop_sequence": "stop", "length": "length"}
REFUSES_PROMPT = (400, 413, 422)

_KIND = re.compile(r"[A-Za-z_]{1,60}")


def http_client(
    settings: TierSettings | EmbeddingSettings, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """A client for one server; plain httpx waits in its own pool under load, so aiohttp carries it.

    Args:
        settings: address, timeout and token of the server.
        transport: what carries the requests instead, in tests.
    """
    token = settings.token if isinstance(settings, TierSettings) else None
    headers = {"authorization": f"Bearer {token.get_secret_value()}"} if token else {}
    return httpx.AsyncClient(
        base_url=settings.url,
        headers=headers,
        timeout=httpx.Timeout(settings.timeout_seconds, connect=CONNECT_SECONDS),
        # The environment's proxies must never see a prompt.
        trust_env=False,
        transport=transport or AiohttpTransport(trust_env=False),
    )


class ChatEndpoint:
    """A server with the OpenAI chat route; each kind says how it is asked, named and how it refuses."""

    def __init__(
        self,
        settings: TierSettings,
        client: httpx.AsyncClient,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the tier, a client built with `http_client`, and a clock that never goes back."""
        self.settings = settings
        self._client = client
        self._clock = clock
        self._identity: tuple[str, float] | None = None

    @property
    def name(self) -> str:
        """The tier's name."""
        return self.settings.name

    async def complete(self, prompt: Prompt) -> Completion:
        """Ask once, within the tier's timeout; see `tiers.base.Endpoint` for what it raises."""
        body = self.body(prompt)
        started = self._clock()
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                model = await self._model()
                response = await self._client.post(CHAT_PATH, json=body)
        except (TimeoutError, httpx.HTTPError) as error:
            self._identity = None
            raise away(self.name, error) from None
        if response.status_code != HTTPStatus.OK:
            raise self.refusal(response, prompt)
        return completion(self.name, response, model, round((self._clock() - started) * 1000))

    async def ready(self) -> bool:
        """Whether it would answer now."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                return (await self._client.get("/health")).status_code == HTTPStatus.OK
        except (TimeoutError, httpx.HTTPError):
            return False

    async def aclose(self) -> None:
        """Give connections back."""
        await self._client.aclose()

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The request in this kind's words."""
        raise NotImplementedError

    async def identify(self) -> str:
        """Ask the server which model it runs."""
        raise NotImplementedError

    def refusal(self, response: httpx.Response, prompt: Prompt) -> CountersignError:
        """What an answer other than 200 means."""
        raise NotImplementedError

    async def fetch(self, path: str) -> dict[str, Any]:
        """A JSON object the server publishes about itself.

        Raises:
            TierUnavailable: it does not.
        """
        response = await self._client.get(path)
        if response.status_code != HTTPStatus.OK:
            raise refused(self.name, response)
        return json_object(self.name, response)

    async def _model(self) -> str:
        now = self._clock()
        if self._identity is None or now - self._identity[1] > IDENTITY_SECONDS:
            self._identity = (await self.identify(), now)
        return self._identity[0]


def completion(tier: str, response: httpx.Response, model: str, milliseconds: int) -> Completion:
    """Read a chat answer.

    Raises:
        TierUnavailable: it says 200 and is no answer.
    """
    body = json_object(tier, response)
    try:
        choice = body["choices"][0]
        text, finish = choice["message"]["content"], FINISHES[choice["finish_reason"]]
        usage = body["usage"]
        counts = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (KeyError, IndexError, TypeError, ValueError):
        raise no_answer(tier, kind_of(body) or "an unknown shape") from None
    if not isinstance(text, str) or not text.strip():
        raise no_answer(tier, "an empty text")
    return Completion(
        text=text,
        finish=cast(Any, finish),
        prompt_tokens=counts[0],
        completion_tokens=counts[1],
        model=model,
        milliseconds=milliseconds,
    )


def refused(tier: str, response: httpx.Response) -> CountersignError:
    """The error a status means where the server's kind adds nothing to it."""
    status = response.status_code
    said = f"{tier}: the server answered {status} {kind_of(json_or_none(response)) or ''}".rstrip()
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return RateLimited(f"{said}; it is full, ask later", next_retry_delay=retry_after(response))
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return CredentialsRejected(f"{said}; set the tier's token to one it accepts")
    if status in REFUSES_PROMPT:
        return InvalidInput(f"{said}; it refuses this prompt for good, shorten or correct it")
    return TierUnavailable(
        f"{said}; look at the server's log and the tier's url", next_retry_delay=retry_after(response)
    )


def away(tier: str, error: Exception) -> TierUnavailable:
    """The error for no answer at all."""
    return TierUnavailable(
        f"{tier}: no answer ({type(error).__name__}); check that its server runs at its url"
    )


def no_answer(tier: str, what: str) -> TierUnavailable:
    """The error for a 200 that holds no usable answer."""
    return TierUnavailable(f"{tier}: the server answered 200 with {what}; look at its log")


def retry_after(response: httpx.Response) -> timedelta | None:
    """How long the server asks to be left alone: seconds or a date."""
    text = response.headers.get("retry-after", "").strip()
    if not text:
        return None
    if text.isdecimal():
        return min(timedelta(seconds=int(text[:9])), LONGEST_RETRY)
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return None
    wait = until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)
    return min(max(wait, timedelta(0)), LONGEST_RETRY)


def json_or_none(response: httpx.Response) -> Any:
    """The body as JSON, or `None` if it is none."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def json_object(tier: str, response: httpx.Response) -> dict[str, Any]:
    """The body of a 200 as an object.

    Raises:
        TierUnavailable: it is none.
    """
    body = json_or_none(response)
    if not isinstance(body, dict):
        raise no_answer(tier, "something that is no JSON object")
    return cast(dict[str, Any], body)


def kind_of(body: Any) -> str | None:
    """The server's own name for its error, if it is a plain word."""
    error = body.get("error") if isinstance(body, dict) else None
    kind = error.get("type") if isinstance(error, dict) else None
    if isinstance(error, str):
        kind = body.get("error_type") or "error"
    return kind if isinstance(kind, str) and _KIND.fullmatch(kind) else None


def message_of(response: httpx.Response) -> str:
    """The server's words, lower-case, to be classified by; never shown."""
    body = json_or_none(response)
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message.lower() if isinstance(message, str) else response.text.lower()
