"""Small HTTP servers: listening on one address, and letting go of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

from aiohttp import web


class Listening(ABC):
    """A small server; on this machine only unless it is told another address."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        """Port 0 takes a free one, known after `start`."""
        self._port, self._host = port, host
        self._runner: web.AppRunner | None = None

    @abstractmethod
    def _app(self) -> web.Application:
        """What answers."""

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address is taken.
        """
        runner = web.AppRunner(self._app(), access_log=None, handle_signals=False, shutdown_timeout=1.0)
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
