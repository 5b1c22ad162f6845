"""What an agent believes about one subject: versions, what changes them, when an answer rests on old ones.

Pure: a belief is a value, a change makes the next version of it, and `stale_fields` says whether somebody who
read an earlier version would have read something else by now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import AwareDatetime, Field, StringConstraints

from models.canonical import canonical, derived_id
from models.errors import InvalidInput
from models.loop import Evidence, Frozen, Name
from models.memory import Line

Value = bool | int | Annotated[str, StringConstraints(max_length=2000, pattern=r"^[^\x00]*$")] | None
Key = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.\-]{0,62}$")]
"""The name of a field."""
Subject = Annotated[str, StringConstraints(pattern=r"^[^\x00\s#]+$", min_length=1, max_length=200)]

STATE_BYTES = 16 * 1024
"""A belief is compact; beyond this its oldest fields are folded."""
FOLDED_NAMES = 100
PREFIX = "belief:"


class Known(Frozen):
    """A field: what is believed, and since which version."""

    value: Value
    since: int = Field(ge=1)


class Belief(Frozen):
    """One version of an agent's belief about one subject; version 0 believes nothing."""

    tenant: Name
    agent: Name
    subject: Subject
    version: int = Field(default=0, ge=0)
    fields: dict[Key, Known] = Field(default_factory=dict[str, Known])
    folded: dict[Key, int] = Field(default_factory=dict[str, int])
    """Fields left out because they were old, and since when they hold; their values stand in that version."""
    folded_more: int = 0
    """So many were folded away so long ago that not even their names are kept."""
    memories: tuple[Line, ...] = Field(default=(), max_length=50)
    """Records that the last change rests on."""

    def value(self, key: str) -> Value:
        """What is believed of a field; `None` when nothing is."""
        known = self.fields.get(key)
        return None if known is None else known.value


class Change(Frozen):
    """What an event changes; an event changes a belief once."""

    tenant: Name
    agent: Name
    subject: Subject
    event: Line = Field(min_length=1, max_length=200)
    """Its id, by which a second delivery is known."""
    sets: dict[Key, Value] = Field(default_factory=dict[str, Value], max_length=100)
    removes: tuple[Key, ...] = Field(default=(), max_length=100)
    memories: tuple[Line, ...] = Field(default=(), max_length=50)


class Settled(Frozen):
    """What became of a change, and the belief that stands now."""

    won: bool
    belief: Belief
    known: bool = False
    """The event had changed it before; nothing was done twice."""
    reason: str = ""
    """Why not, if it was neither won nor known: another version or another owner."""
    at: AwareDatetime | None = None


class Mail(Frozen):
    """A change as it is sent to the owner of its subject."""

    agent: Name
    event: Line = Field(min_length=1, max_length=200)
    sets: dict[Key, Value] = Field(default_factory=dict[str, Value], max_length=100)
    removes: tuple[Key, ...] = Field(default=(), max_length=100)
    memories: tuple[Line, ...] = Field(default=(), max_length=50)
    expected: int | None = Field(default=None, ge=0)
    """The version the sender decided on; another one refuses it."""


class Handled(Frozen):
    """What became of mail."""

    event: str
    agent: str
    won: bool
    """It changed the belief, now or when it came before."""
    version: int
    """The one it made; the one that stands, if it made none."""
    known: bool = False
    """It had come before."""
    reason: str = ""


class Ownership(Frozen):
    """What one run of an owner takes over from the one before it."""

    tenant: Name
    subject: Subject
    answered: tuple[Handled, ...] = ()
    """The newest answers, oldest first, to answer repetitions quickly; each event that ever changed a belief
    is known to SQL, committed with the change itself, so that this need not grow."""
    waiting: tuple[Mail, ...] = ()
    handled: int = 0
    refused: int = 0
    hand_over_after: int = Field(default=2000, ge=1)
    """Mail that one run handles, so that its history stays small."""


class Owning(Frozen):
    """A run says that it is the owner from now on."""

    tenant: Name
    subject: Subject
    holder: str


class Delivery(Frozen):
    """Mail in order, from the owner of this epoch."""

    tenant: Name
    subject: Subject
    epoch: int
    mails: tuple[Mail, ...] = Field(min_length=1)
    holder: str = ""
    """The run that hands it in; the ledger names it, and another run of the same epoch is refused."""


class Delivered(Frozen):
    """What became of each."""

    handled: tuple[Handled, ...] = ()
    fenced: bool = False
    """Nothing was handled: somebody else has taken the subject since. Whoever is the owner takes it anew."""


class Look(Frozen):
    """Which belief an agent wants to read."""

    tenant: Name
    agent: Name
    subject: Subject


class Delta(Frozen):
    """One field, before and after; `None` is nothing."""

    key: Key
    before: Value
    after: Value

    def text(self) -> str:
        """For people."""
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}"


def owner_id(tenant: str, called: str) -> str:
    """The workflow id of a subject's owner; there can be only one.

    `called` is the subject, or with encryption on what `Beliefs.called` calls it.
    """
    return f"belief/{tenant}/{called}"


def owner_lease(tenant: str, subject: str) -> str:
    """The lease of a subject's owner; a subject may be a person, so it is not spelled."""
    return f"belief/{derived_id('owner', tenant, subject)}"


def apply(belief: Belief, change: Change) -> Belief:
    """The next version.

    Raises:
        InvalidInput: what is set is too large by itself.
    """
    version = belief.version + 1
    fields = {key: known for key, known in belief.fields.items() if key not in change.removes}
    for key, value in change.sets.items():
        known = fields.get(key)
        # True is 1 for Python; as beliefs they differ.
        same = known is not None and known.value == value and type(known.value) is type(value)
        fields[key] = known if known is not None and same else Known(value=value, since=version)
    gone = {*change.removes, *change.sets}
    folded = {key: since for key, since in belief.folded.items() if key not in gone}
    made = belief.model_copy(
        update=dict(version=version, fields=fields, folded=folded, memories=change.memories)
    )
    return compact(made, keep=change.sets.keys())


def compact(belief: Belief, keep: Iterable[str] = ()) -> Belief:
    """Fold the oldest fields until the belief fits.

    Raises:
        InvalidInput: the fields in `keep` alone do not fit.
    """
    kept = set(keep)
    while len(canonical(belief)) > STATE_BYTES:
        old = sorted((known.since, key) for key, known in belief.fields.items() if key not in kept)
        if not old:
            raise InvalidInput.field(
                "sets", f"{len(kept)} fields", f"keep a belief under {STATE_BYTES} bytes; refer to memories"
            )
        belief = _fold(belief, old[: max(1, len(old) // 8)])
    return belief


def difference(before: Belief, after: Belief) -> tuple[Delta, ...]:
    """What changed between two versions, by name of field."""
    keys = sorted({*before.fields, *after.fields})
    deltas = (Delta(key=key, before=before.value(key), after=after.value(key)) for key in keys)
    return tuple(one for one in deltas if one.before != one.after or _kind(one.before) != _kind(one.after))


def stale_fields(version: int, rests_on: Iterable[str], now: Belief) -> tuple[str, ...]:
    """Fields that are not what somebody read at `version`; resting on none means resting on all."""
    since = {key: known.since for key, known in now.fields.items()} | now.folded
    named = set(rests_on)
    changed = {key for key in named or since if since.get(key, version + 1) > version}
    if not named and now.version < version:
        changed.add("version")
    return tuple(sorted(changed))


def evidence(belief: Belief, *fields: str) -> Evidence:
    """How a proposal says that it rests on a belief, or on some fields of it."""
    names = f"#{','.join(sorted(fields))}" if fields else ""
    return Evidence(reference=f"{PREFIX}{belief.subject}{names}", version=str(belief.version))


def read_evidence(one: Evidence) -> tuple[str, int, tuple[str, ...]] | None:
    """Subject, version and fields of evidence that is a belief; `None` for any other."""
    if not one.reference.startswith(PREFIX) or not one.version.isdecimal():
        return None
    subject, _, names = one.reference.removeprefix(PREFIX).partition("#")
    return subject, int(one.version), tuple(name for name in names.split(",") if name)


def _fold(belief: Belief, oldest: list[tuple[int, str]]) -> Belief:
    gone = {key: since for since, key in oldest}
    fields = {key: known for key, known in belief.fields.items() if key not in gone}
    names = sorted((belief.folded | gone).items(), key=lambda item: (item[1], item[0]))
    lost, kept = names[:-FOLDED_NAMES], names[-FOLDED_NAMES:]
    more = belief.folded_more + len(lost)
    return belief.model_copy(update=dict(fields=fields, folded=dict(kept), folded_more=more))


def _kind(value: Value) -> type:
    return type(value)


def _shown(value: Value) -> str:
    return "nothing" if value is None else str(value)[:80]
