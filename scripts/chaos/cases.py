"""Which run falls where: every boundary of every role, by what leads a run to it."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from models.gate import Kind
from models.loop import Guarantee, Status
from models.loop import workflow_id as id_of
from scripts.chaos.hooks import How
from scripts.chaos.targets import QUICK, SLOW

NULL, SITE = "null", "site"
ASKED, BLIND = Guarantee.ASKED.value, Guarantee.BLIND.value
OPPOSITE = {Kind.APPROVE: Kind.REJECT, Kind.REJECT: Kind.APPROVE}


class Story(StrEnum):
    """What leads a run to a boundary."""

    PLAIN = "plain"
    """One action, one answer."""
    UNDONE = "undone"
    """A second action is refused by its target, so that the first is taken back."""
    WHOLE = "whole"
    """An agent that recalls, asks a model and remembers."""
    DRIFTED = "drifted"
    """What the action was planned against changes meanwhile, so that there is a second intent."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run, the boundary at which a worker falls on it, and what people answer."""

    key: str
    boundary: str
    how: How = How.KILL
    story: Story = Story.PLAIN
    connector: str = NULL
    answer: Kind = Kind.APPROVE
    opposite: bool = False
    """The other answer is sent after the fall, before any worker is started again."""

    @property
    def agent(self) -> str:
        """Who proposes."""
        return "stub" if self.story is Story.WHOLE else "external"

    @property
    def workflow_id(self) -> str:
        """The run's id."""
        return id_of("default", self.agent, self.key)

    @property
    def expected(self) -> frozenset[Status]:
        """How the run may end; one way only, but for a target that cannot be asked."""
        if self.answer is Kind.REJECT:
            return frozenset({Status.REJECTED})
        if self.story is Story.UNDONE:
            return frozenset({Status.COMPENSATED})
        if self.connector == BLIND:
            return self._blind()
        return frozenset({Status.EXECUTED})

    def _blind(self) -> frozenset[Status]:
        if self.boundary in DOUBTFUL and self.how is How.KILL:
            return frozenset({Status.IN_DOUBT})
        # A neighbour's fall can take this attempt with it; a stopped one may wake before anyone doubts.
        return frozenset({Status.EXECUTED, Status.IN_DOUBT})

    def body(self) -> dict[str, Any]:
        """The proposal as a program would send it."""
        actions = [self._action()]
        if self.story is Story.UNDONE:
            actions.append(_note(self.key, fail="rejected"))
        return {"title": f"Do {self.key}", "actions": actions}

    def _action(self) -> dict[str, Any]:
        if self.connector == SITE:
            return _post(self.key)
        if self.connector == NULL:
            return _note(self.key, **({"target": self.key} if self.story is Story.DRIFTED else {}))
        seconds = SLOW if self.boundary.endswith(".sent") else QUICK
        arguments = {"text": self.key, "seconds": str(seconds)}
        return {"connector": self.connector, "operation": "send", "arguments": arguments, "title": "Write"}


COMMIT = ("commit.before", "commit.inside", "commit.after", "end")
SENDING = ("reserve.before", "reserve.inside", "reserve.after", "send.before", "send.after")
CONFIRMING = ("confirm.before", "confirm.inside", "confirm.after", "verify.before", "verify.after", "end")
SWAPPING = ("swap.before", "swap.after")
DOUBTFUL = frozenset(
    f"apply.0.{point}"
    for point in (
        "reserve.after",
        "send.before",
        "sent",
        "send.after",
        "confirm.before",
        "confirm.inside",
    )
)


def _of(step: str, points: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{step}.{point}" for point in points)


BOOKKEEPING = (
    *_of("admit", ("start", *COMMIT)),
    *_of("read_proposal", ("start", "end")),
    *_of("record.proposal", ("start", *COMMIT)),
    *_of("present", ("start", *COMMIT)),
    *_of("conclude", ("start", *COMMIT)),
)
VERDICT = _of("record.verdict", ("start", *COMMIT))
PLANNING = _of("plan", ("start", "plan.before", "plan.after", *COMMIT))
APPLYING = _of("apply.0", ("start", *SENDING, *CONFIRMING))
SWAPPED = _of("apply.0", SWAPPING)
LETTER = (*APPLYING, "apply.0.sent")
UNDOING = (
    *_of("record.compensation", COMMIT),
    *_of("apply.1", ("send.before", "confirm.before", "confirm.inside", "confirm.after")),
    *_of("settle.1", ("start", "look.before", "look.inside", "look.after", "end")),
    *_of("undo.0", ("start", "reserve.before", "reserve.inside", "reserve.after", "takeback.before")),
    *_of("undo.0", ("takeback.after", "confirm.before", "confirm.inside", "confirm.after", "end")),
)
UNDONE_SWAPPED = _of("undo.0", SWAPPING)
DRIFTING = (
    *_of("apply.0", ("confirm.before", "confirm.inside", "confirm.after")),
    *_of("record.drift", COMMIT),
)
THINKING = (
    *_of("recall", ("start", "embed.before", "embed.after", "end")),
    *_of("route", ("start", *COMMIT)),
    *_of("answer", ("start", "model.before", "model.after")),
    *_of("answer", ("store.before", "store.inside", "store.after", "end")),
    *_of("conclude", ("commit.inside", "commit.after")),
)
INDEXING = _of("index", ("embed.before", "embed.after", "write.before", "write.inside", "write.after"))
STOPPING = (
    *_of("apply.0", ("reserve.before", "reserve.after", "send.before", "send.after")),
    *_of("apply.0", ("confirm.before", "confirm.after", "verify.before", "end")),
)
STOPPED_BOOKS = (
    "record.verdict.commit.before",
    "record.verdict.commit.after",
    "present.commit.before",
    "present.commit.after",
    "conclude.commit.before",
    "conclude.commit.after",
)


@dataclass(frozen=True, slots=True)
class Row:
    """Boundaries that one kind of run can reach."""

    boundaries: Sequence[str]
    story: Story = Story.PLAIN
    connector: str = NULL
    how: How = How.KILL
    answer: Kind = Kind.APPROVE
    opposite: bool = False

    def cases(self, prefix: str) -> list[Case]:
        """One case per boundary."""
        return [self._case(f"{prefix}{number}", boundary) for number, boundary in enumerate(self.boundaries)]

    def _case(self, key: str, boundary: str) -> Case:
        return Case(
            f"{key}-{self.connector}-{self.how}-{boundary.replace('_', '-')}".replace(".", "-"),
            boundary,
            self.how,
            self.story,
            self.connector,
            self.answer,
            self.opposite,
        )


def _answered(boundaries: Sequence[str], how: How = How.KILL) -> tuple[Row, ...]:
    return tuple(
        Row(boundaries, how=how, answer=answer, opposite=opposite)
        for answer in (Kind.APPROVE, Kind.REJECT)
        for opposite in (False, True)
    )


ROWS = (
    Row(BOOKKEEPING),
    *_answered(VERDICT),
    Row(("conclude.commit.before", "conclude.commit.after"), answer=Kind.REJECT, opposite=True),
    *(Row((*PLANNING, *APPLYING), connector=connector) for connector in (NULL, SITE)),
    Row(SWAPPED, connector=SITE),
    *(Row(LETTER, connector=connector) for connector in (ASKED, BLIND)),
    *(Row(UNDOING, Story.UNDONE, connector) for connector in (NULL, SITE)),
    Row(UNDONE_SWAPPED, Story.UNDONE, SITE),
    Row(DRIFTING, Story.DRIFTED),
    Row(THINKING, Story.WHOLE),
    *(Row(STOPPING, connector=connector, how=How.STOP) for connector in (NULL, SITE, ASKED, BLIND)),
    Row(SWAPPED, connector=SITE, how=How.STOP),
    Row(("undo.0.takeback.before", "undo.0.takeback.after"), Story.UNDONE, how=How.STOP),
    Row(("answer.model.before", "answer.store.before", "answer.store.after"), Story.WHOLE, how=How.STOP),
    *_answered(STOPPED_BOOKS[:2], How.STOP),
    Row(STOPPED_BOOKS[2:], how=How.STOP),
)
"""The full cross product of what can be reached."""


def every_case() -> list[Case]:
    """All of it, in a fixed order."""
    return [case for number, row in enumerate(ROWS) for case in row.cases(f"r{number}-")]


def choose(patterns: Sequence[str], runs: int | None, seed: int) -> list[Case]:
    """Cases whose `connector/how/boundary` fits one of the patterns, in an order the seed decides."""
    wanted = [case for case in every_case() if any(fnmatch.fnmatch(name_of(case), one) for one in patterns)]
    random.Random(seed).shuffle(wanted)
    return wanted[:runs]


def name_of(case: Case) -> str:
    """What patterns are matched against."""
    return f"{case.connector}/{case.how}/{case.boundary}"


def _note(text: str, **more: Any) -> dict[str, Any]:
    arguments = {"text": text} | more
    return {"connector": NULL, "operation": "note", "arguments": arguments, "title": f"Note {text}"}


def _post(slug: str) -> dict[str, Any]:
    date = datetime(2026, 1, 31, tzinfo=UTC).isoformat()
    arguments = {"slug": slug, "title": f"About {slug}", "date": date, "body": f"All about {slug}."}
    return {"connector": SITE, "operation": "publish", "arguments": arguments, "title": f"Publish {slug}"}
