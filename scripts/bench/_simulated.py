"""A world in which it is known how good, dear and slow two tiers are, and so what the best policy is.

A call has a hidden difficulty. The small tier answers it with a chance that falls with it, and sounds more or
less sure; the large one costs more. From the known chances follow the exact cost of every policy and of the
best one: after each confidence the small tier may show, the cheaper of taking its answer and asking on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from activities.services.calibration import Told, judged_of, newest
from activities.services.routes import telemetry_of, wish_of
from models.calibration import Fit, Odds, confidence, fits_of, odds_of
from models.cascade import unsure
from models.gate import Kind
from models.inference import Bar, Needs, Route, TokenChance
from models.ledger import EventType
from models.loop import Status
from models.routing import Snapshot, decide
from models.settings import TaskSettings, TierSettings

TASK = "simulated"
SMALL, LARGE = "small", "large"
PROMPT, ANSWER = 400, 100
"""Tokens of each call."""
LEVELS = 16
"""Confidences that the small tier shows."""
SEEN = 200
"""Calls that measurements rest on, as in a worker."""


class Row(NamedTuple):
    """One try, as `model_call` has it."""

    tier: str
    model: str
    milliseconds: int
    usable: bool
    prompt_tokens: int = PROMPT
    completion_tokens: int = ANSWER


class Asked(NamedTuple):
    """One call to its end."""

    micros: int
    milliseconds: int
    right: bool


@dataclass(frozen=True, slots=True)
class Case:
    """One call: what each tier would make of it."""

    usable: bool
    confidence: int
    small: bool
    large: bool
    small_ms: int
    large_ms: int


class World:
    """Two tiers; everything follows from the seed."""

    def __init__(self, seed: int) -> None:
        """Draw what is known."""
        rng = self.rng = random.Random(seed)
        shares = [rng.uniform(0.1, 1) for _ in range(5)]
        self.shares = [share / sum(shares) for share in shares]
        best, worst = rng.uniform(0.85, 0.99), rng.uniform(0.05, 0.6)
        self.small = [best + (worst - best) * place / 4 for place in range(5)]
        easy, falls = rng.uniform(0.9, 0.99), rng.uniform(0, 0.06)
        self.large = [easy - falls * place for place in range(5)]
        self.blur = rng.uniform(1.0, 4.0)
        self.unusable = rng.choice((0.0, 0.0, 0.02, 0.08))
        self.price = rng.choice((3, 5, 10, 20))
        """How many times the small tier's price the large one takes."""
        self.wrong = self.micros(LARGE) * rng.randint(2, 20)
        self.speed = rng.randint(100, 400), rng.randint(600, 2000)

    # What is known exactly.

    def micros(self, tier: str) -> int:
        """Millionths that a call takes."""
        return (PROMPT + 4 * ANSWER) * (self.price if tier == LARGE else 1)

    def joint(self) -> list[tuple[float, float, float]]:
        """Per confidence the small tier may show: its chance, and that small or large is right with it."""
        made = [[0.0, 0.0, 0.0] for _ in range(LEVELS)]
        for share, small, large in zip(self.shares, self.small, self.large, strict=True):
            for right, chance in ((True, small), (False, 1 - small)):
                for level, one in enumerate(self.levels(small, right)):
                    made[level][0] += share * chance * one
                    made[level][1] += share * chance * one * right
                    made[level][2] += share * chance * one * large
        return [(whole, small, large) for whole, small, large in made]

    def levels(self, small: float, right: bool) -> list[float]:
        """The chances of the confidences, for one difficulty."""
        centre = LEVELS * (0.25 + 0.5 * small) + (1.5 if right else -1.5)
        weights = [math.exp(-(((level - centre) / self.blur) ** 2) / 2) for level in range(LEVELS)]
        return [weight / sum(weights) for weight in weights]

    def cost(self, route: Route) -> float:
        """The exact expected cost of a call under a route: its tiers, and the price of a wrong answer."""
        if route.tiers[0] == LARGE:
            return self.begun_large()
        return self.begun_small([not doubts(route.bar, said) for said in said_at_levels()])

    def begun_large(self) -> float:
        """The cost of asking the large tier only."""
        right = sum(large for _, _, large in self.joint())
        return self.micros(LARGE) + self.wrong * (1 - right)

    def begun_small(self, taken: Sequence[bool]) -> float:
        """The cost of asking the small tier first and taking its usable answers at these confidences."""
        return self._begun([one for one, _ in self._choices()], [two for _, two in self._choices()], taken)

    def best(self) -> float:
        """The least that any policy costs that sees what ours sees."""
        return min(self.begun_large(), self.begun_small([take <= on for take, on in self._choices()]))

    def _choices(self) -> list[tuple[float, float]]:
        """Per confidence: what it costs to take the answer, and to ask on."""
        return [
            (self.wrong * (whole - small), self.micros(LARGE) * whole + self.wrong * (whole - large))
            for whole, small, large in self.joint()
        ]

    def _begun(self, take: Sequence[float], on: Sequence[float], taken: Sequence[bool]) -> float:
        usable = sum(a if kept else b for a, b, kept in zip(take, on, taken, strict=True))
        lost = self.unusable * self.begun_large()
        return self.micros(SMALL) + lost + (1 - self.unusable) * usable

    # What a worker sees.

    def tiers(self) -> tuple[TierSettings, TierSettings]:
        """The settings of both."""
        return _tier(SMALL, 1), _tier(LARGE, self.price)

    def case(self) -> Case:
        """The next call."""
        rng = self.rng
        (place,) = rng.choices(range(5), self.shares)
        small, large = rng.random() < self.small[place], rng.random() < self.large[place]
        (level,) = rng.choices(range(LEVELS), self.levels(self.small[place], small))
        return Case(
            usable=rng.random() >= self.unusable,
            confidence=said_at_levels()[level],
            small=small,
            large=large,
            small_ms=round(self.speed[0] * rng.lognormvariate(0, 0.3)),
            large_ms=round(self.speed[1] * rng.lognormvariate(0, 0.3)),
        )


class Learner:
    """Routes calls as a worker does, and learns from verdicts as `countersign tiers calibrate` does."""

    def __init__(self, world: World, learn_permille: int = 100) -> None:
        """Nothing is known yet."""
        self.world = world
        self.tiers = world.tiers()
        self.fits: tuple[Fit, ...] = ()
        self.spent = 0.0
        self._learn = learn_permille
        self._rows: list[Row] = []
        self._told: list[Told] = []
        self._odds: Mapping[str, Odds] = {}

    def route(self, draw: int = 1000) -> Route:
        """The route of a call right now; a low draw is one that learns."""
        needs = Needs(context_tokens=PROMPT + ANSWER, answer_tokens=ANSWER)
        wanted = TaskSettings(wrong_costs=Decimal(self.world.wrong) / 1_000_000, learn_permille=self._learn)
        return decide(wish_of(TASK, "small", needs, wanted, draw), self.tiers, self._snapshot()).route

    def learn(self, calls: int) -> None:
        """Answer so many calls, hear what people say of each, and fit again."""
        # Nothing is learnt in between, so that one decision stands for all of its kind.
        routes = self.route(0), self.route(1), self.route()
        for _ in range(calls):
            draw = self.world.rng.randrange(1000)
            self._answer(routes[draw % 2 if draw < self._learn else 2])
        self.refit()

    def refit(self, measured: bool = False) -> None:
        """Fit again from everything that was told."""
        self.fits = fits_of(newest(judged_of(self._told)), measured)
        self._odds = odds_of(self.fits)

    def _answer(self, route: Route) -> None:
        case, run = self.world.case(), str(len(self._told))
        asked, answers = walked(self.world, route, case)
        self.spent += asked.micros + self.world.wrong * (not asked.right)
        for tier, usable, doubted in answers:
            took = case.small_ms if tier == SMALL else case.large_ms
            self._rows.append(Row(tier, _model(tier), took, usable))
            if usable:
                self._told.append((EventType.ANSWER, run, _body(run, tier, case, doubted)))
        kind = Kind.APPROVE if asked.right else Kind.REJECT
        self._told.append((EventType.VERDICT, run, {"kind": kind}))
        self._told.append((EventType.OUTCOME, run, {"status": Status.EXECUTED}))

    def _snapshot(self) -> Snapshot:
        """What `Measurements` and `Probes` say: a model that nobody asked lately is known all the same."""
        rows = self._rows[-SEEN:][::-1]
        known = {
            tier.name: telemetry_of(tier, [row for row in rows if row.tier == tier.name])
            for tier in self.tiers
        }
        return Snapshot(
            tiers={
                name: one.model_copy(update={"model": _model(name), "odds": self._odds.get(_model(name))})
                for name, one in known.items()
            }
        )


def walked(world: World, route: Route, case: Case) -> tuple[Asked, list[tuple[str, bool, bool]]]:
    """Lead a call through its route as the loop does: what it took, and who answered how."""
    micros = milliseconds = 0
    answers: list[tuple[str, bool, bool]] = []
    for tier in route.tiers:
        micros += world.micros(tier)
        milliseconds += case.small_ms if tier == SMALL else case.large_ms
        usable = tier == LARGE or case.usable
        doubted = usable and tier == SMALL and doubts(route.bar, case.confidence)
        answers.append((tier, usable, doubted))
        if usable and not doubted:
            return Asked(micros, milliseconds, case.small if tier == SMALL else case.large), answers
    raise AssertionError("the large tier always answers")


def doubts(bar: Bar | None, said: int) -> bool:
    """Whether the small tier's answer is passed on."""
    return unsure(bar, SMALL, _model(SMALL), said)


def said_at_levels() -> list[int]:
    """Each level as the confidence that our rule reads out of the tokens."""
    return list(_SAID)


def _said(level: int) -> int:
    margin = 0.1 + 4.0 * level / LEVELS
    return confidence([TokenChance(token="x", logprob=-0.1, margin=margin)], structured=False) or 0


_SAID = tuple(_said(level) for level in range(LEVELS))


def _model(tier: str) -> str:
    return f"{tier}-1"


def _tier(name: str, price: int) -> TierSettings:
    return TierSettings(
        name=name,
        kind="llama_cpp",
        url="http://127.0.0.1:1",
        price_per_million_input=Decimal(price),
        price_per_million_output=Decimal(4 * price),
        currency="EUR",
    )


def _body(run: str, tier: str, case: Case, doubted: bool) -> Mapping[str, object]:
    said = case.confidence if tier == SMALL else None
    common = {"route": run, "task": TASK, "tier": tier, "model": _model(tier), "problems": 0}
    return common | {"confidence": said, "unsure": doubted}
