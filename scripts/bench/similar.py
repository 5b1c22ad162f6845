"""How often a similar call's answer is given and wrong: `python -m scripts.bench similar --seeds 10`.

Streams whose right answers are known, from easy ones to such where many questions that lie side by side
have different answers or the model wavers, with several permitted shares. Beside each: the exact cache alone,
and a fixed similarity from which on the nearest answer is given, as semantic caches commonly do. One stream
goes through the product as well (SQL, cache, route record), against a model that answers at once. Prints
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from activities.services.cache import Cache
from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.migrations import migrate
from activities.services.router import Answerer
from activities.services.similar import Similar
from activities.services.till import Till
from activities.tiers.scripted import Scripted
from models.inference import Answered, Call, DataClass, Grant, Inputs, Message, Params, Prompt, Task, Weigh
from models.settings import TaskSettings, TierSettings
from scripts.bench._paraphrases import Asked, Counted, Learnt, World, stream

WORLDS = {
    "easy": World(twins=0.0),
    "some twins": World(),
    "near twins": World(twins=0.6, apart=0.3),
    "wavering model": World(fickle=0.03),
}
PERMITTED = (10, 20, 50, 100)
FIXED = (920, 850)
TASK = "bench.sort"
TIER = TierSettings(name="edge", kind="llama_cpp", url="http://127.0.0.1:1")


def main(argv: Sequence[str]) -> int:
    """Run it and print one JSON object."""
    parser = argparse.ArgumentParser(prog="scripts.bench similar")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--through-product", type=int, default=600)
    wanted = parser.parse_args(argv)
    found: dict[str, Any] = {
        name: _world(world, wanted.seeds, wanted.calls) for name, world in WORLDS.items()
    }
    found["product"] = asyncio.run(_product(WORLDS["some twins"], wanted.through_product))
    print(json.dumps({"seeds": wanted.seeds, "calls": wanted.calls} | found, indent=2))
    return 0


def _world(world: World, seeds: int, calls: int) -> dict[str, Any]:
    streams = [list(stream(world, seed, calls)) for seed in range(seeds)]
    shares = [_identical(asked) for asked in streams]
    found: dict[str, Any] = {"exact_cache_alone_permille": sum(shares) // seeds}
    for permitted in PERMITTED:
        done = [_asked(Learnt(permitted), asked) for asked in streams]
        found[f"permitted {permitted}"] = _summed(done, permitted)
    for threshold in FIXED:
        done = [_asked(Learnt(1, threshold), asked) for asked in streams]
        found[f"fixed {threshold}"] = _summed(done, None)
    return found


def _identical(asked: Iterable[Asked]) -> int:
    texts = [one.text for one in asked]
    return 1000 * (len(texts) - len(set(texts))) // len(texts)


def _asked(learnt: Learnt, asked: Iterable[Asked]) -> Counted:
    for one in asked:
        learnt.ask(one)
    return learnt.counted


def _summed(done: Sequence[Counted], permitted: int | None) -> dict[str, Any]:
    similar, wrong = sum(one.similar for one in done), sum(one.wrong for one in done)
    calls = sum(one.calls for one in done)
    firsts = [one.first for one in done if one.first is not None]
    worst = max((1000 * one.wrong / one.similar for one in done if one.similar), default=None)
    found: dict[str, Any] = {
        "hits_permille": 1000 * sum(one.identical + one.similar for one in done) // calls,
        "similar_permille": 1000 * similar // calls,
        "wrong_per_thousand_given": round(1000 * wrong / similar, 2) if similar else None,
        "worst_seed": None if worst is None else round(worst, 2),
        "first_given_at_call": int(median(firsts)) if firsts else None,
    }
    if permitted is not None:
        over = [one for one in done if one.wrong * 1000 > permitted * one.similar]
        found |= {"within": not similar or 1000 * wrong <= permitted * similar, "seeds_over": len(over)}
    return found


@dataclass(slots=True)
class _Placed:
    """Says where texts lie that it was told of."""

    places: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    @property
    def model(self) -> str:
        """Of no real model."""
        return "simulated:1"

    @property
    def sees(self) -> frozenset[DataClass]:
        """Everything."""
        return frozenset(DataClass)

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Their places."""
        return [self.places[text] for text in texts]


def _build(inputs: Inputs, _: Params) -> Prompt:
    return Prompt(messages=(Message(role="user", content=f"Sort this: {inputs['text']}"),), temperature=0)


def _fine(_: str, __: Inputs, ___: Params) -> tuple[str, ...]:
    return ()


async def _product(world: World, calls: int) -> dict[str, Any]:
    """The same through SQL, with each call's milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'similar.db'}"
        migrate(url)
        database = Database(url)
        try:
            return await _through(database, list(stream(world, 0, calls)))
        finally:
            database.close()


async def _through(database: Database, asked: Sequence[Asked]) -> dict[str, Any]:
    truth = {one.text: one.answer for one in asked}
    placed = _Placed({one.text: one.vector.tolist() for one in asked})
    answerer, content = _answerer(database, truth, placed), ContentStore(database)
    took: dict[str, list[float]] = {"asked": [], "identical": [], "similar": []}
    wrong = 0
    for number, one in enumerate(asked):
        call = Call(task=TASK, inputs={"text": await content.put("bench", one.text.encode())})
        grant = Grant(similar=Weigh(workflow_id="bench", route=f"bench {number}"))
        began = time.perf_counter()
        answered = await answerer.answer("bench", call, TIER.name, grant)
        took[_kind(answered)].append(1000 * (time.perf_counter() - began))
        if answered.similar is not None:
            wrong += await content.text("bench", answered.text) != one.answer
    counts = {f"{name}_calls": len(each) for name, each in took.items()}
    times = {f"{name}_p50_ms": round(median(each), 2) for name, each in took.items() if each}
    return {"permitted": 100, "wrong": wrong} | counts | times


def _answerer(database: Database, truth: dict[str, str], placed: _Placed) -> Answerer:
    wanted = {TASK: TaskSettings(cache_seconds=86_400, similar_wrong_permille=100)}
    cache, content = Cache(database, _now), ContentStore(database)
    said = Scripted(TIER.name, lambda prompt: truth[prompt.messages[-1].content.partition(": ")[2]])
    task = Task(TASK, "small", False, _build, _fine, read_only=True)
    return Answerer(
        [TIER],
        {TIER.name: said},
        {TASK: task},
        content,
        till=Till(database, _now),
        cache=cache,
        similar=Similar(database, content, cache, placed, wanted, _now),
        wanted=wanted,
        clock=_now,
    )


def _kind(answered: Answered) -> str:
    if answered.similar is not None:
        return "similar"
    return "identical" if answered.cached else "asked"


def _now() -> datetime:
    return datetime.now(UTC)
