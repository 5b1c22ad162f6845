"""What carries requests to model servers: aiohttp behind httpx, with every fault of a server in one family.

The transport translates most of aiohttp's errors, but not the one for bytes that are no HTTP. That one would
pass every handler here, and it quotes what the server sent, which may be an answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from http import HTTPStatus

import httpx
from aiohttp import ClientError
from httpx_aiohttp import AiohttpTransport

MOST_CONNECTIONS = 1000


class Carrier(AiohttpTransport):
    """Raises `httpx.HTTPError` for whatever goes wrong, and nothing else."""

    def __init__(self) -> None:
        """Take nothing from the environment: its proxies must never see a prompt."""
        super().__init__(trust_env=False, limits=httpx.Limits(max_connections=MOST_CONNECTIONS))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send it; the body is read as it comes."""
        with _translated(httpx.RemoteProtocolError):
            response = await super().handle_async_request(request)
        response.stream = _Body(response.stream)
        return response


async def healthy(client: httpx.AsyncClient) -> bool:
    """Whether a server's health page says yes, whatever else stands on it."""
    async with client.stream("GET", "/health") as response:
        return response.status_code == HTTPStatus.OK


class _Body(httpx.AsyncByteStream):
    def __init__(self, inner: object) -> None:
        assert isinstance(inner, httpx.AsyncByteStream)
        self._inner = inner

    async def __aiter__(self) -> AsyncIterator[bytes]:
        # To whoever reads, a body whose frame breaks is one that broke off.
        with _translated(httpx.ReadError):
            async for piece in self._inner:
                yield piece

    async def aclose(self) -> None:
        with _translated(httpx.CloseError):
            await self._inner.aclose()


@contextmanager
def _translated(into: type[httpx.TransportError]) -> Generator[None]:
    try:
        yield
    except ClientError as error:
        raise into("what the server sent is no HTTP") from error
