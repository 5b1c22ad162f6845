"""Where checkpoints go so that whoever holds the database cannot take them back."""

from __future__ import annotations

import asyncio
import os
from base64 import b64decode
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from activities.services.git import Git
from activities.services.notes import DASH, Tree, read_checkpoint
from models.errors import InvalidInput, Unavailable

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
    """A folder with one file per log, to which notes are only appended; best on another machine's disk."""

    def __init__(self, folder: Path) -> None:
        """Touches nothing yet."""
        self._folder = folder

    @property
    def name(self) -> str:
        """Kind and place."""
        return f"file:{self._folder}"

    async def newest(self, origin: str) -> str | None:
        """The note of the largest log in the file's end: two processes may have written past each other."""
        return await asyncio.to_thread(self._newest, self._path(origin))

    async def keep(self, note: str) -> None:
        """Append and flush."""
        await asyncio.to_thread(self._append, self._path(read_checkpoint(note).origin), note)

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
        path = f"{_file_name(origin)}.note"
        if head is None or not await self._git.entries(head, path):
            return None
        return (await self._git.run("cat-file", "blob", f"{head}:{path}")).decode()

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
        entry = await self._git.store(note.encode())
        message = f"{tree.origin} {tree.size}\n"
        commit = await self._git.commit(
            head, {f"{_file_name(tree.origin)}.note": entry}, message, self._clock()
        )
        return await self._git.swap(BRANCH, commit, head)


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
