"""Where checkpoints go so that whoever holds the database cannot take them back."""

from __future__ import annotations

import asyncio
import os
from base64 import b64decode
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar

from activities.services.git import Git
from activities.services.notes import DASH, Tree, read_checkpoint
from models.errors import InvalidInput, Unavailable

T = TypeVar("T")
TAIL = 8192
BRANCH = "refs/heads/checkpoints"
ATTEMPTS = 5
SIGNED = 4 + 64
"""Bytes of a signature: which key, and Ed25519."""


class Witness(Protocol):
    """Keeps notes, and shows the newest one of a log."""

    @property
    def name(self) -> str:
        """How people call it."""
        ...

    async def newest(self, origin: str) -> str | None:
        """The last note it was given for a log."""
        ...

    async def keep(self, note: str) -> None:
        """Keep a note for good.

        Raises:
            OSError, Unavailable: it could not.
        """
        ...


def witnesses(given: Sequence[str], data: Path, clock: Callable[[], datetime]) -> tuple[Witness, ...]:
    """From `file:FOLDER` and `git:BARE_REPOSITORY`; relative paths start in the data folder."""
    return tuple(_witness(one, data, clock) for one in given)


def _witness(given: str, data: Path, clock: Callable[[], datetime]) -> Witness:
    kind, _, place = given.partition(":")
    match kind:
        case "file" if place:
            return FileWitness(data / place)
        case "git" if place:
            return GitWitness(data / place, clock)
        case _:
            raise InvalidInput.field("ledger.witnesses", given, "write file:FOLDER or git:BARE_REPOSITORY")


class FileWitness:
    """A folder with one file per log, to which notes are only appended; best on another machine's disk.

    Such a disk may never answer, and whoever asked cannot be woken: one thread waits for it, and no more.
    """

    def __init__(self, folder: Path, seconds: float = 10.0) -> None:
        """Touches nothing yet; a disk that has not answered after so many seconds is away."""
        self._folder, self._seconds = folder, seconds
        self._one = asyncio.Lock()
        self._asked: Future[Any] | None = None

    @property
    def name(self) -> str:
        """Kind and place."""
        return f"file:{self._folder}"

    async def newest(self, origin: str) -> str | None:
        """The note of the largest log in the file's end: two processes may have written past each other."""
        return await self._ask(lambda: self._newest(self._path(origin)))

    async def keep(self, note: str) -> None:
        """Append and flush."""
        path = self._path(read_checkpoint(note).origin)
        await self._ask(lambda: self._append(path, note))

    async def _ask(self, work: Callable[[], T]) -> T:
        async with self._one:
            if self._asked is not None and not self._asked.done():
                raise TimeoutError("it has not answered yet what it was asked before")
            asked = self._asked = Future[T]()
            Thread(target=_answer, args=(asked, work), name="witness", daemon=True).start()
            async with asyncio.timeout(self._seconds):
                return await asyncio.wrap_future(asked)

    def _path(self, origin: str) -> Path:
        return self._folder / f"{_file_name(origin)}.notes"

    def _append(self, path: Path, note: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        end = _end(path)
        # What a full disk or a loss of power left of a note must not become part of this one.
        apart = "" if not end or end.endswith("\n\n") else "\n" if end.endswith("\n") else "\n\n"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{apart}{note}\n")
            file.flush()
            os.fsync(file.fileno())

    def _newest(self, path: Path) -> str | None:
        parts = [part.removesuffix("\n") for part in _end(path).split("\n\n")]
        notes = [f"{text}\n\n{signed}\n" for text, signed in pairwise(parts)]
        sizes = {note: size for note in notes if (size := _size(note)) is not None}
        return max(reversed(sizes), key=sizes.__getitem__, default=None)


class GitWitness:
    """A bare git repository: one commit per checkpoint, one file per log. Mirror it where others see it."""

    def __init__(self, repository: Path, clock: Callable[[], datetime]) -> None:
        """Touches nothing yet; a missing repository is made."""
        self._git = Git(repository, clock)
        self._clock = clock

    @property
    def name(self) -> str:
        """Kind and place."""
        return f"git:{self._git.repository}"

    async def newest(self, origin: str) -> str | None:
        """The note at the branch's head."""
        if not await asyncio.to_thread(self._git.repository.exists):
            return None
        head = await self._git.head(BRANCH)
        return None if head is None else await self._note(head, origin)

    async def keep(self, note: str) -> None:
        """Commit."""
        await self._git.found(BRANCH, {})
        for _ in range(ATTEMPTS):
            if await self._commit(read_checkpoint(note), note):
                return
        raise Unavailable(f"witness {self.name}: its branch keeps moving; the next checkpoint tries again")

    async def _commit(self, tree: Tree, note: str) -> bool:
        head = await self._git.head(BRANCH)
        if head is None:
            raise Unavailable(f"witness {self.name}: it has no {BRANCH}; name a new folder")
        there = await self._note(head, tree.origin)
        if there is not None and (_size(there) or 0) > tree.size:
            return True  # Another process of ours was quicker, and what it signed continues this.
        entry = await self._git.store(note.encode())
        message = f"{tree.origin} {tree.size}\n"
        commit = await self._git.commit(
            head, {f"{_file_name(tree.origin)}.note": entry}, message, self._clock()
        )
        return await self._git.swap(BRANCH, commit, head)

    async def _note(self, commit: str, origin: str) -> str | None:
        path = f"{_file_name(origin)}.note"
        if not await self._git.entries(commit, path):
            return None
        return (await self._git.run("cat-file", "blob", f"{commit}:{path}")).decode(errors="replace")


def _answer(asked: Future[T], work: Callable[[], T]) -> None:
    # Running it cannot be cancelled: whoever gives up leaves it be.
    asked.set_running_or_notify_cancel()
    try:
        asked.set_result(work())
    except BaseException as error:
        asked.set_exception(error)


def _end(path: Path) -> str:
    """The last few notes of a file, the first of them perhaps cut; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _size(note: str) -> int | None:
    """Of the log that a note is about; `None` if it is no note, or not a whole one."""
    first, _, encoded = note.partition("\n\n")[2].partition("\n")[0].rpartition(" ")
    try:
        whole = first.startswith(DASH) and len(b64decode(encoded, validate=True)) == SIGNED
        return read_checkpoint(note).size if whole else None
    except (InvalidInput, ValueError):
        return None


def _file_name(origin: str) -> str:
    return origin.replace("/", "_")
