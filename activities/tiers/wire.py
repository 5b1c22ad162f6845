"""What every model server's HTTP has in common: one client, one set of limits, and an answer or an error.

Retries nothing. An error's text names the tier, the status and the server's own error type, never its
message, because a message may quote the prompt; how the attempt ended stands in the error's details, so that
nobody needs to read texts. Chat is always streamed: only then is a slow first token told from a slow answer.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, cast

import httpx
from aiohttp import ClientConnectorError

from activities.tiers import heard
from activities.tiers.carrier import Carrier, healthy
from activities.tiers.heard import Heard, Unreadable
from activities.tiers.schema import holds
from activities.tiers.stream import Event, Events, Limits, TooMuch, Watch, beginning, drain, pieces, whole
from models.errors import (
    CountersignError,
    CredentialsRejected,
    IdentityChanged,
    InvalidInput,
    OutputInvalid,
    RateLimited,
    TierUnavailable,
)
from models.inference import Attempt, Completion, Ending, Prompt, TimeLimit
from models.memory import EmbeddingSettings
from models.settings import TierSettings

CHAT_PATH = "/v1/chat/completions"
LONGEST_NAME = 500
IDENTITY_SECONDS = 60.0
"""How long a server's own name for its model is believed before it is asked again."""
READY_SECONDS = 2.0
MOST_ERROR_BYTES = 2**16
MOST_FACT_BYTES = 4 * 2**20
LOADING_RETRY = timedelta(seconds=2)
LONGEST_RETRY = timedelta(hours=1)

ERRORS: Mapping[Ending, type[CountersignError]] = {
    Ending.INVALID_REQUEST: InvalidInput,
    Ending.TOO_LONG: InvalidInput,
    Ending.SCHEMA_UNSUPPORTED: OutputInvalid,
    Ending.OVERLOADED: RateLimited,
    Ending.BACKEND_FAULT: TierUnavailable,
    Ending.INCOMPLETE: TierUnavailable,
    Ending.TIMEOUT: TierUnavailable,
    Ending.AUTH: CredentialsRejected,
}
REMEDIES: Mapping[Ending, str] = {
    Ending.INVALID_REQUEST: "it refuses this prompt for good, shorten or correct it",
    Ending.TOO_LONG: "the prompt is longer than the server's context; shorten it",
    Ending.SCHEMA_UNSUPPORTED: "the server cannot hold an answer to this schema; simplify the schema, start "
    "the server with grammar support, or set structured = false",
    Ending.OVERLOADED: "it is full, ask later",
    Ending.BACKEND_FAULT: "look at the server's log and the tier's url",
    Ending.INCOMPLETE: "the answer is not whole; look at the server's log",
    Ending.AUTH: "set the tier's token to one it accepts",
}
STATUSES: Mapping[int, Ending] = {
    400: Ending.INVALID_REQUEST,
    401: Ending.AUTH,
    403: Ending.AUTH,
    413: Ending.TOO_LONG,
    422: Ending.INVALID_REQUEST,
    429: Ending.OVERLOADED,
}

_KIND = re.compile(r"[A-Za-z_]{1,60}")


def http_client(
    settings: TierSettings | EmbeddingSettings, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """A client for one server; plain httpx waits in its own pool under load, so aiohttp carries it.

    Args:
        settings: address, timeout and token of the server.
        transport: what carries the requests instead, in tests.
    """
    token = settings.token
    # Nothing packed: a few bytes could unpack to more than there is memory. `stream.pieces` refuses it.
    headers = {"accept-encoding": "identity"}
    headers |= {"authorization": f"Bearer {token.get_secret_value()}"} if token else {}
    return httpx.AsyncClient(
        base_url=settings.url,
        headers=headers,
        # The other limits are watched by the adapters; here they would run out first and say less.
        timeout=httpx.Timeout(None, connect=settings.connect_seconds),
        # The environment's proxies must never see a prompt.
        trust_env=False,
        transport=transport or Carrier(),
    )


@dataclass(frozen=True, slots=True)
class Said:
    """A refusal as the server put it: in a status, or inside a stream that began with 200."""

    status: int
    message: str
    """Lower-case, to be classified by; never shown."""
    kind: str = ""
    retry: timedelta | None = None
    in_stream: bool = False

    @classmethod
    async def of(cls, response: httpx.Response) -> Said:
        """Read a response that is no 200: the status counts, and of its body only as much as is needed."""
        content = await beginning(response, MOST_ERROR_BYTES)
        body = json_or_none(content)
        return cls(
            status=response.status_code,
            message=_message(body) or content.decode(errors="replace").lower(),
            kind=kind_of(body) or "",
            retry=retry_after(response),
        )

    @classmethod
    def in_band(cls, body: Mapping[str, Any]) -> Said:
        """An error event of a stream."""
        error = body.get("error")
        inner = cast(Mapping[str, Any], error) if isinstance(error, dict) else body
        status = next((inner[key] for key in ("http_status_code", "code", "status") if key in inner), 500)
        return cls(
            status=status if isinstance(status, int) else 500,
            message=_message(body),
            kind=kind_of(body) or "error",
            in_stream=True,
        )

    def __str__(self) -> str:
        where = "inside a stream" if self.in_stream else ""
        return " ".join(part for part in (str(self.status), self.kind, where) if part)


class ChatEndpoint:
    """A server with the OpenAI chat route; each kind says how it is asked, named and how it refuses."""

    keeps_connections = True
    """Whether a connection can be used again after a stream."""
    names_itself = False
    """Whether the model named in an answer is the server's own word, not an echo of the request."""

    def __init__(
        self,
        settings: TierSettings,
        client: httpx.AsyncClient,
        clock: Callable[[], float] = time.monotonic,
        limits: Limits | None = None,
        accepted: Callable[[], Awaitable[str | None]] | None = None,
    ) -> None:
        """Take the tier, a client built with `http_client`, and a clock that never goes back.

        Args:
            settings: the tier.
            client: carries the requests; closed with the endpoint.
            clock: for the age of an identity and for timings.
            limits: instead of those in the settings, for tests.
            accepted: says which model a tier without a pin was seen with before this process.
        """
        self.settings = settings
        self._client = client
        self._clock = clock
        self._limits = limits or Limits.of(settings)
        self._identity: tuple[str, float] | None = None
        self._first: str | None = None
        self._accepted = accepted

    @property
    def name(self) -> str:
        """The tier's name."""
        return self.settings.name

    async def complete(self, prompt: Prompt) -> Completion:
        """Ask once, within the tier's limits; see `tiers.base.Endpoint` for what it raises.

        Cancelling it closes the connection, which is how a model server learns to stop.
        """
        watch = Watch(self._limits)
        try:
            async with watch:
                return await self._complete(prompt, watch)
        except TimeoutError:
            self._identity = None
            raise self.late(watch.ran_out) from None
        except httpx.HTTPError as error:
            self._identity = None
            raise self.away(error) from None
        except (Unreadable, TooMuch, ValueError, ArithmeticError) as error:
            what = str(error) if isinstance(error, Unreadable | TooMuch) else "something unreadable"
            raise self.no_answer(what) from None

    async def ready(self) -> bool:
        """Whether it would answer now."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                return await healthy(self._client)
        except (TimeoutError, httpx.HTTPError):
            return False

    async def aclose(self) -> None:
        """Give connections back."""
        await self._client.aclose()

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The request in this kind's words."""
        raise NotImplementedError

    async def request(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        """Path and body of the request."""
        return CHAT_PATH, self.body(prompt)

    def hear(self, said: Heard, body: dict[str, Any]) -> bool:
        """Take one event of the stream, or a whole answer; true if the model has written more."""
        return heard.chat(said, body)

    async def identify(self) -> str:
        """Ask the server which model it runs, as `name` or `name@revision`."""
        raise NotImplementedError

    async def context(self) -> int | None:
        """Tokens one request may use, prompt and answer, if the server says."""
        raise NotImplementedError

    async def slots(self) -> int | None:
        """Requests it takes at once, if the server says."""
        raise NotImplementedError

    async def running(self) -> int | None:
        """Requests it works on now, if its metrics say."""
        raise NotImplementedError

    async def prompt_tokens(self, prompt: Prompt) -> int:
        """Tokens of the prompt in its chat template, by the server's own tokenizer.

        Raises:
            Unreadable: the server does not say.
        """
        raise NotImplementedError

    async def text_tokens(self, text: str) -> int:
        """Tokens of a text, by the server's own tokenizer.

        Raises:
            Unreadable: the server does not say.
        """
        raise NotImplementedError

    def judge(self, said: Said, prompt: Prompt) -> Ending | None:
        """What this kind's own marks in a refusal mean; `None` leaves it to the status."""
        raise NotImplementedError

    async def fetch(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """JSON the server gives away outside of answers; with a body it is posted.

        Raises:
            CountersignError: it refuses.
            Unreadable: it is no JSON.
        """
        async with self._client.stream("GET" if body is None else "POST", path, json=body) as response:
            if response.status_code != HTTPStatus.OK:
                raise self.refused(await Said.of(response))
            return heard.parsed(await whole(response, MOST_FACT_BYTES))

    async def metric(self, name: str) -> int | None:
        """The sum of a gauge in the server's `/metrics`, if it has them."""
        async with self._client.stream("GET", "/metrics") as response:
            if response.status_code != HTTPStatus.OK:
                return None
            text = (await whole(response, MOST_FACT_BYTES)).decode(errors="replace")
        line = re.compile(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? ([0-9.e+]+)", re.MULTILINE)
        found = line.findall(text)
        try:
            return round(sum(map(float, found))) if found else None
        except (ValueError, OverflowError):
            return None

    def failed(
        self, ending: Ending, text: str, retry: timedelta | None = None, **more: Any
    ) -> CountersignError:
        """The error for an ending, which travels in its details."""
        attempt = Attempt(tier=self.name, ending=ending, **more)
        error = IdentityChanged if attempt.held else ERRORS[ending]
        details = attempt.model_dump(mode="json", exclude_none=True)
        return error(f"{self.name}: {text}", details, next_retry_delay=retry)

    def refused(self, said: Said, prompt: Prompt | None = None) -> CountersignError:
        """The error a refusal means; one by the status where the server's marks add nothing."""
        ending = self.judge(said, prompt) if prompt is not None else None
        ending = ending or STATUSES.get(said.status, Ending.BACKEND_FAULT)
        if said.status == HTTPStatus.SERVICE_UNAVAILABLE and "loading" in said.message:
            return self.failed(ending, "the server still loads its model; ask again", LOADING_RETRY)
        return self.failed(ending, f"the server answered {said}; {REMEDIES[ending]}", said.retry)

    def away(self, error: httpx.HTTPError) -> CountersignError:
        """The error for a connection that was not made or broke."""
        cause = type(error.__cause__ or error).__name__
        if _too_late_to_connect(error):
            return self.late(TimeLimit.CONNECT, cause, sent=False)
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
            return self.late(TimeLimit.TOTAL, cause)
        text = f"no answer ({cause}); check that its server runs at its url"
        sent = not isinstance(error, httpx.ConnectError | httpx.UnsupportedProtocol) and not isinstance(
            error.__cause__, ClientConnectorError
        )
        return self.failed(Ending.BACKEND_FAULT, text, sent=sent)

    def late(self, limit: TimeLimit, cause: str = "TimeoutError", sent: bool = True) -> CountersignError:
        """The error for a limit that ran out."""
        field = "timeout_seconds" if limit is TimeLimit.TOTAL else f"{limit}_seconds"
        text = f"no answer in time ({cause}, {limit}); check its server, or raise the tier's {field}"
        return self.failed(Ending.TIMEOUT, text, limit=limit, sent=sent)

    def no_answer(self, what: str, ending: Ending = Ending.BACKEND_FAULT) -> CountersignError:
        """The error for a 200 that holds no usable answer."""
        return self.failed(ending, f"the server answered 200 with {what}; look at its log")

    async def identity(self) -> str:
        """The server's name for its model, believed for a while; only the accepted one is let through.

        Raises:
            IdentityChanged: it is another one.
        """
        now = self._clock()
        if self._identity is None or now - self._identity[1] > IDENTITY_SECONDS:
            name = await self.identify()
            if len(name) > LONGEST_NAME or not name.isprintable():
                raise self.no_answer("a model's name that is none")
            if self._first is None and self._accepted is not None and not self.settings.model:
                self._first = await self._accepted()
            self._accept(name)
            self._identity = (name, now)
        return self._identity[0]

    def _accept(self, name: str) -> None:
        pinned = self.settings.model
        if pinned:
            model, _, revision = name.partition("@")
            wanted = self.settings.revision
            good = (pinned == model and wanted in (None, revision)) or (pinned == name and wanted is None)
            expected = f"{pinned}@{wanted}" if wanted else pinned
        else:
            self._first = expected = self._first or name
            good = name == expected
        if not good:
            self._identity = None
            text = f"its server runs {name[:120]!r}, not {expected!r}"
            remedy = "the tier is held until the settings (model, revision) accept it"
            raise self.failed(Ending.BACKEND_FAULT, f"{text}; {remedy}", held=True, model=name[:200])

    async def _complete(self, prompt: Prompt, watch: Watch) -> Completion:
        model = await self.identity()
        path, body = await self.request(prompt)
        started = self._clock()
        said = Heard(started, self._clock)
        async with self._sent(path, body) as response:
            await self._listen(response, said, prompt, watch)
        if said.finish is None:
            raise self.no_answer("a stream that ended in the middle", Ending.INCOMPLETE)
        if self.names_itself and said.model not in (None, model):
            # Older servers name a fixed default there, so only asking again can tell.
            self._identity = None
            await self.identity()
        return await self._completion(said, prompt, model)

    @asynccontextmanager
    async def _sent(self, path: str, body: dict[str, Any]) -> AsyncGenerator[httpx.Response]:
        headers = {} if self.keeps_connections else {"connection": "close"}
        async with self._client.stream("POST", path, json=body, headers=headers) as response:
            yield response

    async def _listen(self, response: httpx.Response, said: Heard, prompt: Prompt, watch: Watch) -> None:
        if response.status_code != HTTPStatus.OK:
            raise self.refused(await Said.of(response), prompt)
        try:
            if "text/event-stream" in response.headers.get("content-type", ""):
                await self._follow(response, said, prompt, watch)
            else:
                said.headers(response.headers)
                self._take(said, heard.parsed(await whole(response)), prompt)
        except httpx.ReadError:
            # What broke after the first token is an answer cut off, not a server that cannot be reached.
            if said.first is None:
                raise
            raise self.no_answer("a stream that broke off", Ending.INCOMPLETE) from None

    async def _follow(self, response: httpx.Response, said: Heard, prompt: Prompt, watch: Watch) -> None:
        events = Events()
        async with aclosing(pieces(response)) as body:
            async for piece in body:
                for event in events.feed(piece):
                    if event.data == heard.DONE:
                        return await drain(body)
                    if self._take(said, _object(event), prompt):
                        watch.progress()
        return None

    def _take(self, said: Heard, body: Any, prompt: Prompt) -> bool:
        if not isinstance(body, dict):
            raise Unreadable("something that is no JSON object")
        answer = cast(dict[str, Any], body)
        if answer.get("error") or answer.get("object") == "error":
            raise self.refused(Said.in_band(answer), prompt)
        return self.hear(said, answer)

    async def _completion(self, said: Heard, prompt: Prompt, model: str) -> Completion:
        text = said.text
        if not text.strip():
            raise self.no_answer("an empty text", Ending.INCOMPLETE)
        milliseconds = round((self._clock() - said.started) * 1000)
        counts, source = said.usage, "reported"
        # Nobody writes a text in no tokens, and to believe it would make the answer free.
        if counts is None or counts[1] == 0:
            counts, source = await self._counted(prompt, text), "counted"
        return Completion(
            text=text,
            finish=cast(Any, said.finish),
            prompt_tokens=counts[0],
            completion_tokens=counts[1],
            model=model,
            milliseconds=milliseconds,
            usage=cast(Any, source),
            cached_tokens=said.cached,
            timing=said.timing(counts[1]),
            chances=tuple(said.chances),
            holds=None if prompt.answer_schema is None else holds(text, prompt.answer_schema),
        )

    async def _counted(self, prompt: Prompt, text: str) -> tuple[int, int]:
        try:
            return await self.prompt_tokens(prompt), await self.text_tokens(text)
        except (CountersignError, Unreadable):
            raise self.no_answer("no usage, and its tokenizer does not count") from None


def _object(event: Event) -> Any:
    body = heard.parsed(event.data.encode())
    return {"error": body} if event.field == "error" else body


def _too_late_to_connect(error: httpx.HTTPError) -> bool:
    # The transport calls every broken connection a connect timeout; only its cause tells.
    if not isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        return False
    return error.__cause__ is None or isinstance(error.__cause__, TimeoutError)


def retry_after(response: httpx.Response) -> timedelta | None:
    """How long the server asks to be left alone: seconds or a date."""
    text = response.headers.get("retry-after", "").strip()
    if not text:
        return None
    if text.isdecimal():
        return min(timedelta(seconds=int(text[:9])), LONGEST_RETRY)
    try:
        until = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    wait = until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)
    return min(max(wait, timedelta(0)), LONGEST_RETRY)


def json_or_none(content: bytes) -> Any:
    """A body as JSON, or `None` if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def kind_of(body: Any) -> str | None:
    """The server's own name for its error, if it is a plain word."""
    error = body.get("error") if isinstance(body, dict) else None
    kind = error.get("type") if isinstance(error, dict) else None
    if isinstance(error, str):
        kind = body.get("error_type") or "error"
    return kind if isinstance(kind, str) and _KIND.fullmatch(kind) else None


def _message(body: Any) -> str:
    if not isinstance(body, dict):
        return ""
    told = cast(dict[str, Any], body)
    error = told.get("error")
    message = error.get("message") if isinstance(error, dict) else error or told.get("message")
    return message.lower() if isinstance(message, str) else ""
