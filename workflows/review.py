"""After the glass was broken: others say whether that was right, and an alarm is raised until they have."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from temporalio import workflow

from models.answers import Answer, Identity, Kind, Refusal, Verdict, recorded
from models.gate import unfit
from models.glass import UNSAID, review_fault
from models.ledger import EventType
from models.loop import BreakGlass
from models.notices import FIRST_ROUND, told_of
from workflows.journal import Journal
from workflows.notices import Crier


class Review:
    """What is thought of a run whose glass was broken."""

    def __init__(self, journal: Journal, measure: Callable[[], None]) -> None:
        """All state is the journal's; `measure` finds out whether the history has become long."""
        self._journal = journal
        self._measure = measure
        self.is_long = False

    @property
    def glass(self) -> BreakGlass:
        """Who has to review, and by when."""
        intent = self._journal.intent
        bound = None if intent is None else intent.gate.break_glass
        return bound or self._journal.admitted.policy.gate.break_glass or UNSAID

    @property
    def is_open(self) -> bool:
        """Whether somebody still has to."""
        journal = self._journal
        return journal.is_open and journal.progress.reviewing(self.glass)

    @property
    def digest(self) -> str:
        """The intent that is to be reviewed."""
        return self._journal.progress.broken[-1].digest

    async def wait(self) -> None:
        """Wait until it is reviewed, however long that takes, or the run is too long to wait in it."""
        crier = Crier(self._journal, self.digest, lambda: self.is_open, self._heard_by)
        while self.is_open and not self.is_long:
            crier.keep_up()
            await self._wait_once()
        crier.stop()

    def judge(self, kind: Kind, answer: Answer, identity: Identity) -> Verdict | Refusal:
        """Decide whether an answer counts as a review."""
        fault = self._too_soon() or self._fault(kind, answer, identity)
        if fault is not None:
            return Refusal(kind=kind, field=fault[0], remedy=fault[1], approver=answer.approver)
        return recorded(kind, answer, identity)

    def _too_soon(self) -> tuple[str, str] | None:
        progress = self._journal.progress
        if not progress.broken:
            return "review", "nobody broke the glass here; answer without it"
        if progress.outcome is None:
            return "review", "it is still being carried out; review it once it has ended"
        if not self.is_open:
            return "review", "it has been reviewed; nothing more is needed"
        return None

    def _fault(self, kind: Kind, answer: Answer, identity: Identity) -> tuple[str, str] | None:
        progress, intent = self._journal.progress, self._journal.intent
        if intent is None or answer.digest != self.digest:
            return (
                "digest",
                f"{answer.digest[:12]}… is not what was done; read the card and answer {self.digest}",
            )
        if kind not in (Kind.APPROVE, Kind.REJECT) or answer.break_glass:
            return "review", "approve it if it was right to go ahead, or reject it"
        broke = [one.approver for one in progress.broken]
        return unfit(kind, answer, intent, identity) or review_fault(
            answer, intent, self.glass, broke, progress.reviews
        )

    def _heard_by(self) -> tuple[int, tuple[str, ...]]:
        alarms = self._journal.progress.alarms
        return FIRST_ROUND + alarms, told_of(self.glass, alarms)

    async def _wait_once(self) -> None:
        progress = self._journal.progress
        begun, settled = progress.broken_at or workflow.now(), len(progress.notices)
        within = timedelta(seconds=self.glass.review_seconds)
        left = begun + within * (progress.alarms + 1) - workflow.now()
        if left > timedelta(0):
            try:
                await workflow.wait_condition(
                    lambda: (
                        not self.is_open or self.is_long or len(self._journal.progress.notices) != settled
                    ),
                    timeout=left,
                    timeout_summary="the review is late",
                )
            except TimeoutError:
                pass
            else:
                return
        # After a long absence one alarm is enough.
        await self._alarm((workflow.now() - begun) // within)
        self._measure()

    async def _alarm(self, number: int) -> None:
        async with self._journal.writing():
            if self.is_open and number > self._journal.progress.alarms:
                workflow.logger.warning("the review of a broken glass is late")
                body = {"digest": self.digest, "alarm": number}
                await self._journal.append((EventType.REMINDER, body))
