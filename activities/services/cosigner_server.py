"""Serves a co-signer over HTTP: `POST /add-checkpoint`, small requests only."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

from activities.services.cosigner import Cosigner
from activities.services.listening import Listening

LIMIT_BYTES = 64 * 1024
"""A proof of 63 lines and a note with many signatures, with room to spare."""
READ_SECONDS = 10.0
"""How long a request may take to arrive."""
log = logging.getLogger(__name__)


class CosignerServer(Listening):
    """A co-signer that can be asked."""

    def __init__(self, cosigner: Cosigner, port: int = 0, host: str = "127.0.0.1") -> None:
        """Port 0 takes a free one, known after `start`."""
        super().__init__(port, host)
        self._cosigner = cosigner

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=LIMIT_BYTES)
        app.router.add_post("/add-checkpoint", self._add)
        return app

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
