"""A target that is a book: it answers well, badly, late or not at all, within what it promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from activities.connectors.base import Applied, Dry, Work
from models.errors import ConnectorRejected, ConnectorUnavailable, PreconditionLost
from models.loop import Guarantee
from scripts.chaos.explorer import Stage

SETTLE = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request at, or on its way to, the target."""

    key: str
    expected: str
    latest: datetime
    """It arrives by then or never, and by then whoever looks for it sees it."""
    undoes: str = ""


@dataclass(slots=True)
class Target:
    """A book of what was done, and how it answers."""

    stage: Stage
    guarantee: Guarantee
    version: str
    careful: bool = True
    """It looks at the clock before it sends; who has a clock of their own stops it otherwise."""
    name: str = "null"
    settle: timedelta = SETTLE
    book: list[Sent] = field(default_factory=list[Sent])
    coming: list[Sent] = field(default_factory=list[Sent])
    calls: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    forced: str = ""
    """How it answers whoever is no caller, if not well."""
    allowed: Callable[[str], str | None] = lambda key: None
    """Why nothing may begin under a key now."""

    async def plan(self, work: Work) -> Dry:
        """Everything is planned before a run."""
        raise LookupError("nothing is planned here")

    async def find(self, key: str, work: Work) -> Applied | None:
        """What the book says, or not yet."""
        await self.stage.stop("finds")
        if self.guarantee is Guarantee.BLIND:
            raise ConnectorUnavailable("nobody can be asked")
        there = next((one for one in self.book if one.key == key), None)
        early = there is not None and self.stage.clock() <= there.latest
        answer = self.stage.choose("sees", *(["not yet"] if early else []), "away")
        if answer == "away":
            raise ConnectorUnavailable("the target is away")
        return None if there is None or answer == "not yet" else self._says(there)

    async def apply(self, key: str, work: Work, expected: str, deadline: datetime) -> Applied:
        """Do it, and answer or not."""
        return await self._take(Sent(key, expected, deadline + self.settle), deadline)

    async def undo(self, key: str, work: Work, applied: Applied, deadline: datetime) -> Applied:
        """Take it back, and answer or not."""
        return await self._take(
            Sent(key, applied.version, deadline + self.settle, applied.reference), deadline
        )

    async def verify(self, work: Work, applied: Applied) -> Applied:
        """A reader sees it, or not yet."""
        await self.stage.stop("verifies")
        if self.stage.choose("seen", "unseen") == "unseen":
            raise ConnectorUnavailable("not seen yet")
        return applied

    async def _take(self, sent: Sent, deadline: datetime) -> Applied:
        await self.stage.stop("sends")
        if self.careful and self.stage.clock() >= deadline:
            raise ConnectorUnavailable("the deadline has passed")
        self.calls[sent.key] += 1
        answer = self.forced or self.stage.choose("answers", "is lost", "comes late", "is away", "refuses")
        if answer == "is away":
            raise ConnectorUnavailable("the target is away")
        if answer == "refuses":
            raise ConnectorRejected("the target refuses")
        if (why := self.allowed(sent.key)) is not None:
            self.wrong.append(f"something was begun under a key {why}")
        if answer == "comes late":
            self.coming.append(sent)
            raise ConnectorUnavailable("no answer yet")
        stands = self._lands(sent)
        if answer == "is lost":
            raise ConnectorUnavailable("the answer was lost")
        return stands

    def _lands(self, sent: Sent) -> Applied:
        there = next((one for one in self.book if one.key == sent.key), None)
        if there is not None and self.guarantee is Guarantee.KEYED:
            return self._says(there)
        if sent.undoes and sent.expected != self.version:
            raise ConnectorRejected("it has changed since; take it back by hand")
        if sent.expected != self.version:
            raise PreconditionLost("it has changed since")
        self.book.append(sent)
        return self._says(sent)

    def _says(self, sent: Sent) -> Applied:
        return Applied(sent.key, sent.expected)

    def drifts(self) -> None:
        """Somebody changes it, or changes it back."""
        self.version = self.version.removesuffix("'") if self.version.endswith("'") else f"{self.version}'"

    def arrives(self, sent: Sent) -> None:
        """A request that was under way is there, if it is in time."""
        self.coming.remove(sent)
        if self.stage.clock() <= sent.latest:
            try:
                self._lands(sent)
            except ConnectorRejected:
                return

    def state(self) -> object:
        """All of it, as a value."""
        return (self.version, tuple(self.book), tuple(self.coming), tuple(self.calls.items()))
