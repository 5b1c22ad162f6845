"""`python -m scripts.chaos.overlaps`: overlapping attempts at one action, in every order and at every target.

The act engine, its reservations and the ledger are the real ones, on a real database. What the target's book
says happened is held against the ledger and against everything that anybody was told.

Prints one JSON summary with a short schedule of the first fault. Exit code 0 when there was none, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import fnmatch
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection

from activities.services.actor import Actor
from activities.services.database import Database, from_micros
from activities.services.ledger_store import add_in
from models.canonical import derived_id
from models.errors import ConnectorRejected, ConnectorUnavailable, CountersignError
from models.ledger import Draft, EventType
from models.loop import Guarantee, Intent, action_key
from models.orders import Effected, EffectOrder
from models.policy import AgentPolicy, Policy
from scripts.chaos.book import Sent, Target
from scripts.chaos.bound import AGENT, NOW, TENANT, World
from scripts.chaos.explorer import Choices, Clocked, Move, Ran, Stage, every, some
from scripts.chaos.overlaps_judge import Judge

T = TypeVar("T")
ATTEMPT = timedelta(minutes=1)


class Stepped(Database):
    """The real schema on one connection, where each transaction is one step and nothing outlives a run."""

    def __init__(self, url: str) -> None:
        """Hold one transaction open, in which all others are nested."""
        super().__init__(url)
        self.link = self.engine.connect()
        self.stage: Stage | None = None

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Do it in a transaction, when it is the caller's turn."""
        await self._stop("writes")
        return self._alone(work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """The same."""
        await self._stop("reads")
        return self._alone(work)

    def _alone(self, work: Callable[[Connection], T]) -> T:
        part = self.link.begin_nested()
        try:
            result = work(self.link)
        except BaseException:
            part.rollback()
            raise
        part.commit()
        return result

    def rows(self, query: str) -> list[Any]:
        """What stands there now."""
        return list(self.link.exec_driver_sql(query))

    @contextmanager
    def forgetting(self) -> Any:
        """Undo afterwards whatever is done."""
        part = self.link.begin_nested()
        try:
            yield
        finally:
            part.rollback()

    def close(self) -> None:
        """Give the connection back."""
        self.link.close()
        super().close()

    async def _stop(self, label: str) -> None:
        if self.stage is not None:
            await self.stage.stop(label)


@dataclass(frozen=True, slots=True)
class Case:
    """Who calls what, at which target, and what may happen besides."""

    guarantee: Guarantee
    calls: tuple[str, ...]
    """apply, settle, undo, verify; or saga, which is apply twice and then settle."""
    events: tuple[str, ...] = ()
    """drift, revoke, narrow, expire."""
    undoing: bool = False
    """It was applied, and the run has decided to take it back."""
    careful: bool = True
    begun: str = ""
    """How the target answered an attempt before all these, whose time is over."""

    @property
    def name(self) -> str:
        """As a test is called."""
        begun = [self.begun.replace(" ", "_")] if self.begun else []
        words = [self.guarantee.value, *begun, "+".join(self.calls), *self.events]
        return "-".join(
            words + (["undoing"] if self.undoing else []) + ([] if self.careful else ["careless"])
        )


class Overlaps:
    """One approved action, which every run begins anew."""

    def __init__(self, url: str, intent: Intent, order: EffectOrder, policy: Policy) -> None:
        """Everything is bound and approved in that database already."""
        self.database = Stepped(url)
        self.intent, self.order, self.policy = intent, order, policy
        self.book = tuple[Sent, ...]()
        """What the target did before any run."""
        self.judged = dict[object, tuple[str, ...]]()
        """What was wrong where a run ended like this."""
        self.verified = dict[object, tuple[str, ...]]()
        """What the verifier found in such a log."""

    def close(self) -> None:
        """Give the database back."""
        self.database.close()

    async def take_back(self) -> None:
        """Apply it, and have its run decide to take it back, before all runs."""
        playing = Playing(self, Case(Guarantee.KEYED, ()), Choices())
        await playing.actor.apply(self.order)
        self.book = tuple(playing.target.book)
        playing.log(EventType.COMPENSATION, {"actions": [0], "reason": "why"})

    async def run(self, case: Case, choices: Choices) -> tuple[list[str], list[str]]:
        """One run by its choices; what happened, and what was wrong."""
        with self.database.forgetting():
            playing = Playing(self, case, choices)
            return await playing.play()


class Playing:
    """One run."""

    def __init__(self, world: Overlaps, case: Case, choices: Choices) -> None:
        """Nothing has happened yet."""
        loop = _running()
        loop.now = NOW
        self.world, self.case, self.database, self.order = world, case, world.database, world.order
        self.stage = Stage(loop, choices, self._state, self._moves, self.deadlines)
        self.target = Target(self.stage, case.guarantee, world.intent.plans[0].target_version, case.careful)
        self.target.allowed = self._forbids
        self.target.book.extend(world.book)
        self.database.stage = self.stage
        self.revoked = self.narrowed = False
        self.left = Counter({"drift": 2, "revoke": 1, "narrow": 1, "expire": 1})
        self.heard = list[tuple[str, Effected]]()
        self.wrong = self.target.wrong
        own, changed = world.policy, _narrower(world.policy)
        self.actor = Actor(
            world.database,
            {"null": self.target},
            own,
            ATTEMPT,
            self.stage.clock,
            lambda tenant, verdict: "the key was revoked" if self.revoked else None,
            in_force=lambda link, tenant, agent: (changed if self.narrowed else own).of(agent),
        )

    @property
    def key(self) -> str:
        """What it is about."""
        return action_key(self.order.digest, 0) + (".undo" if self.case.undoing else "")

    async def play(self) -> tuple[list[str], list[str]]:
        """All of it, and the judgement."""
        if self.case.begun:
            await self._begins()
        names = [f"{word}{place}" for place, word in enumerate(self.case.calls, start=1)]
        calls = zip(names, self.case.calls, strict=True)
        await self.stage.run(
            [(name, lambda name=name, word=word: self._calls(name, word)) for name, word in calls]
        )
        end = (self.case.name, self._state(), self.stage.clock(), tuple(self.heard), tuple(self.wrong))
        if end not in self.world.judged:
            await Judge(self).judge()
            self.world.judged[end] = tuple(self.wrong)
        return self.stage.told, [*self.world.judged[end]]

    async def _begins(self) -> None:
        self.target.forced = self.case.begun
        with suppress(ConnectorUnavailable):
            await (self.actor.undo if self.case.undoing else self.actor.apply)(self.order)
        self.target.forced = ""
        self.stage.pass_by(max(self.deadlines()))

    async def _calls(self, name: str, word: str) -> None:
        steps = ("apply", "apply", "settle", "settle") if word == "saga" else (word,)
        for step in steps:
            try:
                effect = await getattr(self.actor, step)(self.order)
            except CountersignError as error:
                self.stage.told.append(f"{name} hears {type(error).__name__}")
                if step == "undo" and isinstance(error, ConnectorRejected):
                    self.heard.append((step, Effected.ABSENT))
            except Exception as error:
                self.wrong.append(f"{name} fell over: {type(error).__name__}: {error}")
                return
            else:
                self.stage.told.append(f"{name} hears {effect.what}")
                self.heard.append((step, effect.what))
                return

    def _forbids(self, key: str) -> str | None:
        rows = self.database.rows(f"SELECT state, deadline FROM effect WHERE key = '{key}'")
        if not rows:
            return "that nobody reserved"
        state, deadline = rows[0]
        if state in ("closed", "drifted"):
            return f"that was {state}"
        return "whose last attempt is over" if self.stage.clock() >= from_micros(deadline) else None

    def _state(self) -> object:
        rows = self.database.rows("SELECT key, state, epoch, deadline, result FROM effect")
        heads = self.database.rows("SELECT size, peaks FROM log_head")
        left = (self.revoked, self.narrowed, tuple(sorted(self.left.items())))
        return (self.target.state(), tuple(map(tuple, rows)), tuple(map(tuple, heads)), left)

    def deadlines(self) -> Sequence[datetime]:
        """Moments at which an attempt is over, or what it sent is seen."""
        rows = self.database.rows("SELECT deadline, settles FROM effect")
        return [from_micros(one) for row in rows for one in row]

    def _moves(self) -> Sequence[Move]:
        happen = [Move(one, lambda one=one: self._happens(one)) for one in self.case.events if self.left[one]]
        come = [
            Move(f"request {place} arrives", lambda sent=sent: self.target.arrives(sent))
            for place, sent in enumerate(self.target.coming, start=1)
        ]
        return [*happen, *come]

    def _happens(self, what: str) -> None:
        self.left[what] -= 1
        match what:
            case "drift":
                self.target.drifts()
            case "revoke":
                self.revoked = True
            case "narrow":
                self.narrowed = True
            case _:
                self.log(EventType.GATE, {"standing": "expired"})

    def log(self, kind: EventType, body: dict[str, Any]) -> None:
        """As the run does."""
        stream = self.order.workflow_id
        draft = Draft(
            event_id=derived_id("event", TENANT, stream, kind, "explored"),
            stream=stream,
            type=kind,
            actor_kind="workflow",
            actor_ref=AGENT,
            correlation_id=stream,
            body={"digest": self.order.digest} | body,
        )
        add_in(self.database.link, TENANT, draft, self.stage.clock())


def _narrower(policy: Policy) -> Policy:
    one = policy.of(AGENT)
    gate = one.gate.model_copy(update={"approvals": one.gate.approvals + 1})
    changed: AgentPolicy = one.model_copy(update={"gate": gate})
    return Policy(agents={AGENT: changed})


def _running() -> Clocked:
    loop = asyncio.get_running_loop()
    if not isinstance(loop, Clocked):
        raise LookupError("it runs in a loop whose clock can be moved")
    return loop


async def bound(folder: Path) -> Overlaps:
    """An approved action in a new database, in that folder."""
    world = World(folder, seed=1)
    try:
        made = await world.bind("overlap")
    finally:
        world.database.close()
    url = f"sqlite:///{folder / 'countersign.db'}"
    return Overlaps(url, made.intent, made.order, made.around.policy)


EVENTS = ("drift", "revoke", "narrow", "expire")
CALLS = (("apply", "apply"), ("apply", "settle"), ("settle", "settle"), ("saga", "apply"))
MORE = (("saga", "apply", "apply"), ("saga", "apply", "settle"))
UNDOES = (("undo", "undo"), ("undo", "settle"), ("undo", "apply"), ("undo", "undo", "apply"))


def cases() -> list[Case]:
    """All kinds of targets, and all calls that overlap."""
    found = list[Case]()
    for kind in Guarantee:
        found += [
            Case(kind, calls, EVENTS, careful=careful) for calls in CALLS + MORE for careful in (True, False)
        ]
        found += [Case(kind, calls, ("drift",), undoing=True) for calls in UNDOES]
        for begun in ("is away", "is lost", "comes late"):
            found += [Case(kind, calls, ("drift",), begun=begun) for calls in CALLS]
            found += [Case(kind, ("undo", "undo"), ("drift",), undoing=True, begun=begun)]
    return found


def main() -> int:
    """Search until something is wrong, or all was tried."""
    parser = argparse.ArgumentParser(prog="python -m scripts.chaos.overlaps", description=__doc__)
    parser.add_argument("--surprises", type=int, default=2, help="at most so many in one run")
    parser.add_argument(
        "--random", type=int, help="so many runs of each case by chance, instead of all there are"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", default="*", help="a pattern of their names, for instance 'keyed-saga*'")
    options = parser.parse_args()
    began, runs, wrong = time.monotonic(), dict[str, int](), dict[str, Ran]()
    with tempfile.TemporaryDirectory(prefix="overlaps-") as folder:
        for case, count, ran in _search(Path(folder), options):
            runs[case.name] = count
            if ran is not None:
                wrong[case.name] = ran
                break
    summary = {
        "runs": runs,
        "in_all": sum(runs.values()),
        "wrong": {name: {"what": ran.wrong, "schedule": ran.told} for name, ran in wrong.items()},
        "seconds": round(time.monotonic() - began, 1),
    }
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")
    return 1 if wrong else 0


def _search(folder: Path, options: argparse.Namespace) -> Iterator[tuple[Case, int, Ran | None]]:
    worlds = dict[bool, Overlaps]()
    for undoing in (False, True):
        (folder / str(undoing)).mkdir()
        worlds[undoing] = asyncio.run(bound(folder / str(undoing)))
    with closing(Clocked(NOW)) as loop:
        loop.run_until_complete(worlds[True].take_back())
        for case in cases():
            if not fnmatch.fnmatch(case.name, options.cases):
                continue
            run = partial(worlds[case.undoing].run, case)
            seeds = range(options.seed, options.seed + (options.random or 0))
            search = (
                every(run, options.surprises)
                if options.random is None
                else some(run, options.surprises, seeds)
            )
            count, ran = loop.run_until_complete(search)
            yield case, count, ran
    for world in worlds.values():
        world.close()


if __name__ == "__main__":
    sys.exit(main())
