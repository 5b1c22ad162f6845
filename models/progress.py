"""What the events of a run amount to. Pure: the workflow is where its stream says, never beyond it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from models.gate import Kind, Standing, Verdict, closes_at, standing
from models.ledger import Entry, EventType
from models.loop import BreakGlass, Intent, Outcome, Receipt, Ref
from models.notices import INBOX


@dataclass(slots=True)
class Progress:
    """A run so far; `version` is the last event's position in the run's stream."""

    version: int = 0
    intents: int = 0
    digest: str | None = None
    """The intent that is open or was passed; `None` when a new one is needed."""
    last_digest: str | None = None
    delivered_at: datetime | None = None
    """To the inbox."""
    deliveries: dict[str, datetime] = field(default_factory=dict[str, datetime])
    """The first one on each channel."""
    notices: set[tuple[int, str]] = field(default_factory=set[tuple[int, str]])
    """Rounds and channels that are settled, delivered or not."""
    reminded_at: datetime | None = None
    reminders: int = 0
    verdicts: list[Verdict] = field(default_factory=list[Verdict])
    automatic: bool = False
    expired: bool = False
    feedback: list[Ref] = field(default_factory=list[Ref])
    proposal: Ref | None = None
    """Stands until a person wants it revised, or what it rests on has changed."""
    rethought: str = ""
    """What had changed, if that is why there is no proposal; people are shown it with the next one."""
    kept: list[Receipt] = field(default_factory=list[Receipt])
    """Applied under an earlier intent and kept."""
    skips: tuple[int, ...] = ()
    """Positions in the proposal that need no doing any more, because what stands there was kept."""
    undoing: tuple[int, ...] = ()
    """Actions of the open intent that are to be taken back."""
    undo_reason: str = ""
    outcome: Outcome | None = None
    broken: list[Verdict] = field(default_factory=list[Verdict])
    """Answers that went ahead without the others."""
    broken_at: datetime | None = None
    reviews: list[Verdict] = field(default_factory=list[Verdict])
    """What others thought of that."""
    alarms: int = 0
    """That the review is late."""
    _actions: list[Any] = field(default_factory=list[Any])

    def take(self, entries: Iterable[Entry]) -> None:
        """Move on by events that stand in the stream."""
        for entry in entries:
            self._take(entry)
            self.version = entry.version

    def stands(self, intent: Intent) -> Standing:
        """What the gate says of the open intent."""
        if self.expired:
            return Standing.EXPIRED
        return standing(intent, self.verdicts)

    def closes_at(self, intent: Intent) -> datetime:
        """When waiting ends."""
        counts = (at for name, at in self.deliveries.items() if name in intent.gate.channels)
        return closes_at(intent, min(counts, default=None))

    def reviewing(self, glass: BreakGlass) -> bool:
        """Whether somebody broke the glass, and others have yet to say enough about it."""
        if not self.broken or any(one.kind is Kind.REJECT for one in self.reviews):
            return False
        return len(self.reviews) < glass.reviewers

    def _take(self, entry: Entry) -> None:
        body = entry.body
        match entry.type:
            case EventType.PROPOSAL:
                self._propose(body)
            case EventType.INTENT:
                self._open(str(body["digest"]), int(body["number"]))
            case EventType.DELIVERY | EventType.NOTICE_FAILED:
                self._notice(entry.type, body)
            case EventType.REMINDER:
                self._remind(body)
            case EventType.VERDICT:
                self._count(Verdict.model_validate(body), entry.recorded_at)
            case EventType.GATE:
                self.automatic = body["standing"] == Standing.PASSED
                self.expired = body["standing"] == Standing.EXPIRED
            case EventType.DRIFT:
                self._drift(body)
            case _:
                self._end(entry)

    def _end(self, entry: Entry) -> None:
        match entry.type:
            case EventType.COMPENSATION:
                self.undoing = tuple(entry.body["actions"])
                self.undo_reason = str(entry.body["reason"])
            case EventType.OUTCOME:
                self.outcome = Outcome.model_validate(entry.body)
            case EventType.REVIEW:
                self.reviews.append(Verdict.model_validate(entry.body))
            case _:
                pass

    def _remind(self, body: dict[str, Any]) -> None:
        if "alarm" in body:
            self.alarms = int(body["alarm"])
            return
        self.reminders += 1
        self.reminded_at = datetime.fromisoformat(body["at"]) if "at" in body else None

    def _notice(self, kind: EventType, body: dict[str, Any]) -> None:
        channel = str(body.get("channel", INBOX))
        if channel != INBOX:
            self.notices.add((int(body["round"]), channel))
        if kind is EventType.DELIVERY:
            self.deliveries.setdefault(channel, datetime.fromisoformat(body["at"]))
            self.delivered_at = self.deliveries.get(INBOX)

    def _drift(self, body: dict[str, Any]) -> None:
        self.digest = None
        if body.get("rethink"):
            self.proposal, self.rethought = None, str(body["reason"])
        self._keep([Receipt.model_validate(one) for one in body["kept"]])

    def _open(self, digest: str, number: int) -> None:
        self.digest = self.last_digest = digest
        self.intents = number
        self.delivered_at, self.reminders, self.verdicts = None, 0, []
        self.deliveries, self.notices, self.reminded_at = {}, set(), None
        self.automatic = self.expired = False
        self.undoing, self.undo_reason, self.rethought = (), "", ""

    def _propose(self, body: dict[str, Any]) -> None:
        self.proposal = Ref.model_validate(body["proposal"])
        actions = list(body.get("actions", ()))
        # A revised proposal may put other actions where the kept ones stood.
        self.skips = tuple(n for n in self.skips if actions[n : n + 1] == self._actions[n : n + 1])
        self._actions = actions

    def _keep(self, receipts: list[Receipt]) -> None:
        self.kept += receipts
        self.skips = tuple(sorted({*self.skips, *(receipt.action for receipt in receipts)}))

    def _count(self, verdict: Verdict, at: datetime) -> None:
        if verdict.digest != self.last_digest:
            return
        if verdict.break_glass:
            self.broken.append(verdict)
            self.broken_at = at
        self.verdicts.append(verdict)
        if verdict.kind is Kind.REVISE:
            self.digest = self.proposal = None
            if verdict.comment is not None:
                self.feedback.append(verdict.comment)
