"""Overlapping attempts at a real bare repository, one git command at a time."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import pytest

from activities.connectors import git_site
from activities.connectors.base import Applied, Work
from activities.connectors.git_site import GitSite
from activities.services.git import IDENTITY, LIMIT, Git
from activities.services.process import Ended, seconds_left
from activities.services.site_builder import SiteBuilder
from models.errors import ConnectorUnavailable, CountersignError
from models.settings import SiteSettings
from scripts.chaos.explorer import Choices, Clocked, Move, Ran, Stage, every
from scripts.chaos.overlaps import NOW

REF = "refs/heads/main"
KEY, UNDO = "ab" * 32 + ".0", "ab" * 32 + ".0.undo"
ATTEMPT = timedelta(minutes=1)
SITE = SiteSettings(name="blog", repository=Path("site.git"), build=Path("public"), address="http://a.test")
WORK = Work(
    "publish",
    {
        "slug": "hello",
        "title": "Hello",
        "description": "",
        "tags": [],
        "date": "2026-01-31T10:00:00+01:00",
        "draft": False,
        "body": "Some *text*.",
    },
)
POST = "content/posts/hello.md"


class Watched(Git):
    """Real git, where moving the branch and looking at it are steps, and its end may be lost."""

    stage: Stage | None = None

    async def attempt(
        self,
        *arguments: str,
        data: bytes = b"",
        extra: Mapping[str, str] | None = None,
        deadline: datetime | None = None,
    ) -> Ended:
        moves, how = arguments[0] == "update-ref", "answers"
        if self.stage is not None and (moves or arguments[0] == "rev-parse"):
            await self.stage.stop("moves" if moves else "looks")
        seconds_left(self._clock(), deadline, LIMIT)
        if self.stage is not None and moves:
            how = self.stage.choose("answers", "is lost", "is killed")
        if how == "is killed":
            self.leave_lock()
            raise ConnectorUnavailable("git was killed")
        ended = self.now(*arguments, data=data, extra=extra)
        if how == "is lost":
            raise ConnectorUnavailable("the answer was lost")
        return ended

    def now(self, *arguments: str, data: bytes = b"", extra: Mapping[str, str] | None = None) -> Ended:
        command = [self._program, "--no-replace-objects", f"--git-dir={self.repository}", *arguments]
        bare = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", **IDENTITY, **(extra or {})}
        done = subprocess.run(command, input=data, capture_output=True, env=bare, check=False)
        return Ended(done.returncode, done.stdout, done.stderr)

    def says(self, *arguments: str, data: bytes = b"", extra: Mapping[str, str] | None = None) -> str:
        ended = self.now(*arguments, data=data, extra=extra)
        assert ended.code == 0, ended.complaint
        return ended.out.decode().strip()

    def leave_lock(self) -> None:
        lock = self.repository / f"{REF}.lock"
        lock.touch()
        then = self._clock().timestamp()
        os.utime(lock, (then, then))

    def pushes(self, path: str, text: str) -> str:
        """Somebody else's commit on the branch, past any lock of ours."""
        head = self.says("rev-parse", REF)
        index = {"GIT_INDEX_FILE": str(self.repository / "their-index")}
        blob = self.says("hash-object", "-w", "--stdin", data=text.encode())
        self.now("read-tree", head, extra=index)
        self.now("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", extra=index)
        tree = self.says("write-tree", extra=index)
        commit = self.says("commit-tree", tree, "-p", head, "-m", "Theirs")
        if not (self.repository / f"{REF}.lock").exists():
            self.says("update-ref", REF, commit, head)
        return commit


class Played:
    """One run at a copy of the repository."""

    def __init__(
        self, folder: Path, choices: Choices, events: tuple[str, ...], first: Applied | None
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Clocked)
        loop.now = NOW
        shutil.rmtree(folder / "site.git", ignore_errors=True)
        shutil.copytree(folder / ("applied.git" if first else "founded.git"), folder / "site.git")
        self.left, self.first, self.folder = dict.fromkeys(events, 1), first, folder
        self.stage = Stage(loop, choices, self.state, self.moves, lambda: [NOW + ATTEMPT])
        self.git = Watched(folder / "site.git", self.stage.clock)
        self.heard = list[tuple[str, str]]()
        self.theirs = list[str]()
        self.wrong = list[str]()

    def state(self) -> object:
        locked = (self.git.repository / f"{REF}.lock").exists()
        return (self.git.says("rev-parse", REF), locked, tuple(self.left.items()))

    def moves(self) -> list[Move]:
        return [Move(name, lambda name=name: self.pushed(name)) for name, left in self.left.items() if left]

    def pushed(self, name: str) -> None:
        self.left[name] -= 1
        path = POST if name == "same" else "content/posts/theirs.md"
        commit = self.git.pushes(path, "Theirs.\n")
        if self.git.says("rev-parse", REF) == commit:
            self.theirs.append(commit)

    async def call(self, word: str, version: str) -> None:
        site = site_of(self.folder, self.git)
        site._founded = True  # pyright: ignore[reportPrivateUsage]
        until = self.stage.clock() + ATTEMPT
        try:
            if word == "undo":
                assert self.first is not None
                done = await site.undo(UNDO, WORK, self.first, until)
            else:
                done = await site.apply(KEY, WORK, version, until)
            self.heard.append((word, done.reference))
        except CountersignError as error:
            self.heard.append((word, type(error).__name__))

    async def play(self, words: tuple[str, ...], version: str) -> None:
        self.git.stage = self.stage
        calls = [
            (f"{word}{at}", lambda word=word: self.call(word, version)) for at, word in enumerate(words, 1)
        ]
        await self.stage.run(calls)
        landed = self.landed()
        self.stage.loop.now += 2 * ATTEMPT
        for word in dict.fromkeys(words):
            # A last attempt, once a lock whose owner was killed is old enough.
            await self.call(word, version)
        self.judge(words, landed)

    def landed(self) -> list[str]:
        return self.git.says("log", "--format=%H %(trailers:key=Countersign-Action,valueonly)", REF).split()

    def judge(self, words: tuple[str, ...], before: list[str]) -> None:
        after = self.landed()
        for word, key in (("apply", KEY), ("undo", UNDO)):
            told = {what for one, what in self.heard if one == word and len(what) == 40}
            count = after.count(key)
            if len(told) > 1 or (told and count != 1) or count > 1:
                self.wrong.append(f"{key} stands {count} times, and was told {sorted(told)}")
            if key in before and word in words and not told:
                self.wrong.append(f"{key} stands, and nobody is told")
        for commit in self.theirs:
            if commit not in after:
                self.wrong.append("somebody else's commit is gone")
        if set(before) - set(after):
            self.wrong.append("the branch went back")


def site_of(folder: Path, git: Git) -> GitSite:
    client = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(503)))
    return GitSite(SITE, folder, client, git._clock, engine="plain", git=git)  # pyright: ignore[reportPrivateUsage]


async def nothing(self: SiteBuilder, *given: object, **named: object) -> None:
    """Pages are another matter."""


Prepared = tuple[Path, str, Applied]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    folder = tmp_path_factory.mktemp("git")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteBuilder, "build", nothing)
        patch.setattr(git_site, "TRIES", 4)

        async def made() -> Prepared:
            git = Watched(folder / "site.git", lambda: NOW)
            site = site_of(folder, git)
            dry = await site.plan(WORK)
            shutil.copytree(folder / "site.git", folder / "founded.git")
            first = await site.apply(KEY, WORK, dry.version, NOW + ATTEMPT)
            shutil.copytree(folder / "site.git", folder / "applied.git")
            return folder, dry.version, first

        yield asyncio.run(made())


def explored(prepared: Prepared, words: tuple[str, ...], events: tuple[str, ...], budget: int) -> Ran | None:
    folder, version, first = prepared

    async def run(choices: Choices) -> tuple[list[str], list[str]]:
        played = Played(folder, choices, events, first if "undo" in words else None)
        await played.play(words, version)
        return [*played.stage.told, *map(str, played.heard)], played.wrong

    with closing(Clocked(NOW)) as loop:
        return loop.run_until_complete(every(run, budget))[1]


@pytest.mark.parametrize(
    ("words", "events"),
    [(("apply", "apply"), ("same",)), (("undo", "undo"), ())],
    ids=str,
)
def test_a_branch_is_moved_once_for_a_key_in_every_order_with_a_surprise(
    prepared: Prepared, words: tuple[str, ...], events: tuple[str, ...]
) -> None:
    assert explored(prepared, words, events, 1) is None


async def test_a_post_put_back_and_taken_back_again_ends_as_it_was(prepared: Prepared) -> None:
    folder, version, first = prepared
    shutil.rmtree(folder / "site.git", ignore_errors=True)
    shutil.copytree(folder / "applied.git", folder / "site.git")
    git = Watched(folder / "site.git", lambda: NOW)
    site, until = site_of(folder, git), NOW + ATTEMPT
    taken = await site.undo(UNDO, WORK, first, until)
    again = await site.apply("cd" * 32 + ".0", WORK, version, until)
    # Neither the first action nor its taking back happens a second time, whoever asks for it.
    assert (await site.apply(KEY, WORK, version, until)).reference == first.reference
    assert (await site.undo(UNDO, WORK, first, until)).reference == taken.reference
    assert POST in git.says("ls-tree", "-r", "--name-only", REF)
    back = await site.undo("cd" * 32 + ".0.undo", WORK, again, until)
    assert POST not in git.says("ls-tree", "-r", "--name-only", REF)
    assert len({first.reference, taken.reference, again.reference, back.reference}) == 4
