"""A stream of questions whose right answers are known, put in ever other words: what a semantic cache meets.

Every topic has an answer and a place; its phrases lie about that place, some near, some far. Beside many a
topic lies a twin whose answer is another one: what embeddings take for the same and is not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.canonical import sha256
from models.similar import EDGES, NEAR, Near, Tally, candidate, edge_of, explores, given_from

ANSWERS = ("refund", "delivery", "invoice", "account", "complaint", "other")
GISTS = {answer: sha256(answer.encode()) for answer in ANSWERS}
DIMENSIONS = 24
KEPT = 512
"""Entries a cache looks at, the newest ones."""
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class World:
    """How hard it is."""

    topics: int = 60
    twins: float = 0.3
    """The share of topics beside which a twin lies."""
    apart: float = 0.45
    """How far a twin lies from its topic; 0.45 is a similarity of about 0.9."""
    spread: tuple[float, float] = (0.05, 0.6)
    """How far a phrase lies from its topic, at least and at most."""
    again: float = 0.25
    """The share of calls that repeat an earlier one to the letter."""
    fickle: float = 0.0
    """The share of answers that come out otherwise when the model is asked again."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One call."""

    text: str
    vector: Vector
    answer: str
    """The right one."""


def stream(world: World, seed: int, calls: int) -> Iterator[Asked]:
    """The calls of one seed; a topic is asked about the less, the later it comes."""
    rng = random.Random(seed)
    places = _places(world, rng)
    weights = [1 / (1 + number) for number in range(len(places))]
    told: list[Asked] = []
    for number in range(calls):
        if told and rng.random() < world.again:
            yield rng.choice(told)
            continue
        place, answer = rng.choices(places, weights)[0]
        if rng.random() < world.fickle:
            answer = rng.choice(ANSWERS)
        vector = _near(place, rng.uniform(*world.spread), rng)
        told.append(Asked(_phrase(number), vector, answer))
        yield told[-1]


def _places(world: World, rng: random.Random) -> list[tuple[Vector, str]]:
    places: list[tuple[Vector, str]] = []
    while len(places) < world.topics:
        place, answer = _near(np.zeros(DIMENSIONS, np.float32), 1.0, rng), rng.choice(ANSWERS)
        places.append((place, answer))
        if rng.random() < world.twins:
            other = rng.choice([one for one in ANSWERS if one != answer])
            places.append((_near(place, world.apart, rng), other))
    return places


def _near(place: Vector, far: float, rng: random.Random) -> Vector:
    step = np.array([rng.gauss(0, 1) for _ in range(DIMENSIONS)], np.float32)
    made = place + far * step / np.linalg.norm(step)
    return (made / np.linalg.norm(made)).astype(np.float32)


def _phrase(number: int) -> str:
    """A text of its own without a number or a name in it, which could not be given to another call."""
    letters = ""
    while number or not letters:
        number, rest = divmod(number, 26)
        letters += chr(ord("a") + rest)
    return f"where does {letters} belong"


@dataclass(slots=True)
class Counted:
    """What became of the calls."""

    calls: int = 0
    identical: int = 0
    similar: int = 0
    wrong: int = 0
    """Of the similar ones."""
    first: int | None = None
    """The call that was the first to be given a similar one's answer."""

    def plain(self) -> dict[str, int | None]:
        """For JSON, shares in thousandths."""
        return {
            "calls": self.calls,
            "identical_permille": 1000 * self.identical // self.calls,
            "similar_permille": 1000 * self.similar // self.calls,
            "wrong_permille": 1000 * self.wrong // self.similar if self.similar else None,
            "first": self.first,
        }


@dataclass(slots=True)
class Learnt:
    """A cache that goes by the rule of `models.similar`; with a fixed threshold, by that and nothing else."""

    permille: int
    threshold: int | None = None
    counted: Counted = field(default_factory=Counted)
    _known: dict[str, str] = field(default_factory=dict[str, str])
    _vectors: Vector = field(default_factory=lambda: np.zeros((KEPT, DIMENSIONS), np.float32))
    _keys: list[str] = field(default_factory=list[str])
    _evidence: dict[int, Tally] = field(default_factory=dict[int, Tally])

    def ask(self, asked: Asked) -> None:
        """One call."""
        self.counted.calls += 1
        if asked.text in self._known:
            self.counted.identical += 1
            return
        near = candidate(self._near(asked.vector))
        if near is not None and self._given(near):
            self.counted.similar += 1
            self.counted.wrong += self._known[near.key] != asked.answer
            self.counted.first = self.counted.first or self.counted.calls
            return
        if near is not None:
            self._count(near, self._known[near.key] == asked.answer)
        self._known[asked.text] = asked.answer
        self._vectors[len(self._keys) % KEPT] = asked.vector
        self._keys.append(asked.text)

    def _given(self, near: Near) -> bool:
        if self.threshold is not None:
            return near.similarity >= self.threshold
        edge = given_from(self._evidence, self.permille)
        return edge is not None and near.similarity >= edge and not explores(str(self.counted.calls))

    def _count(self, near: Near, right: bool) -> None:
        edge = edge_of(near.similarity) or EDGES[-1]
        self._evidence[edge] = self._evidence.get(edge, Tally()) + Tally(int(right), int(not right))

    def _near(self, vector: Vector) -> list[Near]:
        count = len(self._keys)
        if count == 0:
            return []
        likeness = self._vectors[: min(count, KEPT)] @ vector * 1000
        # With a fixed threshold the nearest decides alone, as it does elsewhere.
        from_ = likeness.max() - (NEAR if self.threshold is None else 0)
        places = ((place, (count - 1 - place) // KEPT) for place in np.flatnonzero(likeness >= from_))
        keys = [(place, self._keys[place + turn * KEPT]) for place, turn in places]
        return [Near(key, max(0, min(1000, int(likeness[at]))), GISTS[self._known[key]]) for at, key in keys]
