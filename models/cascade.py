"""Whether to start small, and which answers are passed on to the next tier. Pure, so that it can be replayed.

What is minimised is the expected cost of a call: what its tiers take, and what a wrong answer costs times the
chance of one. Without that cost, or without a calibration to rely on, only unusable answers are passed on.
Money is in millionths, chances in thousandths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate, pairwise

from models.calibration import WHOLE, Odds, Step, Steps, chance, share
from models.inference import Bar

Rank = tuple[bool, Decimal]
"""Whether there would be no time left for the next tier, and the expected cost."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One tier as the cascade sees it."""

    tier: str
    micros: Decimal
    """What a call is expected to take."""
    model: str | None = None
    odds: Odds | None = None
    unusable: int = 0
    """How many of a thousand answers cannot be used whatever their confidence."""
    milliseconds: int | None = None
    silent: bool = False
    """Its server was seen to give no confidence, so that none of its answers can be doubted."""

    @property
    def own(self) -> Steps:
        """How often it is right, by its confidence; nothing if that is not known."""
        known = self.odds.own if self.odds is not None else ()
        return _one(known) if self.silent else known

    def after(self, low: Rung) -> Steps:
        """How often it is right with what another was asked first, by the confidence of that one."""
        known = self.odds.after.get(low.model or "", ()) if self.odds is not None else ()
        return _one(known) if low.silent else known


@dataclass(frozen=True, slots=True)
class Terms:
    """What a call is held to."""

    wrong: int | None = None
    """What a wrong answer costs; unknown is not nothing, so without it no answer is doubted."""
    within: int | None = None
    """Milliseconds that somebody waits."""
    both: bool = False
    """Every answer is doubted, so that it becomes known what the next tier makes of such calls."""


def is_calibrated(rungs: Sequence[Rung], terms: Terms) -> bool:
    """Whether it is known what the answers are worth, so that a preference has figures to give way to."""
    if terms.wrong is None or len(rungs) < 2:
        return False
    return all(low.own and (high.own or high.after(low)) for low, high in pairwise(rungs))


def ranks(rungs: Sequence[Rung], terms: Terms) -> dict[str, Rank]:
    """The expected cost of starting at each rung, cheapest class first; each may be followed by the next.

    Starting low is worth it if its chance of escalation is below `1 - c_low / c_high`; once it is known how
    many answers are wrong, what those cost is added on both sides, and the next tier must be in time.
    """
    if terms.wrong is None or not is_calibrated(rungs, terms):
        return _by_unusable(rungs)
    made = {low.tier: _started(low, high, terms) for low, high in pairwise(rungs)}
    low, top = rungs[-2:]
    return made | {top.tier: (False, _alone(low, top, terms.wrong) / WHOLE)}


def bar_of(low: Rung, high: Rung, terms: Terms) -> Bar | None:
    """Below which confidence an answer is passed on to the next tier; `None` takes every usable one."""
    if low.model is None or low.silent or _is_late(low, high, terms):
        return None
    if terms.both:
        return Bar(tier=low.tier, model=low.model, confidence=WHOLE + 1)
    if terms.wrong is None or not is_calibrated((low, high), terms):
        return None
    cut, _ = _cut(low, high, terms.wrong)
    return Bar(tier=low.tier, model=low.model, confidence=low.own[cut].least) if cut else None


def unsure(bar: Bar | None, tier: str, model: str, confidence: int | None) -> bool:
    """Whether an answer is to be passed on; one without a confidence is not, nor one of another model."""
    if bar is None or confidence is None or (bar.tier, bar.model) != (tier, model):
        return False
    return confidence < bar.confidence


def _one(steps: Steps) -> Steps:
    """All steps in one, for answers whose confidence nobody hears."""
    if not steps:
        return ()
    right, count, seen = (sum(getattr(one, name) for one in steps) for name in ("right", "count", "seen"))
    return (Step(least=0, right=right, count=count, seen=seen, expected=share(steps)),)


def _by_unusable(rungs: Sequence[Rung]) -> dict[str, Rank]:
    made = {rung.tier: rung.micros for rung in rungs}
    for low, high in pairwise(rungs):
        made[low.tier] += high.micros * low.unusable / WHOLE
    return {tier: (False, total) for tier, total in made.items()}


def _started(low: Rung, high: Rung, terms: Terms) -> Rank:
    """The cost of starting low, with the best bar."""
    wrong = terms.wrong or 0
    cut, saved = _cut(low, high, wrong)
    kept = sum(step.seen * wrong * (WHOLE - step.permille) for step in low.own)
    usable = (kept - saved) / sum(step.seen for step in low.own)
    lost = low.unusable * _alone(low, high, wrong)
    total = low.micros * WHOLE + (lost + (WHOLE - low.unusable) * usable) / WHOLE
    # Who may have to ask the next tier and has no time for it had better start there.
    return (cut > 0 or low.unusable > 0) and _is_late(low, high, terms), total / WHOLE


def _cut(low: Rung, high: Rung, wrong: int) -> tuple[int, Decimal]:
    """How many steps of the lower tier are passed on, and what that saves over all that were seen.

    Never all of them: then it would be better not to ask.
    """
    saved = [
        step.seen * (wrong * (better - step.permille) - high.micros * WHOLE)
        for step, better in zip(low.own, _betters(low, high), strict=True)
    ]
    sums = list(accumulate(saved[:-1], initial=Decimal(0)))
    return sums.index(max(sums)), max(sums)


def _alone(low: Rung, high: Rung, wrong: int) -> Decimal:
    """The cost of the higher tier with nobody asked before it, in thousandths of millionths.

    From the same figures as the cost of asking it second, so that what is uncertain in them does not decide
    between the two.
    """
    right = sum(step.seen * one for step, one in zip(low.own, _betters(low, high), strict=True))
    share_right = Decimal(right) / sum(step.seen for step in low.own)
    return high.micros * WHOLE + wrong * (WHOLE - share_right * (WHOLE - high.unusable) / WHOLE)


def _betters(low: Rung, high: Rung) -> list[int]:
    """How well the higher tier does with what the lower was so sure of; else how well it does at all."""
    if after := high.after(low):
        return [chance(after, step.least) for step in low.own]
    return [share(high.own)] * len(low.own)


def _is_late(low: Rung, high: Rung, terms: Terms) -> bool:
    if terms.within is None or low.milliseconds is None or high.milliseconds is None:
        return False
    return low.milliseconds + high.milliseconds > terms.within
