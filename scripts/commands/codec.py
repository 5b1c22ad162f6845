"""`countersign codec`: the server that opens sealed payloads for the Temporal UI."""

from __future__ import annotations

import asyncio
import signal

from models.errors import InvalidInput
from models.settings import Settings
from scripts.commands.session import console
from temporal.codec_server import CodecServer, origins_of
from temporal.converter import codec_of
from workers import config


def codec() -> None:
    """Serve the codec on this machine until Ctrl-C or SIGTERM."""
    asyncio.run(_serve(config.load()))


async def _serve(settings: Settings) -> None:
    opener = codec_of(settings.sealing, settings.data, settings.region_url or settings.database_url)
    if opener is None:
        raise InvalidInput.field("encryption.enabled", False, "set it to true; nothing is sealed without")
    wanted = settings.sealing.server
    server = CodecServer(opener, wanted, origins_of(wanted, settings.temporal.ui_port))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start()
    address = f"http://127.0.0.1:{server.port}"
    console().print(f"Codec server: {address}")
    console().print(f"Sign in at {address}/signin, then set the endpoint in the Temporal UI (Data Encoder,")
    console().print("with cross-origin credentials).")
    try:
        await stop.wait()
    finally:
        await server.close()
