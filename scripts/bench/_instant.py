"""A chat server that answers at once, in a process of its own; and an endpoint that only posts."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import httpx

from models.errors import TierUnavailable
from models.inference import Attempt, Completion, Ending, Prompt

QUESTION = "Say something about bicycles, in a sentence or two, for people who live nearby."
ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "instant-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 30, "completion_tokens": 1, "total_tokens": 31},
}


class Instant(asyncio.Protocol):
    """HTTP as far as the contestants need it: every POST gets the same answer at once."""

    BODY = json.dumps(ANSWER).encode()
    SAID = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(BODY),
        BODY,
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing was read yet."""
        self._transport, self._read = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            head = self._read[:end].lower()
            _, _, length = head.partition(b"content-length:")
            size = end + 4 + int(length.split(b"\r\n", 1)[0] or 0)
            if len(self._read) < size:
                return
            self._read = self._read[size:]
            assert isinstance(self._transport, asyncio.Transport)
            self._transport.write(self.SAID)


async def serve() -> None:
    """Print the port and answer until the pipe to the parent closes."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Instant, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@contextmanager
def instant_server() -> Generator[str]:
    """The address of a server in a process of its own."""
    argv = [sys.executable, "-m", "scripts.bench._instant"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.communicate()


async def posted(client: httpx.AsyncClient) -> dict[str, Any]:
    """One chat completion."""
    body = {"model": "instant-1", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32}
    return (await client.post("/v1/chat/completions", json=body)).json()


REFUSED = (httpx.ConnectError, httpx.ConnectTimeout)
"""What the aiohttp transport makes of a refused connection differs from plain httpx."""


class Posted:
    """An endpoint that posts as the bare client does, so that only the router's own share differs."""

    def __init__(self, client: httpx.AsyncClient, name: str = "instant") -> None:
        """The client knows the address."""
        self._client = client
        self.name = name
        self.unreached = 0

    async def complete(self, prompt: Prompt) -> Completion:
        """Post once."""
        try:
            said = await posted(self._client)
        except REFUSED as error:
            self.unreached += 1
            attempt = Attempt(tier=self.name, ending=Ending.BACKEND_FAULT, sent=False)
            raise TierUnavailable(f"{self.name}: not reached", attempt.model_dump(mode="json")) from error
        usage = said["usage"]
        return Completion(
            text=said["choices"][0]["message"]["content"],
            finish="stop",
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            model=said["model"],
            milliseconds=0,
        )

    async def ready(self) -> bool:
        """Always."""
        return True

    async def aclose(self) -> None:
        """The client is closed by who made it."""


if __name__ == "__main__":
    asyncio.run(serve())
