"""A line in log-odds through counts, its slope held towards none. Pure.

It says how a chance depends on something when the answers are few: with none it is the same everywhere, and
each answer more lets it differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

LOOSE = 0.5
"""How far the slope may be from none before answers speak for it, as a standard deviation."""
MOST = 100
CLOSE = 1e-6
FARTHEST = 2.0
"""One step of Newton's method goes no farther."""
EDGE = 0.01


@dataclass(frozen=True, slots=True)
class Cell:
    """What is known of one place on the line."""

    at: float
    weight: float
    """How often calls come there."""
    right: float
    count: float


def log_odds(right: float, count: float) -> float:
    """Of a share that rests on so many answers; never without end."""
    share = min(1 - EDGE, max(EDGE, (right + 0.5) / (count + 1)))
    return math.log(share / (1 - share))


def line(cells: Sequence[Cell], right: float = 0, count: float = 0) -> list[float]:
    """The chance at each cell, which never falls from left to right.

    Besides the answers whose place is known, `count` may have no place, `right` of them right. They are taken
    to come as calls do, by `weight`, and are spread by what the line says, until it says the same again.
    """
    middle = sum(one.at * one.weight for one in cells) / sum(one.weight for one in cells)
    centred = [replace(one, at=one.at - middle) for one in cells]
    chances = _chances(centred, *_fitted(centred))
    for _ in range(MOST if count else 0):
        before = chances
        spread = _spread(centred, chances, right, count)
        chances = _chances(centred, *_fitted(spread))
        if max(abs(old - new) for old, new in zip(before, chances, strict=True)) < CLOSE:
            break
    return chances


def _spread(cells: Sequence[Cell], chances: Sequence[float], right: float, count: float) -> list[Cell]:
    """Each cell with its part of the answers that have no place."""
    good = [one.weight * chance for one, chance in zip(cells, chances, strict=True)]
    bad = [one.weight - part for one, part in zip(cells, good, strict=True)]
    made: list[Cell] = []
    for one, well, badly in zip(cells, good, bad, strict=True):
        more, less = right * well / sum(good), (count - right) * badly / sum(bad)
        made.append(replace(one, right=one.right + more, count=one.count + more + less))
    return made


def _fitted(cells: Sequence[Cell]) -> tuple[float, float]:
    """Level and slope of the likeliest line, by Newton's method."""
    # Half an answer each way keeps the level finite.
    known = [*cells, Cell(at=0, weight=0, right=0.5, count=1)]
    flat = _level(known)
    level, slope = flat, 0.0
    for _ in range(MOST):
        up, turn = _towards(known, level, slope)
        level, slope = level + up, slope + turn
        if abs(up) + abs(turn) < CLOSE:
            break
    return (level, slope) if slope > 0 else (flat, 0.0)


def _level(cells: Iterable[Cell]) -> float:
    rights, counts = zip(*((one.right, one.count) for one in cells), strict=True)
    share = sum(rights) / sum(counts)
    return math.log(share / (1 - share))


def _towards(cells: Iterable[Cell], level: float, slope: float) -> tuple[float, float]:
    hold = 1 / LOOSE**2
    up, turn, flat, mixed, steep = 0.0, -slope * hold, 0.0, 0.0, hold
    for one in cells:
        chance = _chance(level + slope * one.at)
        apart, bend = one.right - one.count * chance, one.count * chance * (1 - chance)
        up, turn = up + apart, turn + apart * one.at
        flat, mixed, steep = flat + bend, mixed + bend * one.at, steep + bend * one.at**2
    whole = flat * steep - mixed * mixed
    return _short((steep * up - mixed * turn) / whole), _short((flat * turn - mixed * up) / whole)


def _chances(cells: Iterable[Cell], level: float, slope: float) -> list[float]:
    return [_chance(level + slope * one.at) for one in cells]


def _chance(odds: float) -> float:
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, odds))))


def _short(step: float) -> float:
    return max(-FARTHEST, min(FARTHEST, step))
