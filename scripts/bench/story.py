"""Whether memory finds what happened: `python -m scripts.bench story`, over this repository's own history.

Every change in the history is an episode. Questions about them, in other words than theirs, about files and
about what came next, are answered from what memory finds, from everything there is, and from a plain search
of a file. An answer counts as found when the episode that holds it is among what a model would be given;
nobody's wording is judged. Tokens are those of the embedding model. Prints JSON, as it comes out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import httpx

from activities.services.content import ContentStore, put_blob
from activities.services.database import Database
from activities.services.keeping import keep
from activities.services.memory_store import MemoryStore
from activities.services.migrations import migrate
from activities.services.vectors import ExactVectors
from activities.tiers.embeddings import Embeddings
from activities.tiers.wire import http_client
from models.memory import EmbeddingSettings, Memo, Recall, Search

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = Path(__file__).with_name("story_questions.json")
TENANT, FILES, EACH = "story", 8, 20
WINDOW = 4096
"""Tokens of a small model's context."""
COMMON = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at by came can did do does for from had has have how in into is it made next of on
        one or our right that the their them they this to use used was we were what when where which who why
        with after before change changed happened started start done file first""",
    )
)


@dataclass(frozen=True, slots=True)
class Episode:
    """What happened."""

    name: str
    when: datetime
    title: str
    files: tuple[str, ...]
    tokens: int = 0

    @property
    def text(self) -> str:
        """As memory holds it, and as a line of a plain file."""
        files = ", ".join(self.files[:FILES])
        return f"On {self.when:%d %B %Y at %H:%M} ({self.when:%A}): {self.title}. Touched {files}."


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the episode that holds the answer."""

    group: str
    text: str
    answer: str


Way = Callable[[str], Awaitable[list[Episode]]]
"""From a question to the episodes that a model would be given."""


def main(argv: Sequence[str]) -> int:
    """Ask every question in every way."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench story", description=__doc__)
    parser.add_argument("--limit", type=int, default=5, help="episodes that a search hands over")
    options = parser.parse_args(argv)
    episodes = _history()
    if len(episodes) < EACH:
        print(f"{len(episodes)} changes are no history to ask about; clone all of it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(_measured(options, Path(folder), episodes)), indent=2))
    return 0


async def _measured(options: argparse.Namespace, folder: Path, episodes: list[Episode]) -> dict[str, Any]:
    async with _model_server(folder) as url:
        counted = await _counted(url, episodes)
        questions, unknown = _questions(counted)
        settings = EmbeddingSettings(url=url, managed=False)
        migrate(f"sqlite:///{folder / 'story.db'}")
        database = Database(f"sqlite:///{folder / 'story.db'}")
        try:
            async with aclosing(Embeddings(settings, http_client(settings))) as embedder:
                ways = await _ways(database, embedder, settings.dimensions, counted, options.limit)
                results = {name: await _asked(way, questions) for name, way in ways.items()}
        finally:
            database.close()
    return {
        "episodes": len(counted),
        "questions": {group: len(of) for group, of in _grouped(questions).items()},
        "questions_about_a_history_that_is_not_here": unknown,
        "handed_over_by_a_search": options.limit,
        "load_average": round(os.getloadavg()[0], 1),
        "ways": results,
    }


async def _asked(way: Way, questions: list[Question]) -> dict[str, Any]:
    found: dict[str, list[bool]] = {group: [] for group in _grouped(questions)}
    tokens: list[int] = []
    took: list[float] = []
    for question in questions:
        started = time.perf_counter()
        given = await way(question.text)
        took.append(time.perf_counter() - started)
        found[question.group].append(question.answer in {one.name for one in given})
        tokens.append(sum(one.tokens for one in given))
    return {
        "found": {group: f"{sum(of)} of {len(of)}" for group, of in found.items()},
        "tokens_per_question": round(mean(tokens)),
        "milliseconds_per_question": round(1000 * mean(took), 2),
    }


# Ways to answer.


async def _ways(
    database: Database, embedder: Embeddings, dimensions: int, episodes: list[Episode], limit: int
) -> dict[str, Way]:
    by_name = {one.name: one for one in episodes}
    content, newest = ContentStore(database), episodes[-1].when
    vectors = ExactVectors(database, dimensions)
    # What happened long ago has expired by today; the story is told when its last episode was fresh.
    store = MemoryStore(database, content, embedder, vectors, lambda: newest)
    for one in episodes:
        await database.write(lambda link, e=one: _keep(link, e, newest))
    while await store.index_pending():
        pass

    def recall(by: Search) -> Way:
        async def way(question: str) -> list[Episode]:
            query = await content.put(TENANT, question.encode())
            recalled = await store.recall(Recall(tenant=TENANT, query=query, by=by, limit=limit))
            return [by_name[hit.record_id] for hit in recalled.hits]

        return way

    return {
        **{f"memory_by_{by.value}": recall(by) for by in (Search.HYBRID, Search.MEANING, Search.WORDS)},
        "full_context": _everything(episodes),
        f"newest_that_fit_{WINDOW}_tokens": _everything(_fitting(episodes)),
        "plain_file_search": _searched(episodes, limit),
    }


def _keep(link: Any, episode: Episode, now: datetime) -> bool:
    text = put_blob(link, TENANT, episode.text.encode(), "text/plain")
    memo = Memo(
        record_id=episode.name,
        tenant=TENANT,
        kind="episode",
        title=episode.title[:200],
        text=text,
        source=episode.name,
    )
    return keep(link, memo, now)


def _everything(episodes: list[Episode]) -> Way:
    async def way(question: str) -> list[Episode]:
        return episodes

    return way


def _fitting(episodes: list[Episode]) -> list[Episode]:
    fitting: list[Episode] = []
    left = WINDOW
    for one in reversed(episodes):
        left -= one.tokens
        if left < 0:
            break
        fitting.append(one)
    return fitting


def _searched(episodes: list[Episode], limit: int) -> Way:
    """Better than grep by itself: the lines with most of the question's telling words, newest first."""
    lines = [(one, one.text.casefold()) for one in reversed(episodes)]

    async def way(question: str) -> list[Episode]:
        words = set(re.findall(r"[\w./]+\w", question.casefold())) - COMMON
        hits = [(sum(word in line for word in words), one) for one, line in lines]
        best = sorted((hit for hit in hits if hit[0]), key=lambda hit: -hit[0])
        return [one for _, one in best[:limit]]

    return way


# Episodes and questions.


def _history() -> list[Episode]:
    argv = ("git", "log", "--reverse", "--date-order", "--format=%x1e%h%x1f%cI%x1f%s", "--name-only")
    out = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    episodes: list[Episode] = []
    for block in out.split("\x1e")[1:]:
        head, *files = [line for line in block.splitlines() if line]
        name, when, title = head.split("\x1f")
        episodes.append(Episode(name, datetime.fromisoformat(when).astimezone(UTC), title, tuple(files)))
    return episodes


def _questions(episodes: list[Episode]) -> tuple[list[Question], int]:
    """Those that were written down, and as many again about files and about what came next."""
    written: list[dict[str, str]] = json.loads(QUESTIONS.read_text())
    found: list[Question] = []
    for one in written:
        holding = [episode.name for episode in episodes if episode.title.startswith(one["answer"])]
        if holding:
            found.append(Question("in_other_words", one["question"], holding[0]))
    return [*found, *_about_files(episodes), *_about_what_came_next(episodes)], len(written) - len(found)


def _about_files(episodes: list[Episode]) -> list[Question]:
    first: dict[str, str] = {}
    for one in episodes:
        for file in one.files[:FILES]:
            first.setdefault(file, one.name)
    names = sorted(first)
    chosen = names[:: max(1, len(names) // EACH)][:EACH]
    return [
        Question("about_a_file", f"What was done when {name} first came in?", first[name]) for name in chosen
    ]


def _about_what_came_next(episodes: list[Episode]) -> list[Question]:
    pairs = list(zip(episodes, episodes[1:], strict=False))
    chosen = pairs[:: max(1, len(pairs) // EACH)][:EACH]
    text = "What happened right after this: {}?"
    return [Question("what_came_next", text.format(one.title), then.name) for one, then in chosen]


def _grouped(questions: list[Question]) -> dict[str, list[Question]]:
    groups: dict[str, list[Question]] = {}
    for one in questions:
        groups.setdefault(one.group, []).append(one)
    return groups


# The embedding model, which also counts tokens.


@asynccontextmanager
async def _model_server(folder: Path) -> AsyncGenerator[str]:
    argv = ("-m", "workers.model_server", "embed", "--port", "0", "--data", str(folder))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *argv, "--parent-pid", str(os.getpid())), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async for line in process.stderr:
            if b" listening on " in line:
                yield line.split()[-1].decode()
                break
        else:
            raise RuntimeError("the model server ended before it listened")
    finally:
        process.terminate()
        await process.wait()


async def _counted(url: str, episodes: list[Episode]) -> list[Episode]:
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        counted: list[Episode] = []
        for one in episodes:
            answer = await client.post("/tokenize", json={"content": one.text})
            tokens = len(answer.raise_for_status().json()["tokens"])
            counted.append(Episode(one.name, one.when, one.title, one.files, tokens))
        return counted


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
