"""How sure a model sounds, and how often it was right when it sounded so. Pure.

A confidence is worth nothing by itself: it is mapped to the share of answers that were right, by isotonic
regression, per task and model identity, from verdicts of people and checks of code. With too few judged
answers there is no map, and nobody guesses one.

What the next model makes of a call is mapped from the first one's confidence too, for what is hard for one is
harder for the other. Assumed is that whether a call was passed on depends on that confidence and on chance
(`learn_permille`), so that those passed on at one confidence speak for all at it; where few or none were, a
line in log-odds reaches across. Which calls began at the next model nobody chose by how hard they were; as
that is less sure (those which the first one could not take are among them), they weigh no more than those
that were passed on.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from pydantic import Field

from models.inference import TokenChance
from models.logit import Cell, line, log_odds
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
    count: int = Field(ge=0)
    """Without one there is an `expected`."""
    seen: int = Field(ge=1)
    """How many answers sounded like that, judged or not. Whether one is judged depends on its confidence, so
    that the judged ones alone do not say how often a confidence comes."""
    expected: int | None = Field(default=None, ge=0, le=WHOLE)
    """The share to expect, in thousandths, where that rests on more than the answers of this step."""

    @property
    def permille(self) -> int:
        """The share that was right, or is to be expected."""
        return self.right * WHOLE // self.count if self.expected is None else self.expected


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
    """Another model that answered the same call first, and whose steps these are: how well this one does
    with what that one was so sure of."""
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


class Calibrate(Frozen):
    """Fit everything again."""

    tenant: Name


class Reported(Frozen):
    """A fit without its steps, which the ledger has."""

    task: Name
    model: str
    after: str | None = None
    count: int
    trusted: bool
    before: Spread | None = None
    held_out: Spread | None = None

    @classmethod
    def of(cls, fit: Fit) -> Reported:
        """What is said of a fit."""
        named = ("task", "model", "after", "count", "trusted", "before", "held_out")
        return cls(**{name: getattr(fit, name) for name in named})


class Calibrated(Frozen):
    """What came of fitting again, each with its error."""

    fits: tuple[Reported, ...]


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
    found = ((key, _fit(*key, kinds[key], measured)) for key in sorted(kinds))
    fits = {key: fit for key, fit in found if fit is not None}
    return tuple(_after(fit, fits, kinds[key]) for key, fit in fits.items())


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


def _after(fit: Fit, fits: Mapping[tuple[str, str, str], Fit], answers: Iterable[Judged]) -> Fit:
    """With the chances of one asked second by the steps of the one asked first, where that has any."""
    low = fits.get((fit.task, fit.after or "", ""))
    if low is None:
        return fit
    alone = fits.get((fit.task, fit.model, ""))
    pairs = [
        (one.confidence, one.right) for one in answers if one.confidence is not None and one.right is not None
    ]
    return fit.model_copy(update={"steps": _conditional(low.steps, pairs, alone.steps if alone else ())})


def _conditional(low: Steps, pairs: Sequence[Pair], alone: Steps) -> Steps:
    """How often the second is right where the first is that likely to be, a line from one to the other."""
    told: list[list[bool]] = [[] for _ in low]
    starts = [step.least for step in low]
    for said, right in pairs:
        told[max(0, bisect_right(starts, said) - 1)].append(right)
    cells = [
        Cell(log_odds(step.right, step.count), step.seen, sum(rights), len(rights))
        for step, rights in zip(low, told, strict=True)
    ]
    count = sum(step.count for step in alone)
    weight = min(1.0, len(pairs) / count) if count else 0.0
    chances = line(cells, weight * sum(step.right for step in alone), weight * count)
    return tuple(
        Step(least=step.least, right=sum(rights), count=len(rights), seen=step.seen, expected=_permille(one))
        for step, rights, one in zip(low, told, chances, strict=True)
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
