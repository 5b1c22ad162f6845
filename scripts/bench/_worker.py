"""A worker process of the benchmark: a product role with a scripted tier, or the bare worker."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from pathlib import Path

from temporalio.client import Client
from temporalio.worker import Worker

from activities.tiers.scripted import Scripted
from models.settings import Settings
from models.visibility import Role
from scripts.bench._agents import TASK, Bare, Plain, Stub, line_task
from workers.__main__ import run
from workers.compose import Parts


async def bare(settings: Settings, driver: str) -> None:
    """Run the bare workflow and its activities until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    client = await Client.connect(settings.temporal.address, namespace=settings.temporal.namespace)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as out:

        def tell(run_id: str) -> None:
            out.sendto(run_id.encode(), driver)

        plain = Plain(tell)
        worker = Worker(client, task_queue="bare", workflows=[Bare], activities=[plain.plain, plain.tell])
        async with worker:
            Path(f"{driver}.ready").touch()
            await stop.wait()


def main() -> None:
    """`python -m scripts.bench._worker ROLE SETTINGS DRIVER`."""
    name, settings_file, driver = sys.argv[1:4]
    settings = Settings.model_validate_json(Path(settings_file).read_text())
    if name == "bare":
        asyncio.run(bare(settings, driver))
        return
    endpoint = Scripted("edge", lambda prompt: "a short scripted answer")
    parts = Parts(agents=[Stub], tasks={TASK: line_task()}, endpoints={"edge": endpoint})
    asyncio.run(run(settings, Role(name), parts))


if __name__ == "__main__":
    main()
