"""A bare git repository, worked on by plumbing alone: no working copy, no user configuration, no shell.

The only way to move a branch is `swap`, git's own compare-and-set.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from activities.services.process import Ended, run_program, seconds_left
from models.errors import ConnectorRejected, ConnectorUnavailable

Clock = Callable[[], datetime]

LIMIT = timedelta(seconds=60)
ABANDONED = timedelta(seconds=60)
BORN = datetime(2000, 1, 1, tzinfo=UTC)
"""Date of the first commit, fixed so that every process that makes it makes the same one."""
IDENTITY = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_AUTHOR_NAME": "Countersign",
    "GIT_AUTHOR_EMAIL": "countersign@localhost",
    "GIT_COMMITTER_NAME": "Countersign",
    "GIT_COMMITTER_EMAIL": "countersign@localhost",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a tree."""

    mode: str
    blob: str


Tree = Mapping[str, Entry]
Changes = Mapping[str, Entry | None]
"""Files by path; `None` takes the file away."""


class Git:
    """One bare repository."""

    def __init__(self, repository: Path, clock: Clock, program: str | None = None) -> None:
        """Touches nothing yet; see `found`."""
        self.repository = repository.absolute()
        self._clock = clock
        self._program = program or shutil.which("git") or "git"

    async def attempt(
        self,
        *arguments: str,
        data: bytes = b"",
        extra: Mapping[str, str] | None = None,
        deadline: datetime | None = None,
    ) -> Ended:
        """Run one git command and say how it ended."""
        seconds = seconds_left(self._clock(), deadline, LIMIT)
        # A receipt must survive a power cut, so what a commit rests on is flushed before the branch moves.
        base = ("--no-replace-objects", f"--git-dir={self.repository}", "-c", "core.fsync=committed")
        environment = {**IDENTITY, **(extra or {})}
        return await run_program(
            self._program, (*base, *arguments), seconds=seconds, data=data, environment=environment
        )

    async def run(
        self,
        *arguments: str,
        data: bytes = b"",
        extra: Mapping[str, str] | None = None,
        deadline: datetime | None = None,
    ) -> bytes:
        """Run one git command that must succeed.

        Raises:
            ConnectorUnavailable: it did not.
        """
        ended = await self.attempt(*arguments, data=data, extra=extra, deadline=deadline)
        if ended.code != 0:
            raise ConnectorUnavailable(f"{self.repository.name}: git {arguments[0]}: {ended.complaint}")
        return ended.out

    async def found(self, ref: str, files: Mapping[str, bytes]) -> None:
        """Make the repository and the branch's first commit if they are missing; safe in many processes."""
        if not self.repository.exists():
            await self._create(ref, files)
        if not (self.repository / "HEAD").is_file():
            raise ConnectorRejected(
                f"repository: {self.repository.name} is no bare git repository; "
                "name one made with git init --bare, or a folder that does not exist yet"
            )
        if await self.head(ref) is None:
            await self._first_commit(ref, files)

    async def head(self, ref: str) -> str | None:
        """The commit a branch stands at."""
        ended = await self.attempt("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        return ended.out.decode().strip() if ended.code == 0 else None

    async def entries(self, commit: str, *paths: str) -> dict[str, Entry]:
        """The files at or under the paths in a commit."""
        out = await self.run("ls-tree", "-r", "-z", "--full-tree", commit, "--", *paths)
        found: dict[str, Entry] = {}
        for line in out.split(b"\0"):
            if line:
                facts, _, path = line.partition(b"\t")
                mode, _, blob = facts.decode().split(" ")
                found[os.fsdecode(path)] = Entry(mode, blob)
        return found

    async def store(
        self, data: bytes, extra: Mapping[str, str] | None = None, deadline: datetime | None = None
    ) -> Entry:
        """Keep bytes as a blob."""
        arguments = ("hash-object", "-w", "--stdin", "--no-filters")
        out = await self.run(*arguments, data=data, extra=extra, deadline=deadline)
        return Entry("100644", out.decode().strip())

    async def tree(
        self,
        base: str | None,
        changes: Changes,
        extra: Mapping[str, str] | None = None,
        deadline: datetime | None = None,
    ) -> str:
        """The tree of a commit with some files changed, made in an index of its own."""
        with TemporaryDirectory() as folder:
            scoped = {**(extra or {}), "GIT_INDEX_FILE": f"{folder}/index"}
            if base is not None:
                await self.run("read-tree", base, extra=scoped, deadline=deadline)
            lines = b"".join(_index_line(path, entry) for path, entry in changes.items())
            await self.run("update-index", "-z", "--index-info", data=lines, extra=scoped, deadline=deadline)
            out = await self.run("write-tree", extra=scoped, deadline=deadline)
        return out.decode().strip()

    async def commit(
        self,
        parent: str | None,
        changes: Changes,
        message: str,
        when: datetime,
        deadline: datetime | None = None,
    ) -> str:
        """Make a commit that no branch names yet."""
        tree = await self.tree(parent, changes, deadline=deadline)
        parents = () if parent is None else ("-p", parent)
        date = f"{int(when.timestamp())} +0000"
        dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        arguments = ("commit-tree", tree, *parents, "-F", "-")
        out = await self.run(*arguments, data=message.encode(), extra=dates, deadline=deadline)
        return out.decode().strip()

    async def swap(self, ref: str, new: str, old: str, deadline: datetime | None = None) -> bool:
        """Move a branch if it still stands at `old`; False when it does not or is being moved."""
        self._clear_abandoned_lock(ref)
        ended = await self.attempt("update-ref", ref, new, old, deadline=deadline)
        return ended.code == 0

    @contextlib.asynccontextmanager
    async def scratch(self) -> AsyncGenerator[Mapping[str, str]]:
        """An environment whose new objects vanish afterwards."""
        with TemporaryDirectory() as folder:
            objects = str(self.repository / "objects")
            quoted = objects.replace("\\", "\\\\").replace('"', '\\"')
            yield {"GIT_OBJECT_DIRECTORY": folder, "GIT_ALTERNATE_OBJECT_DIRECTORIES": f'"{quoted}"'}

    async def _create(self, ref: str, files: Mapping[str, bytes]) -> None:
        """Make it aside and move it into place whole: of several processes, one wins, the others use it."""
        self.repository.parent.mkdir(parents=True, exist_ok=True)
        aside = self.repository.with_name(f".{self.repository.name}-{uuid.uuid4().hex}")
        staged = Git(aside, self._clock, self._program)
        branch = ref.removeprefix("refs/heads/")
        try:
            await staged.run("init", "--bare", "--quiet", "--template=", f"--initial-branch={branch}")
            await staged._first_commit(ref, files)
            with contextlib.suppress(OSError):
                aside.rename(self.repository)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    async def _first_commit(self, ref: str, files: Mapping[str, bytes]) -> None:
        changes = {path: await self.store(data) for path, data in sorted(files.items())}
        commit = await self.commit(None, changes, "Start the site\n", BORN)
        await self.swap(ref, commit, "0" * len(commit))

    def _clear_abandoned_lock(self, ref: str) -> None:
        """Git holds a branch's lock for milliseconds; one that is a minute old lost its owner to a kill."""
        lock = self.repository / f"{ref}.lock"
        if not self._is_abandoned(lock):
            return
        # Of two who saw it, the slower one would take away the lock that the faster one's git holds by then.
        with (self.repository / "clearing").open("a") as turn, contextlib.suppress(BlockingIOError):
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_abandoned(lock):
                lock.unlink()

    def _is_abandoned(self, lock: Path) -> bool:
        try:
            return self._clock().timestamp() - lock.stat().st_mtime > ABANDONED.total_seconds()
        except FileNotFoundError:
            return False


def _index_line(path: str, entry: Entry | None) -> bytes:
    facts = f"{entry.mode} {entry.blob}" if entry else f"0 {'0' * 40}"
    return f"{facts}\t".encode() + os.fsencode(path) + b"\0"
