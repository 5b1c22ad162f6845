"""How sure a model sounds, and how often it was right when it sounded so. Pure.

A confidence is worth nothing by itself: it is mapped to the share of answers that were right, by isotonic
regression, per task and model identity, from verdicts of people and checks of code. With too few judged
answers there is no map, and nobody guesses one.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from pydantic import Field

from models.inference import TokenChance
from models.loop import Frozen, Name

WHOLE = 1000
ENOUGH = 50
"""Fewer judged answers are no calibration."""
STEP = 10
"""Judged answers that one step of a fit rests on at least."""
BINS = 10
RESAMPLES = 200
SEED = 7

_VALUE = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?|-?\d[\d.eE+-]*|true|false|null')

Pair = tuple[int, bool]
"""A confidence in thousandths, and whether the answer was right."""


class Step(Frozen):
    """Answers of neighbouring confidence: how many there were and how many of them were right."""

    least: int = Field(ge=0, le=WHOLE)
    """The lowest confidence among them, in thousandths."""
    right: int = Field(ge=0)
    count: int = Field(ge=1)
    seen: int = Field(ge=1)
    """How many answers sounded like that, judged or not. Whether one is judged depends on its confidence, so
    that the judged ones alone do not say how often a confidence comes."""

    @property
    def permille(self) -> int:
        """The share that was right."""
        return self.right * WHOLE // self.count


Steps = tuple[Step, ...]
"""Lowest confidence first; shares only rise."""


class Spread(Frozen):
    """A value in thousandths with its 95 % interval."""

    permille: int
    low: int
    high: int


class Fit(Frozen):
    """What the judged answers of one model to one task amount to."""

    task: Name
    model: str
    after: str | None = None
    """Another model that answered the same call first, and whose confidence the steps go by: how well this
    one does with what that one was not sure of."""
    steps: Steps
    count: int
    people: int = 0
    """How many of them people judged; the others, checks of code."""
    blind: int = 0
    """How many came without a confidence; they count for the share that was right and for no step."""
    before: Spread | None = None
    """Expected calibration error of the confidence as it comes."""
    held_out: Spread | None = None
    """The same after the fit, on answers it has not seen."""

    @property
    def trusted(self) -> bool:
        """Whether a choice may rest on it."""
        return self.count >= ENOUGH


class Odds(Frozen):
    """What a choice needs of the fits of one model."""

    own: Steps = ()
    after: dict[str, Steps] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer, and what people or code said of it."""

    task: str
    model: str
    confidence: int | None
    right: bool | None
    """`None` if nobody said."""
    by_people: bool = False
    after: str | None = None
    """The model that answered first and was not sure enough."""


def confidence(chances: Sequence[TokenChance], structured: bool) -> int | None:
    """How sure the model sounded of the values it wrote, in thousandths; `None` if it did not say.

    The mean lead over the second likeliest token if each token has one, else the mean chance; of JSON only
    the values count, because its marks and keys are given.
    """
    counted = [
        chance for chance, counts in zip(chances, _counted(chances, structured), strict=True) if counts
    ]
    if not counted:
        return None
    margins = [one.margin for one in counted if one.margin is not None]
    if len(margins) == len(counted):
        return _permille(1 - math.exp(-_mean(margins)))
    return _permille(math.exp(_mean([min(0.0, one.logprob) for one in counted])))


def pooled(pairs: Iterable[Pair], least: int = 1) -> Steps:
    """Isotonic regression by pooling adjacent violators; each step holds at least `least` answers."""
    made: list[Step] = []
    for step in _grouped(sorted(pairs), least):
        made.append(step)
        while len(made) > 1 and made[-2].right * made[-1].count >= made[-1].right * made[-2].count:
            made[-2:] = [_joined(made[-2], made[-1])]
    return tuple(made)


def chance(steps: Steps, confidence: int) -> int:
    """The share that was right at this confidence, in thousandths."""
    found = steps[0]
    for step in steps:
        if step.least > confidence:
            break
        found = step
    return found.permille


def share(steps: Steps) -> int:
    """The share that is right over all that was seen, in thousandths."""
    return sum(step.permille * step.seen for step in steps) // sum(step.seen for step in steps)


def spread(pairs: Sequence[Pair]) -> Spread | None:
    """The expected calibration error with its interval, from resamples with a fixed seed.

    That is how far confidence and success lie apart, over ten bins, in thousandths.
    """
    if not pairs:
        return None
    rng, apart = random.Random(SEED), [_apart(pair) for pair in pairs]
    seen = sorted(_error(rng.choices(apart, k=len(apart))) for _ in range(RESAMPLES))
    tail = RESAMPLES // 40
    return Spread(permille=_error(apart), low=seen[tail], high=seen[-1 - tail])


def fits_of(judged: Iterable[Judged], measured: bool = True) -> tuple[Fit, ...]:
    """A fit per task and model, and one per model that was asked after another.

    Measuring the error of each takes longer than fitting it.
    """
    kinds: dict[tuple[str, str, str], list[Judged]] = defaultdict(list)
    for one in judged:
        kinds[one.task, one.model, one.after or ""].append(one)
    fits = (_fit(*key, kinds[key], measured) for key in sorted(kinds))
    return tuple(fit for fit in fits if fit is not None)


def odds_of(fits: Iterable[Fit]) -> dict[str, Odds]:
    """What may be relied on, by model."""
    own: dict[str, Steps] = {}
    after: dict[str, dict[str, Steps]] = defaultdict(dict)
    for fit in fits:
        if fit.trusted and fit.after is None:
            own[fit.model] = fit.steps
        elif fit.trusted and fit.after is not None:
            after[fit.model][fit.after] = fit.steps
    return {model: Odds(own=own.get(model, ()), after=after[model]) for model in {*own, *after}}


def _apart(pair: Pair) -> tuple[int, int]:
    """The bin of an answer, and how far its confidence lies above what became of it."""
    said, right = pair
    return min(BINS - 1, said * BINS // WHOLE), said - WHOLE * right


def _error(apart: Sequence[tuple[int, int]]) -> int:
    bins = [0] * BINS
    for number, distance in apart:
        bins[number] += distance
    return sum(map(abs, bins)) // max(1, len(apart))


def _fit(task: str, model: str, after: str, answers: Sequence[Judged], measured: bool) -> Fit | None:
    judged = [(one.confidence, one.right) for one in answers if one.right is not None]
    pairs = [(said, right) for said, right in judged if said is not None]
    if not judged:
        return None
    # With too few confidences there is one step: what code and people say of all of them.
    sure = bool(pairs) and len(pairs) >= min(len(judged), ENOUGH)
    steps = pooled(pairs, STEP) if sure else pooled((0, right) for _, right in judged)
    shown = pairs if sure and measured and not after else []
    return Fit(
        task=task,
        model=model,
        after=after or None,
        steps=_seen(
            steps, [one.confidence or 0 for one in answers if one.confidence is not None or not sure]
        ),
        count=len(judged),
        people=sum(one.by_people for one in answers),
        blind=len(judged) - len(pairs),
        before=spread(shown),
        held_out=spread(_held_out(shown)),
    )


def _seen(steps: Steps, said: Iterable[int]) -> Steps:
    """The steps with how many answers fall on each; one below all of them falls on the first."""
    places = [step.least for step in steps]
    seen = Counter(max(0, bisect_right(places, one) - 1) for one in said)
    return tuple(step.model_copy(update={"seen": seen[place]}) for place, step in enumerate(steps))


def _held_out(pairs: Sequence[Pair]) -> list[Pair]:
    """Each half of the answers as the fit of the other half sees it."""
    # Drawn, since what comes in turns would make every second one a kind of its own.
    drawn = random.Random(SEED).sample(pairs, len(pairs))
    halves = drawn[::2], drawn[1::2]
    if not all(halves):
        return []
    fitted = [pooled(half, STEP) for half in halves]
    return [
        (chance(steps, said), right)
        for steps, half in zip(reversed(fitted), halves, strict=True)
        for said, right in half
    ]


def _grouped(pairs: Sequence[Pair], least: int) -> list[Step]:
    steps: list[Step] = []
    for said, same in groupby(pairs, key=lambda pair: pair[0]):
        rights = [right for _, right in same]
        step = Step(least=said, right=sum(rights), count=len(rights), seen=len(rights))
        if steps and steps[-1].count < least:
            steps[-1] = _joined(steps[-1], step)
        else:
            steps.append(step)
    if len(steps) > 1 and steps[-1].count < least:
        steps[-2:] = [_joined(steps[-2], steps[-1])]
    return steps


def _joined(one: Step, other: Step) -> Step:
    right, count = one.right + other.right, one.count + other.count
    return Step(least=one.least, right=right, count=count, seen=count)


def _counted(chances: Sequence[TokenChance], structured: bool) -> list[bool]:
    if not structured:
        return [True] * len(chances)
    ends = list(accumulate(len(one.token) for one in chances))
    values = list(_values("".join(one.token for one in chances)))
    return [
        any(max(begun, start) < min(end, stop) for start, stop in values)
        for begun, end in zip([0, *ends], ends, strict=False)
    ]


def _values(text: str) -> Iterator[tuple[int, int]]:
    """Where the values of a JSON text stand; strings without their quotes, keys left out."""
    for found in _VALUE.finditer(text):
        if found[2] is None:
            yield found.span(1) if found[1] is not None else found.span()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _permille(value: float) -> int:
    return max(0, min(WHOLE, round(value * WHOLE)))
