"""Serves a co-signer over HTTP: `POST /add-checkpoint`, small requests only."""

from __future__ import annotations

import asyncio
import logging
from typing import cast

from aiohttp import web

from activities.services.cosigner import Cosigner

LIMIT_BYTES = 64 * 1024
"""A proof of 63 lines and a note with many signatures, with room to spare."""
READ_SECONDS = 10.0
"""How long a request may take to arrive."""
log = logging.getLogger(__name__)


class CosignerServer:
    """A small server; on this machine only unless it is told another address."""

    def __init__(self, cosigner: Cosigner, port: int = 0, host: str = "127.0.0.1") -> None:
        """Port 0 takes a free one, known after `start`."""
        self._cosigner, self._port, self._host = cosigner, port, host
        self._runner: web.AppRunner | None = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    async def start(self) -> None:
        """Listen."""
        app = web.Application(client_max_size=LIMIT_BYTES)
        app.router.add_post("/add-checkpoint", self._add)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
        except OSError:
            await runner.cleanup()
            raise
        self._port = cast(int, runner.addresses[0][1])
        self._runner = runner

    async def close(self) -> None:
        """Stop listening; may be called twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _add(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(READ_SECONDS):
                body = await request.read()
        except TimeoutError:
            return web.Response(status=408, text="send it faster\n")
        try:
            reply = await asyncio.to_thread(self._cosigner.add, body)
        except OSError as error:
            log.error("the state cannot be written, so nothing is cosigned: %s", error)
            return web.Response(status=500, text="the state cannot be written\n")
        return web.Response(status=reply.status, text=reply.text, content_type=reply.content_type)
