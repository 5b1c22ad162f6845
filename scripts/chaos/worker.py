"""A nursery of worker processes: `python -m scripts.chaos.worker SETTINGS` imports everything once and forks.

Each line `start ROLE` on its input becomes a process of its own that runs that role through
`workers.compose.role`; it answers `started ROLE PID` and later `ended PID`. When the input ends, all end.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import os
import select
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from temporalio.client import Client

from activities.connectors.base import Connector
from activities.connectors.git_site import GitSite
from activities.tiers.scripted import Scripted
from models.inference import DataClass, Inputs, Message, Params, Prompt, Task
from models.loop import Guarantee
from models.settings import Settings
from models.visibility import Role
from scripts.chaos.hooks import (
    Arms,
    Watch,
    WatchedConnector,
    WatchedDatabase,
    WatchedEmbedder,
    WatchedEndpoint,
    WatchedGit,
)
from scripts.chaos.stub import TASK, Stub
from scripts.chaos.targets import Letters
from temporal.plugin import CountersignPlugin
from workers.compose import DIMENSIONS_WITHOUT_MODEL, Parts, build_id, role, utc_now

PR_SET_PDEATHSIG = 1


class Plain:
    """Gives every text the same vector; what is searched does not matter here."""

    model = "plain"
    sees = frozenset(DataClass)

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One unit vector per text."""
        return [[1.0] + [0.0] * (DIMENSIONS_WITHOUT_MODEL - 1) for _ in texts]


def arms_of(settings: Settings) -> Arms:
    """Where the stack's boundaries are armed."""
    return Arms(settings.data / "chaos")


def letters(settings: Settings, guarantee: Guarantee, arms: Arms) -> Letters:
    """A target of that guarantee."""
    return Letters(settings.data / "letters", guarantee, utc_now, arms.reach)


def parts(settings: Settings, arms: Arms) -> Parts:
    """Everything a role is made of, with boundaries."""
    return Parts(
        agents=(Stub,),
        tasks={TASK: Task(TASK, "small", structured=False, build=_prompt, check=_no_objection)},
        endpoints={
            tier.name: WatchedEndpoint(Scripted(tier.name, _suggest), arms) for tier in settings.tiers
        },
        embedder=WatchedEmbedder(Plain(), arms),
        database=lambda url: WatchedDatabase(url, arms),
        connectors=lambda named: _connectors(settings, arms, named),
    )


async def serve(settings: Settings, name: Role) -> None:
    """Run one role until this process is killed."""
    arms = arms_of(settings)
    temporal = settings.temporal
    client = await Client.connect(
        temporal.address,
        namespace=temporal.namespace,
        plugins=[CountersignPlugin()],
        interceptors=[Watch(arms)],
    )
    async with role(client, settings, name, parts(settings, arms)):
        await asyncio.Event().wait()


class Nursery:
    """Forks workers on command and says when they end."""

    def __init__(self, settings: Settings) -> None:
        """Wake up for commands and for children that ended."""
        self._settings = settings
        self._children: set[int] = set()
        self._wakeup, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGCHLD, _noted)
        signal.set_wakeup_fd(writer)

    def run(self) -> None:
        """Until the input ends."""
        pending = b""
        while True:
            ready, _, _ = select.select([0, self._wakeup], [], [])
            if self._wakeup in ready:
                os.read(self._wakeup, 4096)
                self._reap()
            if 0 in ready:
                data = os.read(0, 4096)
                if not data:
                    return self._end()
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    self._start(Role(line.decode().removeprefix("start ")))

    def _start(self, name: Role) -> None:
        pid = os.fork()
        if pid == 0:
            _child(self._settings, name)
        self._children.add(pid)
        print(f"started {name} {pid}", flush=True)

    def _reap(self) -> None:
        while self._children:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._children.discard(pid)
            print(f"ended {pid}", flush=True)

    def _end(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        for pid in self._children:
            os.waitpid(pid, 0)


def main(arguments: list[str]) -> int:
    """Read the settings from the file named, and serve."""
    settings = Settings.model_validate_json(Path(arguments[0]).read_bytes())
    build_id()
    gc.freeze()
    Nursery(settings).run()
    return 0


def _noted(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor tells; without a handler it would not."""


def _child(settings: Settings, name: Role) -> None:
    """Become a worker; never returns."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = settings.data / "log" / f"{name}-{os.getpid()}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        asyncio.run(serve(settings, name))
    except BaseException:
        logging.exception("the worker ended")
    os._exit(1)


def _connectors(settings: Settings, arms: Arms, named: dict[str, Connector]) -> dict[str, Connector]:
    own: dict[str, Connector] = {
        guarantee.value: letters(settings, guarantee, arms)
        for guarantee in (Guarantee.ASKED, Guarantee.BLIND)
    }
    client = httpx.AsyncClient(trust_env=False, timeout=10)
    for site in settings.sites:
        git = WatchedGit(settings.data / site.repository, utc_now, arms)
        own[site.name] = GitSite(site, settings.data, client, utc_now, site.engine, git)
    return {name: WatchedConnector(one, arms) for name, one in (named | own).items()}


def _prompt(inputs: Inputs, params: Params) -> Prompt:
    return Prompt(messages=(Message(role="user", content=inputs["wish"]),))


def _no_objection(answer: str, inputs: Inputs, params: Params) -> tuple[str, ...]:
    return ()


def _suggest(prompt: Prompt) -> str:
    """Never the same twice, so that an answer that was lost cannot hide behind its repetition."""
    action: dict[str, Any] = {
        "connector": "null",
        "operation": "note",
        "arguments": {"text": f"{prompt.messages[-1].content} {uuid.uuid4()}"},
        "title": "Note a suggestion",
    }
    return json.dumps({"title": "A suggestion", "actions": [action]})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
