"""Runs overlapping callers of real code one step at a time, in every order up to a bound, or in many.

A caller stops wherever its process would wait for another one: a transaction, a target. Which of them goes
on, dies, or sleeps until its time is up, and what a target answers, is a choice, and a run is its choices:
the same ones make the same run. Whatever differs from doing everything well, one caller after the other, is a
surprise, and a search is bounded by how many of them one run may have.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

T = TypeVar("T")
TICK = timedelta(microseconds=1)
PAUSE = timedelta(milliseconds=5)
LONGEST = 400
"""Choices in one run; more are a caller that never ends."""


class Pruned(Exception):
    """From here on everything was seen before."""


class Endless(Exception):
    """A run does not end."""


class Choices:
    """What was chosen in a run, and what else could have been."""

    def __init__(
        self,
        given: Sequence[int] = (),
        budget: int = 0,
        seen: dict[object, int] | None = None,
        chance: random.Random | None = None,
    ) -> None:
        """Follow what is given, then take what surprises least, or what chance says.

        Args:
            given: which of the options to take, first to last.
            budget: how many surprises there may be.
            seen: states met by earlier runs of a search, with the surprises that were left in each.
            chance: where the rest comes from.
        """
        self.left = budget
        self.taken = list[int]()
        self.names = list[str]()
        self._given, self._seen, self._chance = given, seen, chance
        self._counts = list[int]()

    def pick(self, names: Sequence[str], usual: int = 1) -> int:
        """Which of the options it is; the first `usual` ones surprise nobody."""
        if len(self.taken) >= LONGEST:
            raise Endless(f"after {LONGEST} choices it still goes on")
        affordable = len(names) if self.left > 0 else min(usual, len(names))
        place = len(self.taken)
        if place < len(self._given):
            index = min(self._given[place], affordable - 1)
        elif self._chance is not None and self._chance.random() < 0.45:
            index = self._chance.randrange(affordable)
        else:
            index = 0
        self.taken.append(index)
        self._counts.append(affordable)
        if index >= usual:
            self.left -= 1
        if affordable > 1:
            self.names.append(names[index])
        return index

    def meet(self, state: object) -> None:
        """End the run if a search was here before with as much to spend."""
        if self._seen is None or len(self.taken) < len(self._given):
            return
        if self._seen.get(state, -1) >= self.left:
            raise Pruned
        self._seen[state] = self.left

    def next(self) -> list[int] | None:
        """The choices of the next run of an exhaustive search; nothing after the last."""
        taken = self.taken
        for place in range(len(taken) - 1, -1, -1):
            if taken[place] + 1 < self._counts[place]:
                return [*taken[:place], taken[place] + 1]
        return None


class Script(Choices):
    """A run by the names of what happens in it; whatever they leave out goes as one expects."""

    def __init__(self, *words: str) -> None:
        """Each is chosen as soon as it is one of the options, and the next one only after it."""
        super().__init__(budget=LONGEST)
        self.words = list(words)

    def pick(self, names: Sequence[str], usual: int = 1) -> int:
        """The next word, if it is among them."""
        if not self.words or self.words[0] not in names:
            return 0
        return names.index(self.words.pop(0))


class Clocked(asyncio.SelectorEventLoop):
    """An event loop whose time is the explorer's, so that time-outs fall when it says so."""

    def __init__(self, now: datetime) -> None:
        """Start then."""
        super().__init__()
        self.now = now

    def time(self) -> float:
        """Seconds, as time-outs count them."""
        return self.now.timestamp()


@dataclass(slots=True)
class Caller:
    """Somebody who calls, and where they stand."""

    name: str
    work: Coroutine[Any, Any, object]
    label: str = ""
    gate: asyncio.Future[None] | None = None
    task: asyncio.Task[object] | None = None
    dead: bool = False
    trail: int = 0
    """What they have seen so far; callers who saw the same go on in the same way."""

    @property
    def runs(self) -> bool:
        """On their way from one stop to the next."""
        done = self.task is None or self.task.done()
        return not done and not self.dead and (self.gate is None or self.gate.done())

    @property
    def waits(self) -> bool:
        """At a stop."""
        return not self.dead and self.gate is not None and not self.gate.done()


CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


@dataclass(slots=True)
class Move:
    """Something that may happen next, without any caller."""

    name: str
    does: Callable[[], None]


@dataclass(slots=True)
class Stage:
    """Where one run takes place."""

    loop: Clocked
    choices: Choices
    snapshot: Callable[[], object]
    """Everything that callers share, as a value that can be hashed."""
    moves: Callable[[], Sequence[Move]]
    """What may happen from outside now."""
    deadlines: Callable[[], Sequence[datetime]]
    """Moments at which something changes by itself."""
    crashes: bool = True
    callers: list[Caller] = field(default_factory=list[Caller])
    told: list[str] = field(default_factory=list[str])
    """The schedule, in words."""
    current: Caller | None = None

    def clock(self) -> datetime:
        """The time."""
        return self.loop.now

    async def stop(self, label: str) -> None:
        """Wait here until it is one's turn; who is no caller goes on at once."""
        caller = CALLER.get()
        if caller is None:
            return
        caller.label, caller.gate = label, self.loop.create_future()
        await caller.gate

    def choose(self, *options: str) -> str:
        """What a target answers; the first is what one expects, and all that who is no caller gets."""
        caller = CALLER.get()
        if caller is None:
            return options[0]
        answer = options[self.choices.pick(options)]
        caller.trail = hash((caller.trail, answer))
        self.told[-1] += f"={answer}"
        return answer

    async def run(self, calls: Sequence[tuple[str, Callable[[], Coroutine[Any, Any, object]]]]) -> None:
        """Let all of them call at once, until nobody is left who goes on."""
        for name, call in calls:
            self.callers.append(Caller(name, call()))
        try:
            for caller in self.callers:
                caller.task = self.loop.create_task(self._enter(caller))
            await self._quiet()
            while any(caller.waits for caller in self.callers):
                await self._step()
        finally:
            await self._leave()

    async def _enter(self, caller: Caller) -> object:
        CALLER.set(caller)
        try:
            await self.stop("start")
        except BaseException:
            caller.work.close()
            raise
        return await caller.work

    async def _step(self) -> None:
        here = self.snapshot()
        standing = tuple((one.label, one.trail, one.waits, one.dead) for one in self.callers)
        self.choices.meet((here, standing, self.current and self.current.name, self.loop.now))
        usual, more = self._options(here)
        options = [*usual, *more]
        picked = options[self.choices.pick([one.name for one in options], len(usual))]
        self.told.append(picked.name)
        picked.does()
        await self._quiet()

    def _options(self, here: object) -> tuple[list[Move], list[Move]]:
        waiting = [caller for caller in self.callers if caller.waits]
        steps = [Move(f"{one.name}.{one.label}", lambda one=one: self._go_on(one, here)) for one in waiting]
        if self.current is None or not self.current.waits:
            return steps, [*self.moves(), *self._ticks()]
        first = waiting.index(self.current)
        dies = Move(f"{self.current.name} dies", self._die)
        rest = [*steps[:first], *steps[first + 1 :]]
        return [steps[first]], [*rest, *([dies] if self.crashes else []), *self.moves(), *self._ticks()]

    def _go_on(self, caller: Caller, here: object) -> None:
        self.current = caller
        caller.trail = hash((caller.trail, caller.label, here, self.loop.now))
        if caller.gate is not None:
            caller.gate.set_result(None)

    def _die(self) -> None:
        if self.current is not None:
            self.current.dead, self.current = True, None

    def _ticks(self) -> list[Move]:
        ahead = [one for one in self.deadlines() if one >= self.loop.now]
        return [Move(f"past {min(ahead).time()}", lambda: self.pass_by(min(ahead)))] if ahead else []

    def pass_by(self, moment: datetime) -> None:
        """Move the clock to just after it."""
        self.loop.now = moment + TICK

    async def _quiet(self) -> None:
        """Until every caller is at a stop, also one whose time-out has just come."""
        for _ in range(3):
            await asyncio.sleep(0)
        for turn in range(10_000):
            if not any(caller.runs for caller in self.callers):
                return
            if turn % 20 == 19:
                # Whoever pauses for a moment and waits for nobody goes on by themselves.
                self.loop.now += PAUSE
            await asyncio.sleep(0)
        raise Endless("a caller waits for something the explorer does not know")

    async def _leave(self) -> None:
        """Nobody who died or was left over goes on later."""
        tasks = [one.task for one in self.callers if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Ran:
    """One run that was judged."""

    taken: tuple[int, ...]
    told: tuple[str, ...]
    wrong: tuple[str, ...]


Run = Callable[[Choices], Awaitable[tuple[Sequence[str], Sequence[str]]]]
"""One run by its choices: what happened, and what was wrong with it."""


async def once(run: Run, choices: Choices) -> Ran | None:
    """One run; nothing if all that comes of it was seen before."""
    with suppress(Pruned):
        told, wrong = await run(choices)
        return Ran(tuple(choices.taken), tuple(told), tuple(wrong))
    return None


async def every(run: Run, budget: int) -> tuple[int, Ran | None]:
    """All runs with at most so many surprises: how many, and the first that went wrong."""
    seen = dict[object, int]()
    given: list[int] | None = []
    count = 0
    while given is not None:
        choices = Choices(given, budget, seen)
        ran = await once(run, choices)
        count += 1
        if ran is not None and ran.wrong:
            return count, ran
        given = choices.next()
    return count, None


async def some(run: Run, budget: int, seeds: Iterator[int] | Sequence[int]) -> tuple[int, Ran | None]:
    """One run for each seed: how many, and the first that went wrong, made as short as it can be."""
    count = 0
    for seed in seeds:
        ran = await once(run, Choices(budget=budget, chance=random.Random(seed)))
        count += 1
        if ran is not None and ran.wrong:
            return count, await shortest(run, budget, ran)
    return count, None


async def shortest(run: Run, budget: int, ran: Ran) -> Ran:
    """The same fault with as few surprises as trying to leave one out at a time gets."""
    better = True
    while better:
        better = False
        for place in [at for at, index in enumerate(ran.taken) if index]:
            for given in (
                [*ran.taken[:place], 0, *ran.taken[place + 1 :]],
                [*ran.taken[:place], *ran.taken[place + 1 :]],
            ):
                tried = await once(run, Choices(given, budget))
                if tried is not None and tried.wrong and _weight(tried) < _weight(ran):
                    ran, better = tried, True
                    break
            if better:
                break
    return ran


def _weight(ran: Ran) -> tuple[int, int]:
    return sum(1 for index in ran.taken if index), len(ran.told)
