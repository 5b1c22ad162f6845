"""A target with no outside: notes kept as one file per action key, for trials, crash tests and benchmarks.

The file system refuses a second file of one name, so processes that share the folder share the guarantee.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from activities.connectors.base import Applied, Dry, Work
from activities.services.arguments import read_arguments
from activities.services.git import Clock
from models.canonical import sha256
from models.errors import (
    ConnectorRejected,
    ConnectorUnavailable,
    InvalidInput,
    PreconditionLost,
    UnknownName,
)
from models.loop import Change, Count, Currency, Frozen, Guarantee, Reversibility

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,199}")
PRICE = re.compile(r"[0-9]{1,15}")
UNTARGETED = "0"


class Price(Frozen):
    """An amount in the smallest unit of its currency."""

    minor: Count
    currency: Currency


class Note(Frozen):
    """A note, what it pretends to be about, and how the target shall misbehave."""

    text: Annotated[str, Field(min_length=1, max_length=300_000)]
    target: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._\-]{0,79}$")] | None = None
    price: Price | None = None
    """What the note wants its target to cost; what it costs now stands in the target's file."""
    fail: Literal["unavailable", "rejected"] | None = None


REMEDIES = {
    "text": "write 1 to 300000 characters",
    "target": "write lower-case letters, digits and ._- only, at most 80",
    "price": "write minor, a whole number from 0, and currency, as EUR",
    "fail": "write unavailable or rejected, or leave it out",
}


class Null:
    """Keeps notes in a folder."""

    guarantee = Guarantee.KEYED
    settle = timedelta(0)

    def __init__(self, folder: Path, clock: Clock, name: str = "null", fsync: bool = False) -> None:
        """Makes the folders.

        Args:
            folder: where notes stand, taken-back ones in `undone`, and what notes are about in `targets`.
            clock: the time, aware.
            name: the name actions use.
            fsync: survive a power cut, for the price of a flush per note.
        """
        self.name: str = name
        self._notes = folder / "notes"
        self._undone = folder / "undone"
        self._targets = folder / "targets"
        self._aside = folder / "aside"
        self._clock = clock
        self._fsync = fsync
        for path in (self._notes, self._undone, self._targets, self._aside):
            path.mkdir(parents=True, exist_ok=True)

    async def plan(self, work: Work) -> Dry:
        """Show the line that would be written.

        Raises:
            InvalidInput: an argument is wrong; names field, value and remedy.
        """
        note = _read(work)
        return Dry(
            target=f"{self.name}:{note.target or 'notes'}",
            version=self._version(note),
            diff="".join(f"+{line}\n" for line in note.text.splitlines()),
            reversibility=Reversibility.REVERSIBLE,
            undo="the note is marked as taken back",
            changes=self._changes(note),
        )

    async def find(self, key: str, work: Work) -> Applied | None:
        """Look for the key's file."""
        _read(work)
        for folder in (self._notes, self._undone):
            kept = _load(folder / _checked(key))
            if kept is not None:
                return Applied(key, str(kept.get("version", UNTARGETED)), detail=folder.name)
        return None

    async def apply(self, key: str, work: Work, expected: str, deadline: datetime) -> Applied:
        """Write the note, once per key.

        Raises:
            PreconditionLost: what the note is about has changed since `expected`.
            ConnectorUnavailable: the deadline passed, or the arguments asked for it.
            ConnectorRejected: the arguments asked for it.
        """
        note = _read(work)
        standing = await self.find(key, work)
        if standing is not None:
            return standing
        _fail(note, key)
        if self._version(note) != expected:
            raise PreconditionLost(f"{self.name}: target {note.target!r} changed since the plan; plan again")
        self._create(self._notes / key, {"text": note.text, "version": expected}, deadline)
        return Applied(key, expected, detail=self._notes.name)

    async def verify(self, work: Work, applied: Applied) -> Applied:
        """Read the note back.

        Raises:
            ConnectorUnavailable: it is not there.
        """
        standing = await self.find(applied.reference, work)
        if standing is None:
            raise ConnectorUnavailable(f"{self.name}: no note {applied.reference}; try again")
        return standing

    async def undo(self, key: str, work: Work, applied: Applied, deadline: datetime) -> Applied:
        """Mark the note as taken back, once per key.

        Raises:
            ConnectorRejected: there is no such note, or it was taken back under another key.
        """
        note = _read(work)
        mark = self._undone / _checked(key)
        kept = _load(mark)
        if kept is None:
            self._refuse_undo(applied.reference, note)
            kept = {"undoes": applied.reference, "version": self._version(note)}
            self._create(mark, kept, deadline)
        return Applied(key, str(kept.get("version", UNTARGETED)), detail=self._undone.name)

    def standing(self) -> tuple[str, ...]:
        """Keys of the notes that stand, sorted."""
        undone = {str((_load(path) or {}).get("undoes", "")) for path in self._undone.iterdir()}
        return tuple(sorted(path.name for path in self._notes.iterdir() if path.name not in undone))

    def _refuse_undo(self, reference: str, note: Note) -> None:
        if reference not in self.standing():
            raise ConnectorRejected(
                f"{self.name}: note {reference[:80]!r} does not stand; nothing to take back"
            )
        if self._version(note) != str((_load(self._notes / reference) or {}).get("version", UNTARGETED)):
            raise ConnectorRejected(
                f"{self.name}: target {note.target!r} changed since; take it back by hand"
            )

    def _version(self, note: Note) -> str:
        if note.target is None:
            return UNTARGETED
        try:
            return sha256((self._targets / note.target).read_bytes())
        except FileNotFoundError:
            return "absent"

    def _changes(self, note: Note) -> tuple[Change, ...]:
        """From what its target's file says; a target without a price moves no number that is known."""
        if note.price is None or note.target is None:
            return ()
        try:
            stands = (self._targets / note.target).read_text().strip()
        except FileNotFoundError:
            return ()
        if PRICE.fullmatch(stands) is None:
            return ()
        price = note.price
        return (Change(what=note.target, old=int(stands), new=price.minor, currency=price.currency),)

    def _create(self, path: Path, content: dict[str, str], deadline: datetime) -> None:
        """One system call decides; a file that exists already is the same key's earlier use.

        Raises:
            OSError: there is no room; nothing stands then, rather than half a note.
        """
        if self._clock() >= deadline:
            raise ConnectorUnavailable(
                f"{self.name}: the attempt's deadline {deadline.isoformat()} has passed; nothing was sent"
            )
        aside = self._aside / uuid.uuid4().hex
        try:
            with open(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(json.dumps(content).encode())
                file.flush()
                if self._fsync:
                    os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Any] | None:
    """What a key's file says; one that is empty since its writer was killed is there all the same."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _read(work: Work) -> Note:
    if work.operation != "note":
        raise UnknownName(f"operation: {work.operation!r} is not known to the null target; known: note")
    return read_arguments(Note, work.arguments, REMEDIES)


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise InvalidInput.field("key", key, "write letters, digits and ._:- only, at most 200 characters")
    return key


def _fail(note: Note, key: str) -> None:
    if note.fail == "unavailable":
        raise ConnectorUnavailable(f"null: {key} was asked to find the target away")
    if note.fail == "rejected":
        raise ConnectorRejected(f"null: {key} was asked to be refused")
