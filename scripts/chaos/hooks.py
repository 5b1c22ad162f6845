"""Named boundaries inside a worker process, and what it does at an armed one: kill or stop itself.

Nothing of the product is patched. A role gets a database, connectors, model endpoints and a client that say
where they are; a file per run and boundary says where to fall.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import temporalio.client
import temporalio.worker
from sqlalchemy import Connection
from temporalio import activity
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput

from activities.connectors.base import Applied, Connector, Dry, Work
from activities.services.database import Database
from activities.services.git import Git
from activities.tiers.base import Embedder, Endpoint
from models.inference import Completion, DataClass, Prompt
from models.ledger import Append
from models.loop import Guarantee
from models.orders import EffectOrder

T = TypeVar("T")


class How(StrEnum):
    """What a process does to itself at an armed boundary."""

    KILL = "kill"
    STOP = "stop"


@dataclass(slots=True)
class Scope:
    """The step a coroutine is in, and how many writes it has made."""

    run: str
    step: str
    writes: int = 0
    stopped: str = ""
    """The boundary at which it was stopped, once it was."""

    def write(self) -> str:
        """Name the next write."""
        self.writes += 1
        names = WRITES.get(self.step.split(".")[0], ("commit",))
        return names[self.writes - 1] if self.writes <= len(names) else f"write{self.writes}"


WRITES = {
    "apply": ("reserve", "confirm"),
    "undo": ("reserve", "confirm"),
    "settle": ("look", "confirm"),
    "answer": ("store",),
    "index": ("write",),
}
BACKGROUND = "background"
SCOPE: ContextVar[Scope | None] = ContextVar("scope", default=None)


def scope_now() -> Scope:
    """The step under way; work outside any activity is the background indexing of memory."""
    return SCOPE.get() or Scope(BACKGROUND, "index")


@dataclass(frozen=True, slots=True)
class Hit:
    """A boundary that was reached, and by whom."""

    run: str
    boundary: str
    how: How
    pid: int


class Arms:
    """Files that say where which run's worker falls, shared by all processes of one stack."""

    def __init__(self, folder: Path) -> None:
        """Makes the folders."""
        self._armed, self._hit, self._woken = folder / "armed", folder / "hit", folder / "woken"
        self._known: dict[str, Hit] = {}
        self._falling = threading.Lock()
        for path in (self._armed, self._hit, self._woken):
            path.mkdir(parents=True, exist_ok=True)

    def arm(self, run: str, boundary: str, how: How) -> None:
        """Let the process that first gets `run` to `boundary` fall, once."""
        (self._armed / f"{run}@{boundary}").write_text(how.value)

    def reach(self, point: str) -> None:
        """Fall here if this is armed."""
        scope = scope_now()
        name = f"{scope.run}@{scope.step}.{point}"
        # Another thread that falls meanwhile must not take this process with it before its name is written.
        with self._falling:
            try:
                os.rename(self._armed / name, self._hit / name)
            except FileNotFoundError:
                return
            how = How((self._hit / name).read_text())
            (self._hit / name).write_text(f"{how} {os.getpid()}")
            scope.stopped = name
            self._fall(how)

    def woke(self, name: str) -> None:
        """Say that a step that was stopped is over."""
        (self._woken / name).touch()

    def has_woken(self, hit: Hit) -> bool:
        """Whether the stopped step is over."""
        return (self._woken / f"{hit.run}@{hit.boundary}").exists()

    def is_waiting(self, run: str, boundary: str) -> bool:
        """Whether nobody has reached the boundary yet."""
        return (self._armed / f"{run}@{boundary}").exists()

    def disarm(self, run: str, boundary: str) -> None:
        """Nobody shall fall there any more."""
        (self._armed / f"{run}@{boundary}").unlink(missing_ok=True)

    def hits(self) -> tuple[Hit, ...]:
        """Boundaries that were reached, first ones first as far as this process has seen them come."""
        for name in sorted(set(os.listdir(self._hit)) - self._known.keys()):
            hit = _hit(self._hit / name)
            if hit is not None:
                self._known[name] = hit
        return tuple(self._known.values())

    def _fall(self, how: How) -> None:
        os.kill(os.getpid(), signal.SIGKILL if how is How.KILL else signal.SIGSTOP)
        while how is How.KILL:
            # Another thread may get here before the signal does; none may go on.
            time.sleep(1)


class Watch(temporalio.client.Interceptor, temporalio.worker.Interceptor):
    """Boundaries `start` and `end` of every activity: before its first line, before its result is told."""

    def __init__(self, arms: Arms) -> None:
        """Give this to the client; its workers take it from there."""
        self._arms = arms

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        """Put the boundaries around every activity, local ones included."""
        return _Inbound(next, self._arms)


class _Inbound(ActivityInboundInterceptor):
    def __init__(self, next: ActivityInboundInterceptor, arms: Arms) -> None:
        super().__init__(next)
        self._arms = arms

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        info = activity.info()
        scope = Scope(info.workflow_id or BACKGROUND, _step(info.activity_type, input.args))
        SCOPE.set(scope)
        try:
            self._arms.reach("start")
            result = await super().execute_activity(input)
            self._arms.reach("end")
        finally:
            if scope.stopped:
                self._arms.woke(scope.stopped)
        return result


class WatchedDatabase(Database):
    """Boundaries around every write: before it, inside its transaction, after the commit."""

    def __init__(self, url: str, arms: Arms) -> None:
        """As the database of the product."""
        super().__init__(url)
        self._arms = arms

    async def write(self, work: Callable[[Connection], T]) -> T:
        """As the product's, with boundaries."""
        scope = scope_now()
        name = scope.write()

        def inside(connection: Connection) -> T:
            result = work(connection)
            token = SCOPE.set(scope)
            self._arms.reach(f"{name}.inside")
            SCOPE.reset(token)
            return result

        self._arms.reach(f"{name}.before")
        result = await super().write(inside)
        self._arms.reach(f"{name}.after")
        return result


class WatchedConnector:
    """Boundaries around every touch of a target."""

    def __init__(self, inner: Connector, arms: Arms) -> None:
        """Take what does the work."""
        self._inner = inner
        self._arms = arms

    @property
    def name(self) -> str:
        """The name actions use."""
        return self._inner.name

    @property
    def guarantee(self) -> Guarantee:
        """What the target promises."""
        return self._inner.guarantee

    @property
    def settle(self) -> timedelta:
        """How long a request may be under way."""
        return self._inner.settle

    async def plan(self, work: Work) -> Dry:
        """Boundaries `plan.before` and `plan.after`."""
        self._arms.reach("plan.before")
        dry = await self._inner.plan(work)
        self._arms.reach("plan.after")
        return dry

    async def find(self, key: str, work: Work) -> Applied | None:
        """Boundaries `find.before` and `find.after`."""
        self._arms.reach("find.before")
        found = await self._inner.find(key, work)
        self._arms.reach("find.after")
        return found

    async def apply(self, key: str, work: Work, expected: str, deadline: datetime) -> Applied:
        """Boundaries `send.before` and `send.after`."""
        self._arms.reach("send.before")
        applied = await self._inner.apply(key, work, expected, deadline)
        self._arms.reach("send.after")
        return applied

    async def verify(self, work: Work, applied: Applied) -> Applied:
        """Boundaries `verify.before` and `verify.after`."""
        self._arms.reach("verify.before")
        seen = await self._inner.verify(work, applied)
        self._arms.reach("verify.after")
        return seen

    async def undo(self, key: str, work: Work, applied: Applied, deadline: datetime) -> Applied:
        """Boundaries `takeback.before` and `takeback.after`."""
        self._arms.reach("takeback.before")
        undone = await self._inner.undo(key, work, applied, deadline)
        self._arms.reach("takeback.after")
        return undone


class WatchedGit(Git):
    """Boundaries around the one step that moves a branch."""

    def __init__(self, repository: Path, clock: Callable[[], datetime], arms: Arms) -> None:
        """As the product's."""
        super().__init__(repository, clock)
        self._arms = arms

    async def swap(self, ref: str, new: str, old: str, deadline: datetime | None = None) -> bool:
        """Boundaries `swap.before` and `swap.after`."""
        self._arms.reach("swap.before")
        moved = await super().swap(ref, new, old, deadline)
        self._arms.reach("swap.after")
        return moved


class WatchedEndpoint:
    """Boundaries around every question to a model."""

    def __init__(self, inner: Endpoint, arms: Arms) -> None:
        """Take what answers."""
        self._inner = inner
        self._arms = arms

    @property
    def name(self) -> str:
        """The tier's name."""
        return self._inner.name

    async def complete(self, prompt: Prompt) -> Completion:
        """Boundaries `model.before` and `model.after`."""
        self._arms.reach("model.before")
        completion = await self._inner.complete(prompt)
        self._arms.reach("model.after")
        return completion

    async def ready(self) -> bool:
        """As the endpoint says."""
        return await self._inner.ready()

    async def aclose(self) -> None:
        """Give connections back."""
        await self._inner.aclose()


class WatchedEmbedder:
    """Boundaries around every embedding."""

    def __init__(self, inner: Embedder, arms: Arms) -> None:
        """Take what embeds."""
        self._inner = inner
        self._arms = arms

    @property
    def model(self) -> str:
        """Identity of the model."""
        return self._inner.model

    @property
    def sees(self) -> frozenset[DataClass]:
        """The data classes that it may be shown."""
        return self._inner.sees

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Boundaries `embed.before` and `embed.after`."""
        self._arms.reach("embed.before")
        vectors = await self._inner.embed(texts)
        self._arms.reach("embed.after")
        return vectors


def _step(kind: str, arguments: Sequence[Any]) -> str:
    first = arguments[0] if arguments else None
    if isinstance(first, Append):
        return f"{kind}.{first.drafts[-1].type}"
    return f"{kind}.{first.action}" if isinstance(first, EffectOrder) else kind


def _hit(path: Path) -> Hit | None:
    how, _, pid = path.read_text().partition(" ")
    run, _, boundary = path.name.partition("@")
    # The process id is written just after the boundary was claimed.
    return Hit(run, boundary, How(how), int(pid)) if pid else None
