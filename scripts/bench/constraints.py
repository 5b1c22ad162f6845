"""Random requests over random faults: `python -m scripts.bench constraints --examples 1000000`.

Each request is routed, asked, and led through whatever its faults lead to: fallback, doubt and the next tier,
repair, an open breaker, the cache, the queue, placeholders, a caller that names a tier the router did not.
What a model server receives is held against the request's own truth by rules written here once more, not by
those under test. Servers repeat what they were told, so that an answer shows whether it was restored. Prints
one JSON object; a single violation fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from activities.services.breaker import Breakers
from activities.services.router import PROBE, Answerer
from models.budget import Account
from models.calibration import Odds, Step
from models.errors import (
    AllTiersFailed,
    BudgetExceeded,
    CountersignError,
    CredentialsRejected,
    DeadlineMissed,
    InvalidInput,
    OutputInvalid,
    PolicyDenied,
    RateLimited,
    TierUnavailable,
)
from models.inference import (
    Answered,
    Call,
    Completion,
    DataClass,
    Grant,
    Prompt,
    Route,
    TokenChance,
    Weigh,
)
from models.routing import Measured, Snapshot, Telemetry, Wish, decide, needs_of
from models.settings import TaskSettings, TierSettings
from models.visibility import infer_queue
from scripts.bench._asking import NOW, TASKS, Kept, Shelf, note_in

CLASSES = tuple(DataClass)
LIKELY = dict.fromkeys(CLASSES, 0.8) | {DataClass.PERSONAL: 0.5}
"""Chances that a tier may see a class."""
REGIONS = (None, None, None, "eu", "us")
FAULTS = (*(None,) * 12, RateLimited, TierUnavailable, OutputInvalid, InvalidInput, CredentialsRejected)
GO_ON = (RateLimited, TierUnavailable, OutputInvalid, CredentialsRejected)
PER_WORLD = 40
PERSONAL = {
    "ask ann@example.org": ("ann@example.org",),
    "call +49 30 1234567": ("+49 30 1234567",),
    "from 203.0.113.7": ("203.0.113.7",),
    "tell bob@example.org what ann@example.org said": ("bob@example.org", "ann@example.org"),
    "the mark ⟦EMAIL_1⟧ is not ann@example.org": ("ann@example.org",),
}
"""Notes, and what of each must not be seen by everybody."""
PLAIN = ("a kettle", "two bicycles", "opening hours")
PATHS = (
    *("first", "fallback", "doubted", "repaired", "cached", "queued"),
    *("redacted", "named by the caller", "refused", "failed"),
)


@dataclass(frozen=True, slots=True)
class Truth:
    """What a request is, whatever anybody says."""

    tenant: str
    data_class: DataClass
    region: str | None
    structured: bool
    pin: str | None
    note: str = ""
    said: DataClass = DataClass.PUBLIC
    """The class that the caller declared."""


@dataclass
class Violations:
    """What was seen."""

    examples: int = 0
    found: tuple[str, ...] = ()
    reached: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(PATHS, 0)))

    def note(self, text: str) -> None:
        """Something reached what it must not."""
        self.found = (*self.found, text)[:20]


class Server:
    """A model server that looks at what it gets, and fails as it is told."""

    def __init__(self, tier: TierSettings, world: World) -> None:
        """One of a world."""
        self.name = tier.name
        self._tier = tier
        self._world = world

    async def complete(self, prompt: Prompt) -> Completion:
        """Check, then answer or fail."""
        if prompt is not PROBE:
            self._world.received(self._tier, prompt)
        fault = self._world.random.choice(FAULTS)
        if fault is not None:
            raise fault(f"{self.name}: told to")
        broken = self._world.random.random() < 0.2
        return Completion(
            text=json.dumps({"b" if broken else "a": note_in(prompt)}, ensure_ascii=False),
            finish="stop",
            prompt_tokens=10,
            completion_tokens=5,
            model=f"model of {self.name}",
            milliseconds=1,
            chances=(
                TokenChance(token='"b"', logprob=-0.1, margin=self._world.random.choice((0.1, 0.2, 3.0))),
            ),
        )

    async def ready(self) -> bool:
        """Always."""
        return True

    async def aclose(self) -> None:
        """Nothing to give back."""


class World:
    """Tiers with random limits and what stands behind them."""

    def __init__(self, rng: random.Random, seen: Violations) -> None:
        """Everything follows from the generator."""
        self.random, self.seen = rng, seen
        names = ("edge", "standard", "large", "far")[: rng.randint(1, 4)]
        self.tiers = tuple(self._tier(name) for name in names)
        self.redacts = rng.random() < 0.5
        self.seconds = 0.0
        self.truth = Truth("acme", DataClass.PUBLIC, None, False, None)
        self.cache = Kept()
        self.shelf = Shelf()
        self.made_for: dict[str, Truth] = {}
        self.asked_again = 0
        self.requests = [self._request() for _ in range(10)]
        self.answerer = Answerer(
            self.tiers,
            {tier.name: Server(tier, self) for tier in self.tiers},
            TASKS,
            self.shelf,
            wanted=dict.fromkeys(TASKS, TaskSettings(redact=self.redacts)),
            cache=self.cache,
            breakers=Breakers(lambda: self.seconds, rng.random),
            ticks=lambda: self.seconds,
            clock=lambda: NOW,
        )

    def received(self, tier: TierSettings, prompt: Prompt) -> None:
        """Hold what a server got against the truth."""
        truth = self.truth
        if any(message.role == "assistant" for message in prompt.messages):
            self.asked_again += 1
        # One token is at least one byte here: words of letters and spaces.
        words = sum(message.content.count(" word") for message in prompt.messages)
        broken = [
            (self._shown(prompt) not in tier.data_classes, "data class"),
            (truth.region is not None and truth.region != tier.region, "region"),
            (truth.structured and not tier.structured, "schema"),
            (truth.pin is not None and truth.pin != tier.name, "pin"),
            (words + prompt.max_tokens > tier.context_tokens, "context"),
        ]
        for is_broken, what in broken:
            if is_broken:
                self.seen.note(f"{what}: {truth} reached {tier.name}")

    def _shown(self, prompt: Prompt) -> DataClass:
        """The class of what was sent: without the originals, and where they may be replaced, as declared."""
        sent, truth = prompt.model_dump_json(), self.truth
        originals = PERSONAL.get(truth.note, ())
        if not originals or not self.redacts or any(one in sent for one in originals):
            return truth.data_class
        self.seen.reached["redacted"] += 1
        return truth.said

    async def example(self) -> None:
        """One request to its end."""
        rng = self.random
        self.seconds += rng.choice((0.01, 0.01, 7.0))
        call, self.truth, wanted = rng.choice(self.requests)
        task = TASKS[call.task]
        needs = needs_of(task, call, task.build({}, call.params), {}, wanted)
        snapshot = self._snapshot()
        wrong, both = rng.choice((None, 10**6)), rng.random() < 0.6
        wish = Wish(task=task.name, prefer=task.prefer, needs=needs, wrong=wrong, both=both)
        decision = decide(wish, self.tiers, snapshot)
        self._money(decision.holds, decision.route.tiers, snapshot)
        if rng.random() < 0.1:
            await self._named(call)
        try:
            decision.raise_refusal()
        except (PolicyDenied, BudgetExceeded, DeadlineMissed):
            self.seen.reached["refused"] += 1
            return
        self.seen.reached["queued"] += decision.route.queued
        await self._chain(call, decision.route)

    async def _chain(self, call: Call, route: Route) -> None:
        """As the loop does it."""
        grant = Grant(weigh=Weigh(workflow_id="run", route="route"), bar=route.bar)
        for number, name in enumerate(route.tiers):
            self._queue(name)
            before = self.asked_again
            try:
                answered = await self.answerer.answer(self.truth.tenant, call, name, grant)
            except GO_ON:
                continue
            except CountersignError:
                break
            if answered.unsure:
                self.seen.reached["doubted"] += 1
                continue
            self._answered(answered, number, before)
            return
        self.seen.reached["failed"] += 1
        with suppress(AllTiersFailed):
            raise AllTiersFailed(call.task)

    def _answered(self, answered: Answered, number: int, before: int) -> None:
        reached = self.seen.reached
        reached["cached" if answered.cached else "fallback" if number else "first"] += 1
        reached["repaired"] += self.asked_again > before
        if self.truth.note not in (text := self.shelf.texts[answered.text.digest]):
            self.seen.note(f"restored: {self.truth} got {text}")
        first = self.made_for.setdefault(answered.text.digest, self.truth)
        same = (first.tenant, first.data_class, first.region, first.structured)
        if same != (self.truth.tenant, self.truth.data_class, self.truth.region, self.truth.structured):
            self.seen.note(f"cache: {self.truth} got the answer of {first}")

    async def _named(self, call: Call) -> None:
        """A caller that names any tier it likes gets no further than the rules let it."""
        self.seen.reached["named by the caller"] += 1
        with suppress(CountersignError):
            answered = await self.answerer.answer(
                self.truth.tenant, call, self.random.choice(self.tiers).name
            )
            self._answered(answered, 0, self.asked_again)

    def _queue(self, name: str) -> None:
        tier = next(one for one in self.tiers if one.name == name)
        bound = self.truth.region
        if bound is not None and not infer_queue(name, tier.region).endswith(f"-{bound}"):
            self.seen.note(f"queue: {self.truth} was queued for {tier.region}")

    def _money(self, holds: int | None, chosen: tuple[str, ...], snapshot: Snapshot) -> None:
        for account in snapshot.accounts:
            if chosen and (holds is None or holds > account.left):
                self.seen.note(f"budget: {holds} was held of {account.left}")
            unpriced = [tier.name for tier in self.tiers if tier.currency is None and tier.name in chosen]
            if unpriced:
                self.seen.note(f"budget: {unpriced} have no price")

    def _request(self) -> tuple[Call, Truth, TaskSettings]:
        rng = self.random
        said = rng.choice(CLASSES)
        personal = rng.random() < 0.3
        note = rng.choice(tuple(PERSONAL) if personal else PLAIN)
        call = Call(
            task=rng.choice(("free", "held")),
            params={"note": note, "words": rng.choice((0, 1, 2, 40, 200))},
            data_class=said,
            region=rng.choice(REGIONS),
            pin=rng.choice((None,) * 9 + ("edge",)),
        )
        wanted = TaskSettings(
            within_milliseconds=rng.choice((None, 500)),
            may_queue=rng.random() < 0.5,
            redact=self.redacts,
        )
        truth = Truth(
            rng.choice(("acme", "other")),
            DataClass.PERSONAL if personal else said,
            call.region,
            call.task == "held",
            call.pin,
            note,
            said,
        )
        return call, truth, wanted

    def _snapshot(self) -> Snapshot:
        rng = self.random
        accounts = ()
        if rng.random() < 0.3:
            accounts = (Account(name="acme", currency="EUR", cap=rng.choice((0, 500, 10_000))),)
        tiers = {tier.name: self._telemetry(f"model of {tier.name}") for tier in self.tiers}
        return Snapshot(tiers=tiers, accounts=accounts)

    def _telemetry(self, model: str) -> Telemetry:
        rng = self.random
        measured = Measured(
            calls=30,
            amount=rng.choice((None, "0.1", "0.3")),
            currency="EUR",
            slow_milliseconds=rng.choice((None, 100, 900)),
            escalated_permille=rng.choice((None, 0, 900)),
        )
        right = rng.choice((0, 50)), rng.choice((60, 100))
        steps = tuple(Step(least=500 * n, right=one, count=100, seen=100) for n, one in enumerate(right))
        return Telemetry(
            model=model,
            odds=rng.choice((None, *(Odds(own=steps),) * 3)),
            measured=measured,
            suspended=rng.random() < 0.3,
            cached=rng.random() < 0.2,
            busy=rng.choice((None, 0, 5)),
            room=rng.choice((None, 4)),
        )

    def _tier(self, name: str) -> TierSettings:
        rng = self.random
        priced: dict[str, Any] = {}
        if rng.random() < 0.8:
            price = Decimal(rng.choice((0, 1, 10)))
            priced = {
                "price_per_million_input": price,
                "price_per_million_output": price,
                "currency": "EUR",
            }
        return TierSettings(
            name=name,
            kind="llama_cpp",
            url="http://127.0.0.1:1",
            region=rng.choice(REGIONS),
            data_classes=tuple(one for one in CLASSES if rng.random() < LIKELY[one]),
            context_tokens=rng.choice((128, 256, 4096)),
            structured=rng.random() < 0.7,
            **priced,
        )


def hammer(examples: int, seed: int) -> Violations:
    """Run so many examples, all of them following from the seed."""
    seen = Violations()
    asyncio.run(_hammer(examples, random.Random(seed), seen))
    return seen


async def _hammer(examples: int, rng: random.Random, seen: Violations) -> None:
    world = World(rng, seen)
    while seen.examples < examples:
        if seen.examples % PER_WORLD == 0:
            world = World(rng, seen)
        await world.example()
        seen.examples += 1


def main(argv: list[str] | None = None) -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench constraints", description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(argv)
    began = time.perf_counter()
    seen = hammer(given.examples, given.seed)
    report = {
        "examples": seen.examples,
        "seed": given.seed,
        "seconds": round(time.perf_counter() - began, 1),
        "reached": dict(seen.reached),
        "violations": list(seen.found),
    }
    print(json.dumps(report, indent=2))
    return 1 if seen.found else 0


if __name__ == "__main__":
    sys.exit(main())
