"""Deciders on one subject: `python -m scripts.chaos.deciders SETTINGS PROCESS`, killed and started again.

Each has its own events, sends some of them twice, and after a fall asks the database which of them stand.
Most only set a field; the last one of each round reads a counter, decides on that version and sets the next.
"""

from __future__ import annotations

import asyncio
import ctypes
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from sqlalchemy import ColumnElement, select
from temporalio.client import Client, WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.service import RPCError

from activities.services.beliefs import SNAPSHOT, Beliefs
from activities.services.database import Database
from models.beliefs import Handled, Mail
from models.loop import Frozen
from models.settings import Settings
from temporal.beliefs import Terms, settle, tell
from temporal.client import connect

T = TypeVar("T")
Heard = Callable[[Handled], None]
SUBJECT = "sku-4711"
PLAN, ANSWERS = "plan.json", "answers-{}.jsonl"
"""Files in the data folder: what is to be done, and what each process heard."""
PRICING, COUNTER = "pricing", "counter"
"""Who adds fields, and who counts: two agents that want the same subject."""
ROUND = 10
TWICE_PERCENT = 10
PATIENCE = timedelta(seconds=20)
PAUSE = 0.1
IN_FLIGHT = 10
"""Updates that Temporal lets a run have at a time; whoever comes beyond that waits longer than for a turn."""
PR_SET_PDEATHSIG = 1


class Plan(Frozen):
    """What all deciders together are to do."""

    events: int
    deciders: int
    processes: int
    hand_over_after: int
    task_timeout: timedelta
    seed: int

    @property
    def terms(self) -> Terms:
        """How they start an owner."""
        return Terms(self.task_timeout, self.hand_over_after)

    def names(self, process: int) -> list[str]:
        """The deciders of one process."""
        return [f"d{number:02}" for number in range(process, self.deciders, self.processes)]

    def share(self, name: str) -> int:
        """How many events are a decider's own."""
        number = int(name[1:])
        return self.events // self.deciders + (number < self.events % self.deciders)


def counts(number: int) -> bool:
    """Whether a decider's event of that number is a compare-and-set."""
    return number % ROUND == ROUND - 1


def event_of(name: str, number: int) -> str:
    """The id of an event; attempts to count add theirs."""
    return f"{name}-{number:05}"


@dataclass(frozen=True, slots=True)
class Decider:
    """One decider: sends its events in rounds until each stands."""

    name: str
    plan: Plan
    client: Client
    database: Database
    tenant: str
    turn: asyncio.Semaphore
    heard: Heard
    """Told of every answer, as it is heard."""

    async def run(self) -> None:
        """All events, round by round."""
        chance = random.Random(f"{self.plan.seed} {self.name}")
        share = self.plan.share(self.name)
        for first in range(0, share, ROUND):
            await self._round(range(first, min(first + ROUND, share)), chance)

    async def _round(self, numbers: Iterable[int], chance: random.Random) -> None:
        wanted = [number for number in numbers if not counts(number)]
        while missing := await self._missing(wanted):
            for number in missing:
                for _ in range(1 + (chance.randrange(100) < TWICE_PERCENT)):
                    await insist(lambda mail=self._field(number): self._tell(mail))
            # Mail is handled in order: when the last one was, all were, unless their owner was ended.
            self.heard(await insist(lambda mail=self._field(missing[-1]): self._settle(mail)))
        for number in numbers:
            if counts(number):
                await self._count(event_of(self.name, number))

    async def _count(self, event: str) -> None:
        beliefs = Beliefs(self.database, lambda: datetime.now(UTC))
        # From point to slash: every attempt at this event, whichever version it was decided on.
        attempts = SNAPSHOT.c.agent == COUNTER, SNAPSHOT.c.event_id.between(f"{event}.", f"{event}/")
        while not await self._standing(*attempts):
            seen = await beliefs.now(self.tenant, COUNTER, SUBJECT)
            mail = Mail(
                agent=COUNTER,
                event=f"{event}.{seen.version}",
                sets={"count": int(seen.value("count") or 0) + 1},
                expected=seen.version,
            )
            self.heard(await insist(lambda mail=mail: self._settle(mail)))

    async def _missing(self, numbers: list[int]) -> list[int]:
        events = {event_of(self.name, number): number for number in numbers}
        standing = await self._standing(SNAPSHOT.c.agent == PRICING, SNAPSHOT.c.event_id.in_(list(events)))
        return [number for event, number in events.items() if event not in standing]

    async def _standing(self, *which: ColumnElement[bool]) -> set[str]:
        mine = SNAPSHOT.c.tenant == self.tenant, SNAPSHOT.c.subject == SUBJECT
        query = select(SNAPSHOT.c.event_id).where(*mine, *which)
        return set(await self.database.read(lambda link: link.execute(query).scalars().all()))

    def _field(self, number: int) -> Mail:
        return Mail(agent=PRICING, event=event_of(self.name, number), sets={self.name: number + 1})

    async def _tell(self, mail: Mail) -> None:
        await tell(self.client, self.tenant, SUBJECT, mail, self.plan.terms)

    async def _settle(self, mail: Mail) -> Handled:
        async with self.turn:
            return await settle(self.client, self.tenant, SUBJECT, mail, PATIENCE, self.plan.terms)


async def insist(call: Callable[[], Awaitable[T]]) -> T:
    """Ask until there is an answer: sending again changes nothing twice."""
    while True:
        try:
            return await call()
        except (RPCError, WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError):
            await asyncio.sleep(PAUSE)


async def serve(settings: Settings, plan: Plan, names: Iterable[str], heard: Heard) -> None:
    """Run deciders to their end."""
    client = await connect(settings.temporal)
    database = Database(settings.database_url)
    turn = asyncio.Semaphore(max(1, IN_FLIGHT // plan.processes))
    own = (Decider(name, plan, client, database, settings.tenant, turn, heard) for name in names)
    await asyncio.gather(*(one.run() for one in own))
    database.close()


def main(arguments: list[str]) -> int:
    """Read settings and plan, and decide."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    settings = Settings.model_validate_json(Path(arguments[0]).read_bytes())
    plan = Plan.model_validate_json((settings.data / PLAN).read_bytes())
    process = int(arguments[1])
    with open(settings.data / ANSWERS.format(process), "a", buffering=1) as out:
        # Written before the next step, so that a kill loses none that counts.
        heard: Heard = lambda one: print(one.model_dump_json(), file=out, flush=True)  # noqa: E731
        asyncio.run(serve(settings, plan, plan.names(process), heard))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
