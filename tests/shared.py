"""One stack for a whole module of tests: every agent of `tests/variants.py`, and targets that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from activities.connectors.base import Applied, Dry, Work
from activities.connectors.null import Null
from activities.services.ledger_store import LedgerStore
from models.errors import ConnectorRejected
from models.ledger import Append, Draft, Event, EventType, event_id
from models.loop import GateRule, Guarantee, Outcome, Reversibility
from models.orders import Pace
from models.policy import AgentPolicy, Policy
from models.settings import Settings, TemporalSettings
from models.visibility import Role
from temporal.client import Started
from tests.conftest import ROLES, Stack, settings_for, stack_of
from tests.variants import AGENTS
from workers.compose import Parts, utc_now

LIMIT = 30
"""Seconds after which what is waited for will not come; a broken loop must fail a test, not hold it."""
CONNECTORS = ("null", "site", "odd")
GATES = {
    "external": GateRule(remind_seconds=None),
    "pair": GateRule(remind_seconds=None, approvals=2),
    "roles": GateRule(remind_seconds=None, approvals=2, roles=("editor", "lawyer")),
    "auto": GateRule(remind_seconds=None, automatic=True),
    "keep": GateRule(remind_seconds=None, keep_partial=True),
    "short": GateRule(remind_seconds=None),
    "hasty": GateRule(remind_seconds=None, absolute_seconds=1),
}


def policies(**changes: GateRule) -> Policy:
    gates = GATES | changes
    limits = {"short": 4}
    return Policy(
        agents={
            name: AgentPolicy(connectors=CONNECTORS, gate=gate, max_revisions=limits.get(name, 50))
            for name, gate in gates.items()
        }
    )


@dataclass
class Odd:
    """The null target with holds: each use waits where a test wants it to, or fails as told."""

    inner: Null
    name: str = "odd"
    guarantee: Guarantee = Guarantee.KEYED
    settle: timedelta = timedelta(0)
    reversibility: Reversibility = Reversibility.REVERSIBLE
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    planning: asyncio.Event = field(default_factory=asyncio.Event)
    sends: list[str] = field(default_factory=list)
    undoes: list[str] = field(default_factory=list)

    async def plan(self, work: Work) -> Dry:
        dry = await self.inner.plan(_plain(work))
        if work.arguments.get("hold") == "plan":
            self.planning.set()
            await self.go_on.wait()
        kind = Reversibility.IRREVERSIBLE if work.arguments.get("irreversible") else dry.reversibility
        return Dry(dry.target, dry.version, dry.diff, kind, dry.undo)

    async def find(self, key: str, work: Work) -> Applied | None:
        return await self.inner.find(key, _plain(work))

    async def apply(self, key: str, work: Work, expected: str, deadline: datetime) -> Applied:
        self.sends.append(key)
        if work.arguments.get("hold") == "apply":
            self.reached.set()
            await self.go_on.wait()
        return await self.inner.apply(key, _plain(work), expected, deadline)

    async def verify(self, work: Work, applied: Applied) -> Applied:
        return await self.inner.verify(_plain(work), applied)

    async def undo(self, key: str, work: Work, applied: Applied, deadline: datetime) -> Applied:
        self.undoes.append(key)
        if work.arguments.get("stuck"):
            raise ConnectorRejected("odd: asked not to be taken back")
        if work.arguments.get("hold") == "undo":
            self.reached.set()
            await self.go_on.wait()
        return await self.inner.undo(key, _plain(work), applied, deadline)

    def reset(self) -> None:
        for event in (self.reached, self.go_on, self.planning):
            event.clear()
        self.sends.clear()
        self.undoes.clear()


def _plain(work: Work) -> Work:
    return Work("note", {k: v for k, v in work.arguments.items() if k in ("text", "target", "fail")})


@dataclass
class Shared(Stack):
    odd: Odd

    def target(self, name: str, text: str) -> None:
        """Change what notes about `name` are made against."""
        (self.settings.data / "notes" / "targets" / name).write_text(text)

    def standing(self, text: str) -> int:
        """How many notes with this text stand, those taken back left out."""
        null = Null(self.settings.data / "notes", utc_now)
        folder = self.settings.data / "notes" / "notes"
        return sum(f'"{text}"' in (folder / key).read_text() for key in null.standing())

    async def until(self, run: Started, kind: str, count: int = 1) -> tuple[Event, ...]:
        """The run's events of one kind, once there are as many."""
        async with asyncio.timeout(LIMIT):
            while True:
                events = [event for event in await self.events(run) if event.type.value == kind]
                if len(events) >= count:
                    return tuple(events)
                await asyncio.sleep(0.01)

    async def lose(self, run: Started, *events: tuple[EventType, dict[str, Any]]) -> None:
        """Log what a task of the run might have, which Temporal then lost: the run does not know of it."""
        chain = (await run.handle.describe()).run_id
        version = max(one.version for one in await self.events(run) if one.stream == run.workflow_id)
        drafts = tuple(
            Draft(
                event_id=event_id("default", run.workflow_id, chain, kind, number),
                stream=run.workflow_id,
                type=kind,
                actor_kind="person",
                actor_ref="somebody",
                correlation_id=run.workflow_id,
                body=body,
            )
            for number, (kind, body) in enumerate(events, version + 1)
        )
        wish = Append(tenant="default", stream=run.workflow_id, expected=version, drafts=drafts)
        assert (await LedgerStore(self.database, utc_now).append(wish)).won

    async def digest(self, run: Started, number: int = 1) -> str:
        async with asyncio.timeout(LIMIT):
            return await super().digest(run, number)

    async def outcome(self, run: Started) -> Outcome:
        """How it ended; the ledger must say the same, once."""
        async with asyncio.timeout(LIMIT):
            result = await run.handle.result()
        logged = [event.body for event in await self.events(run) if event.type.value == "outcome"]
        assert logged == [result.model_dump(mode="json")]
        return result


@asynccontextmanager
async def shared_stack(
    temporal: TemporalSettings,
    data: Path,
    change: Callable[[Settings], Settings] = lambda one: one,
    roles: tuple[Role, ...] = ROLES,
) -> AsyncGenerator[Shared]:
    pace = Pace(attempt=timedelta(seconds=3), heartbeat=timedelta(seconds=2), effect=timedelta(seconds=20))
    settings = change(settings_for(temporal, data, policy=policies(), pace=pace))
    odd = Odd(Null(data / "notes", utc_now))
    parts = Parts(agents=AGENTS, connectors=lambda known: {**known, "odd": odd})
    async with stack_of(settings, parts, roles) as made:
        yield Shared(made.client, made.settings, made.database, odd)


def odd(text: str, **more: Any) -> dict[str, Any]:
    return {"connector": "odd", "operation": "note", "arguments": {"text": text} | more, "title": text}
