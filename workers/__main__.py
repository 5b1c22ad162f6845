"""`python -m workers ROLE`: one role as one process, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from models.errors import CountersignError, InvalidInput, KeyMissing
from models.settings import Settings
from models.visibility import Role
from temporal.client import connect
from temporal.converter import codec_of
from workers import config, logs
from workers.compose import Parts, role
from workers.ending import leave

OUR_PACKAGES = ("models", "activities", "workflows", "workers", "temporal")


async def run(settings: Settings, name: Role, parts: Parts | None = None) -> None:
    """Run a role until SIGTERM or SIGINT; `<data>/run/<role>.ready` stands while it is ready."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        parts, telemetry = parts or Parts(), None
        if settings.telemetry.otlp_endpoint is not None:
            # Loaded only where it is used: what delivers it takes half a second and ten megabytes.
            from temporal.telemetry import sending

            telemetry = await stack.enter_async_context(sending(settings.telemetry, name))
            parts = replace(parts, meter=telemetry.meter, tracer=telemetry.tracer)
        codec = codec_of(settings.sealing, settings.data, settings.region_url or settings.database_url)
        client = await connect(settings.temporal, codec, telemetry)
        await stack.enter_async_context(role(client, settings, name, parts))
        # What a worker is made of stays for good; nothing is won by looking through it again and again.
        gc.collect()
        gc.freeze()
        ready = settings.data / "run" / f"{name}.ready"
        ready.parent.mkdir(parents=True, exist_ok=True)
        ready.write_text(str(os.getpid()))
        try:
            await stop.wait()
        finally:
            ready.unlink(missing_ok=True)


def guard() -> None:
    """Refuse to start when another package took one of our names.

    Raises:
        InvalidInput: names the intruder.
    """
    here = Path(__file__).resolve().parent.parent
    for name in OUR_PACKAGES:
        found = Path(str(importlib.import_module(name).__file__)).resolve().parent.parent
        if found != here:
            raise InvalidInput.field(
                "package", f"{name} from {found}", "use an environment of Countersign's own"
            )


def main(arguments: list[str]) -> int:
    """Run the named role; 2 for a wrong one."""
    known = ", ".join(Role)
    if len(arguments) != 1 or arguments[0] not in list(Role):
        sys.stderr.write(f"role: {' '.join(arguments) or 'nothing'} is not accepted; use one of {known}\n")
        return 2
    try:
        guard()
        settings = config.load()
        logs.start(discreet=settings.sealing.enabled)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run(settings, Role(arguments[0])))
    except (CountersignError, KeyMissing) as error:
        sys.stderr.write(f"{error.message}\n")
        return 2
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
