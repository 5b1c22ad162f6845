"""Always small, always large, or routed: `python -m scripts.bench tiers`.

On simulated tiers the chances of success, costs and times are known, and so is the best policy. The objective
is the expected cost of a call: what its tiers take, plus `wrong_costs` times the chance that its answer is
wrong. Policy, cascade and calibration are the product's own; only tiers and verdicts are played. Then the
repository's own briefs on the bundled model, with the tasks' own checks: one real model cannot show what a
cascade is worth, and the report says so. Prints what it found, or one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from activities.services.router import Answerer
from activities.tiers.kinds import chat_endpoint
from activities.tiers.wire import http_client
from models.article import section_count
from models.canonical import sha256
from models.content import parse_brief
from models.drafting import METADATA, OUTLINE, SECTION
from models.errors import CountersignError
from models.inference import Answered, Call, Grant, Param, Route, Weigh
from models.loop import Ref
from models.settings import Settings, TierSettings
from scripts.bench._simulated import LARGE, LEVELS, SMALL, Asked, Case, Learner, World, walked
from scripts.bench.router import bundled_model
from workers import registry

BRIEFS = Path(__file__).parents[2] / "examples" / "briefs"
ROUND = 500
"""Calls between two fits."""
CASES = 500
"""Calls on which each policy is tried after learning."""
CLOSE = 0.02
RESAMPLES = 1000
REAL_SECONDS = 90
Policies = dict[str, list[Asked]]


@dataclass(frozen=True, slots=True)
class Played:
    """One seed: how far each policy is from the best, and what it took on the same calls."""

    seed: int
    curve: list[float]
    """By how much what was learnt costs more than the best, after each round."""
    small: float
    large: float
    learning: float
    """How much more than the best the calls cost that were learnt from."""
    error: tuple[int, int]
    """Expected calibration error before and after, in thousandths."""
    took: Policies

    @property
    def regret(self) -> float:
        """By how much the policy that was learnt costs more than the best."""
        return self.curve[-1]


def played(seed: int, calls: int, cases: int = CASES) -> Played:
    """Learn from so many judged calls, then hold the policies against each other."""
    world = World(seed)
    learner = Learner(world)
    best, curve = world.best(), list[float]()
    for _ in range(max(1, calls // ROUND)):
        learner.learn(min(calls, ROUND))
        curve.append(world.cost(learner.route()) / best - 1)
    learner.refit(measured=True)
    fit = next(fit for fit in learner.fits if fit.model.startswith(SMALL) and fit.after is None)
    drawn = [world.case() for _ in range(cases)]
    routes = {"always small": _fixed(SMALL, LARGE), "always large": _fixed(LARGE), "routed": learner.route()}
    return Played(
        seed=seed,
        curve=curve,
        small=world.begun_small([True] * LEVELS) / best - 1,
        large=world.begun_large() / best - 1,
        learning=learner.spent / (len(curve) * min(calls, ROUND)) / best - 1,
        error=(
            fit.before.permille if fit.before else 0,
            fit.held_out.permille if fit.held_out else 0,
        ),
        took={name: _took(world, route, drawn) for name, route in routes.items()},
    )


def simulated(seeds: Iterable[int], calls: int) -> dict[str, Any]:
    """All seeds, and what they say together."""
    seen = [played(seed, calls) for seed in seeds]
    missed = [one for one in seen if one.regret > CLOSE]
    rounds = range(len(seen[0].curve))
    return {
        "objective": "cost of the tiers asked + wrong_costs x chance of a wrong answer, per call",
        "seeds": len(seen),
        "judged_calls_per_seed": calls,
        "recovered_within_2_percent": len(seen) - len(missed),
        "missed": {one.seed: _percent(one.regret) for one in missed},
        "missed_after_calls": {
            ROUND * (number + 1): sum(one.curve[number] > CLOSE for one in seen) for number in rounds
        },
        "above_the_best_percent": {
            "routed": over([one.regret * 100 for one in seen]),
            "always small": over([one.small * 100 for one in seen]),
            "always large": over([one.large * 100 for one in seen]),
            "while learning": over([one.learning * 100 for one in seen]),
        },
        "calibration_error_percent": {
            "before": over([one.error[0] / 10 for one in seen]),
            "after, held out": over([one.error[1] / 10 for one in seen]),
        },
        "policies": {name: _policy(seen, name) for name in seen[0].took},
    }


def over(values: Sequence[float], center: Callable[[Sequence[float]], float] = fmean) -> dict[str, float]:
    """The mean with its 95 % interval, from resamples with a fixed seed."""
    rng = random.Random(1)
    means = sorted(center(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = RESAMPLES // 40
    return {
        "mean": round(center(values), 2),
        "low": round(means[tail], 2),
        "high": round(means[-1 - tail], 2),
    }


def wilson(hits: int, tries: int) -> dict[str, float]:
    """A share in percent with its 95 % interval."""
    z = 1.96
    share, extra = hits / tries, z * z / tries
    middle = (share + extra / 2) / (1 + extra)
    half = z * sqrt(share * (1 - share) / tries + extra / (4 * tries)) / (1 + extra)
    return {
        "percent": _percent(share),
        "low": _percent(max(0.0, middle - half)),
        "high": _percent(min(1.0, middle + half)),
    }


class Shelf:
    """Texts by name, for as long as the benchmark runs."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._texts: dict[str, bytes] = {}

    async def text(self, tenant: str, ref: Ref) -> str:
        """The text behind a reference."""
        return self._texts[ref.digest].decode()

    async def put(
        self, tenant: str, data: bytes, media_type: str = "text/plain", subject: str | None = None
    ) -> Ref:
        """Keep it."""
        digest = sha256(data)
        self._texts[digest] = data
        return Ref(digest=digest, size=len(data), media_type=media_type)


@dataclass(frozen=True, slots=True)
class Try:
    """One task on the real model."""

    task: str
    answered: Answered | None
    milliseconds: float


async def real(seconds: float = REAL_SECONDS) -> dict[str, Any]:
    """The briefs of the repository on the bundled model, as far as the time goes."""
    with tempfile.TemporaryDirectory() as folder, bundled_model(Path(folder)) as url:
        tier = TierSettings(name="edge", kind="llama_cpp", url=url, context_tokens=1024)
        async with http_client(tier) as client:
            shelf = Shelf()
            answerer = Answerer(
                [tier], {"edge": chat_endpoint(tier, client)}, registry.tasks(Settings()), shelf
            )
            tries = await _tried(answerer, shelf, time.monotonic() + seconds)
    return _reported(tries)


async def _tried(answerer: Answerer, shelf: Shelf, until: float) -> list[Try]:
    tries: list[Try] = []
    for path in sorted(BRIEFS.glob("*.md")):
        data = path.read_bytes()
        inputs = {"brief": await shelf.put("bench", data)}
        outline = await _asked(answerer, OUTLINE, inputs)
        tries.append(outline)
        planned = inputs if outline.answered is None else inputs | {"outline": outline.answered.text}
        for number in range(section_count(parse_brief(data))):
            if time.monotonic() < until and outline.answered is not None:
                tries.append(await _asked(answerer, SECTION, planned, section=number))
        if time.monotonic() >= until:
            break
        tries.append(await _asked(answerer, METADATA, inputs))
    return tries


async def _asked(answerer: Answerer, task: str, inputs: dict[str, Ref], **params: Param) -> Try:
    began = time.perf_counter()
    answered: Answered | None = None
    grant = Grant(weigh=Weigh(workflow_id="bench", route=task))
    try:
        answered = await answerer.answer(
            "bench", Call(task=task, inputs=inputs, params=params), "edge", grant
        )
    except CountersignError as error:
        print(f"{task}: {error}", file=sys.stderr)
    return Try(task, answered, (time.perf_counter() - began) * 1000)


def _reported(tries: Sequence[Try]) -> dict[str, Any]:
    answered = [one.answered for one in tries if one.answered is not None]
    passed = sum(not one.problems for one in answered)
    sure = [one.confidence for one in answered if one.confidence is not None]
    return {
        "model": answered[0].model if answered else None,
        "tasks": len(tries),
        "always small": {
            "usable": wilson(len(answered), len(tries)),
            "passed all checks": wilson(passed, len(tries)),
            "cost": "unknown: the bundled model has no price",
            "milliseconds": over([one.milliseconds for one in tries]),
        },
        "gave a confidence": len(sure),
        "always large": "not measurable here: there is one real model",
        "routed": "not measurable here: there is one real model",
    }


def _fixed(*tiers: str) -> Route:
    return Route(purpose="bench", tiers=tiers, candidates=())


def _took(world: World, route: Route, drawn: Sequence[Case]) -> list[Asked]:
    return [walked(world, route, case)[0] for case in drawn]


def _policy(seen: Sequence[Played], name: str) -> dict[str, Any]:
    def mean(one: Played, of: Callable[[Asked], float], policy: str = name) -> float:
        return fmean(of(asked) for asked in one.took[policy])

    costs = [mean(one, _micros) / mean(one, _micros, "always large") * 100 for one in seen]
    return {
        "cost, percent of always large": over(costs),
        "success percent": over([mean(one, _right) * 100 for one in seen]),
        "milliseconds": over([mean(one, _milliseconds) for one in seen]),
    }


def _micros(asked: Asked) -> float:
    return asked.micros


def _right(asked: Asked) -> float:
    return asked.right


def _milliseconds(asked: Asked) -> float:
    return asked.milliseconds


def _percent(share: float) -> float:
    return round(share * 100, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report; fails if for one seed the policy costs 2 % more than the best."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench tiers", description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--calls", type=int, default=4000, help="judged calls per seed")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--real", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args(argv)
    report: dict[str, Any] = {"simulated": simulated(range(given.seeds), given.calls)}
    report["real"] = asyncio.run(real()) if given.real else "left out"
    print(json.dumps(report, indent=2) if given.json else "\n".join(_lines(report)))
    return 1 if report["simulated"]["missed"] else 0


def _lines(report: Any, indent: int = 0) -> list[str]:
    """The report for people."""
    lines: list[str] = []
    for name, value in report.items():
        head = f"{'  ' * indent}{str(name).replace('_', ' ')}:"
        if isinstance(value, dict) and "low" in value:
            center = value.get("mean", value.get("percent"))
            lines.append(f"{head} {center} ({value['low']} to {value['high']})")
        elif isinstance(value, dict) and value:
            lines += [head, *_lines(value, indent + 1)]
        else:
            lines.append(f"{head} {'none' if value == {} else value}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
