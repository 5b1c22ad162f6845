"""`python -m scripts.chaos owner`: many deciders on one subject while its owner's processes fall.

Real server, worker and decider processes. What falls, in turn: the worker that has the owner's last step
(SIGKILL), a process of deciders (SIGKILL), and the owner itself, which is ended while the worker that has its
last step is stopped, and which that worker goes on with when another owner has taken over. Prints one JSON
summary; exit code 0 when every promise held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import GetWorkflowExecutionHistoryReverseRequest
from temporalio.service import RPCError

from activities.services.beliefs import SNAPSHOT
from models.beliefs import owner_id
from models.settings import Settings
from models.visibility import Role
from scripts.chaos.deciders import PLAN, SUBJECT, Plan
from scripts.chaos.owner_judge import judge
from scripts.chaos.supervisor import POLL, Chaos, Server, free_port, settings_for, stack, temporal_at

WORKERS = 3
STOPPED = 3.0
"""Seconds after which a stopped process wakes although nobody has taken over: it may hold the database."""
NEWEST = 30
"""Events of a history to look through for who had its last step."""


class Rig:
    """One subject, its deciders and its owner, and what makes them fall."""

    def __init__(self, chaos: Chaos, plan: Plan) -> None:
        """Starts nothing yet."""
        self._chaos = chaos
        self._plan = plan
        self._owner = owner_id(chaos.settings.tenant, SUBJECT)
        self._deciders: dict[int, asyncio.subprocess.Process] = {}
        self._turn = 0
        self.fell: dict[str, int] = {"worker": 0, "decider": 0, "owner": 0}
        """How often each kind of fall happened."""

    async def run(self, kills: int) -> None:
        """Let the deciders finish, with falls evenly spread over their events."""
        (self._chaos.settings.data / PLAN).write_text(self._plan.model_dump_json())
        (self._chaos.settings.data / "log").mkdir(exist_ok=True)
        watching = [asyncio.create_task(self._keep(number)) for number in range(self._plan.processes)]
        marks = [self._plan.events * one // (kills + 1) for one in range(1, kills + 1)]
        falling = asyncio.create_task(self._fall_at(marks))
        try:
            await asyncio.gather(*watching, falling)
        finally:
            for task in (*watching, falling):
                task.cancel()
            for process in self._deciders.values():
                with suppress(ProcessLookupError):
                    process.kill()

    async def handled(self) -> int:
        """Versions that stand."""
        query = select(func.count()).where(SNAPSHOT.c.subject == SUBJECT)
        return int(await self._chaos.database.read(lambda link: link.execute(query).scalar_one()))

    async def _keep(self, number: int) -> None:
        """A process of deciders, started again whenever it falls, until it has done its part."""
        data = self._chaos.settings.data
        while True:
            self._deciders[number] = await _deciders(data, number)
            code = await self._deciders[number].wait()
            if code == 0:
                return
            if code != -signal.SIGKILL:
                raise RuntimeError(f"deciders {number} ended with {code}; see their log in {data / 'log'}")

    async def _fall_at(self, marks: Sequence[int]) -> None:
        for mark in marks:
            while await self.handled() < mark:  # noqa: ASYNC110 - other processes
                await asyncio.sleep(POLL)
            await self._fall()

    async def _fall(self) -> None:
        """Let the next kind fall, as soon as there is one that can."""
        name = tuple(self.fell)[self._turn % len(self.fell)]
        self._turn += 1
        while not await getattr(self, f"_fell_{name}")():
            if await self.handled() >= self._plan.events:
                return
            await asyncio.sleep(POLL)
        self.fell[name] += 1

    async def _fell_worker(self) -> bool:
        return _signalled(await self._at_work(), signal.SIGKILL)

    async def _fell_decider(self) -> bool:
        alive = [one for one in self._deciders.values() if one.returncode is None]
        return bool(alive) and _signalled(alive[self._turn % len(alive)].pid, signal.SIGKILL)

    async def _fell_owner(self) -> bool:
        pid, before = await self._at_work(), await self._run()
        if before is None or not _signalled(pid, signal.SIGSTOP):
            return False
        try:
            await self._chaos.client.get_workflow_handle(self._owner, run_id=before).terminate("chaos")
            until, handled = time.monotonic() + STOPPED, await self.handled()
            while time.monotonic() < until and await self.handled() == handled:  # noqa: ASYNC110 - as above
                await asyncio.sleep(POLL)
        except RPCError:
            # It had handed over just before.
            return False
        finally:
            _signalled(pid, signal.SIGCONT)
        return True

    async def _run(self) -> str | None:
        """The newest run of the owner."""
        try:
            return (await self._chaos.client.get_workflow_handle(self._owner).describe()).run_id
        except RPCError:
            return None

    async def _at_work(self) -> int:
        """The worker process that was given the owner's last step; any, while nobody was."""
        workers = self._chaos.workers.of_role(Role.DECIDE) if self._chaos.workers else []
        wanted = GetWorkflowExecutionHistoryReverseRequest(
            namespace=self._chaos.settings.temporal.namespace,
            execution=WorkflowExecution(workflow_id=self._owner),
            maximum_page_size=NEWEST,
        )
        with suppress(RPCError):
            service = self._chaos.client.workflow_service
            found = await service.get_workflow_execution_history_reverse(wanted)
            for event in found.history.events:
                pid = event.workflow_task_started_event_attributes.identity.partition("@")[0]
                if pid.isdecimal() and int(pid) in workers:
                    return int(pid)
        return workers[self._turn % len(workers)] if workers else 0


async def _deciders(data: Path, number: int) -> asyncio.subprocess.Process:
    log = (data / "log" / f"deciders-{number}.log").open("ab")
    with log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "scripts.chaos.deciders", str(data / "chaos.json"), str(number)),
            cwd=Path(__file__).resolve().parents[2],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _signalled(pid: int, number: int) -> bool:
    """Whether there was such a process to signal."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


@asynccontextmanager
async def rig(data: Path, plan: Plan) -> AsyncGenerator[tuple[Rig, Chaos]]:
    """A server of its own, workers that decide, and a rig that waits for `run`."""
    settings: Settings = settings_for(temporal_at(free_port(), free_port()), data, free_port())
    server = Server(settings.temporal, data)
    await server.start()
    try:
        async with stack(settings, {Role.DECIDE: WORKERS}) as chaos:
            yield Rig(chaos, plan), chaos
    finally:
        server.kill()


async def prove(data: Path, plan: Plan, kills: int, limit: float) -> dict[str, Any]:
    """Run it all and judge; `wrong` is empty when every promise held."""
    async with rig(data, plan) as (made, chaos), asyncio.timeout(limit):
        began = time.monotonic()
        await made.run(kills)
        seconds = time.monotonic() - began
        proof = await judge(chaos, plan)
    return {
        "events": plan.events,
        "deciders": plan.deciders,
        "processes": plan.processes,
        "fell": made.fell,
        **proof,
        "seconds": round(seconds, 1),
        "events_per_second": round(plan.events / seconds),
    }


def main(arguments: Sequence[str]) -> int:
    """Run the proof that the options name."""
    options = _parser().parse_args(arguments)
    if options.events < 1 or not 1 <= options.processes <= options.deciders <= 99:
        sys.stderr.write(
            "events, deciders, processes: at least 1 each, at most 99 deciders, no idle process\n"
        )
        return 2
    plan = Plan(
        events=options.events,
        deciders=options.deciders,
        processes=options.processes,
        hand_over_after=options.hand_over_after,
        task_timeout=timedelta(seconds=2),
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        data = Path(options.keep or folder)
        data.mkdir(parents=True, exist_ok=True)
        summary = asyncio.run(prove(data, plan, options.kills, options.limit))
    print(json.dumps(summary | {"seed": options.seed}, indent=None if options.json else 2))
    return 1 if summary["wrong"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.chaos owner", description=__doc__)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--deciders", type=int, default=16)
    parser.add_argument("--processes", type=int, default=4, help="that the deciders are spread over")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--hand-over-after", type=int, default=400, help="mail of one run of the owner")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds until it gives up")
    parser.add_argument("--keep", help="use this folder and leave it, instead of a temporary one")
    parser.add_argument("--json", action="store_true", help="the summary on one line")
    return parser
