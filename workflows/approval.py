"""Waiting for people: messages are judged and recorded as they come, and the clock runs from delivery."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow

from activities.approvals import Approvals
from activities.notices import Reminders
from models.gate import (
    ANYBODY,
    Answer,
    Identity,
    Judged,
    Kind,
    Refusal,
    Standing,
    Verdict,
    closes_at,
    is_automatic,
    judge,
    read_message,
    recorded,
)
from models.ledger import Entry, EventType
from models.loop import Intent
from models.notices import INBOX, Due, heard_by
from models.orders import Identification
from workflows.journal import Journal
from workflows.notices import Crier
from workflows.policies import book
from workflows.review import Review

SAID_ONCE = "said once"
"""Runs from before log a message again whose task was lost."""
REMINDED_ONCE = "reminded once"
"""Runs from before make up for every reminder that fell due while no worker was there."""
IN_LINE = "messages in line"
"""Runs from before log each message of a flood by itself."""
LONG_ANYHOW = "long anyhow"
"""Runs from before stay in one history whatever comes one by one, until Temporal ends them for its length."""
CROWD, BATCH = 20, 100
"""With more messages than that under way they stand in line; so many are judged at once."""
CLOSED = Judged(counted=False, state="closed", field="input", remedy="this run was not admitted")


@dataclass(slots=True)
class _Waiting:
    """A message in line."""

    kind: Kind
    payloads: Sequence[Any]
    ruling: Verdict | Refusal | None = None


class Approval:
    """The gate of one run."""

    def __init__(self, journal: Journal) -> None:
        """All state is the journal's."""
        self._journal = journal
        self.review = Review(journal, self.measure)
        self.is_long = False
        """So much was sent that the run should go on in a new history."""
        self._closed = False
        self._taking = 0
        self._line: list[_Waiting] = []
        self._due: tuple[tuple[str, int], datetime] | None = None
        """The next reminder by business hours, as it was found out."""

    def close(self) -> None:
        """The run could not be opened; nothing can be judged any more."""
        self._closed = True

    async def take(self, kind: Kind, payloads: Sequence[Any]) -> Judged:
        """Judge one message and record it, whatever it was."""
        self._taking += 1
        try:
            in_line = self._taking > CROWD and workflow.patched(IN_LINE)
            judged = await (self._take_in_line if in_line else self._take_alone)(kind, payloads)
        finally:
            self._taking -= 1
        self.measure()
        return judged

    def measure(self) -> None:
        """Find out whether so much has come of messages and reminders that the run should go on anew."""
        if workflow.info().is_continue_as_new_suggested() and workflow.patched(LONG_ANYHOW):
            self.is_long = self.review.is_long = True

    async def _take_in_line(self, kind: Kind, payloads: Sequence[Any]) -> Judged:
        """One of a flood: whoever has the stream judges a piece of the line and logs what is refused at once.

        Until then a message costs next to nothing: thousands may come in one task of the run, which Temporal
        takes away after two seconds.
        """
        one = _Waiting(kind, payloads)
        self._line.append(one)
        self._journal.keeps_found = True
        if not (self._journal.is_open or self._closed):
            await workflow.wait_condition(lambda: self._journal.is_open or self._closed)
        if self._closed:
            return CLOSED
        async with self._journal.writing():
            while one.ruling is None:
                await self._serve()
        return self._reply(one.ruling)

    async def _serve(self) -> None:
        """Judge the first of the line inside `writing()`: as many refusals as come, or one that counts."""
        refused = list[tuple[_Waiting, Refusal]]()
        for one in self._line[:BATCH]:
            message = read_message(one.kind, one.payloads)
            identity = ANYBODY if self._is_beside(message) else await self._identity(one.kind, message)
            ruling = self._rule(one.kind, message, identity)
            if self._is_said(ruling):
                one.ruling = ruling
            elif isinstance(ruling, Refusal):
                refused.append((one, ruling))
            elif refused:
                break  # It is judged again, once those before it are logged.
            elif await self._record(ruling, message):
                one.ruling = ruling
                break
            else:
                return
        if refused and await self._refuse_all([ruling for _, ruling in refused], apart=True):
            for one, ruling in refused:
                one.ruling = ruling
        self._line = [one for one in self._line if one.ruling is None]
        self.is_long = workflow.info().is_continue_as_new_suggested()

    def _is_beside(self, message: Answer | Refusal) -> bool:
        """Whether it is refused whoever sent it, so that nobody has to look at a signature."""
        if isinstance(message, Refusal):
            return True
        other = message.digest != self._journal.progress.digest
        return other and not message.review and not self._journal.found

    async def _refuse_all(self, rulings: Sequence[Refusal], apart: bool = False) -> bool:
        events = [(EventType.REFUSAL, ruling.model_dump(mode="json")) for ruling in rulings]
        actors = [("person", one.approver) for one in rulings]
        return await self._journal.append(*events, actors=actors, apart=apart)

    async def _take_alone(self, kind: Kind, payloads: Sequence[Any]) -> Judged:
        message = read_message(kind, payloads)
        await workflow.wait_condition(lambda: self._journal.is_open or self._closed)
        if self._closed:
            return CLOSED
        identity = await self._identity(kind, message)
        async with self._journal.writing():
            while not self._is_said(ruling := self._rule(kind, message, identity)):
                if await self._record(ruling, message):
                    break
        return self._reply(ruling)

    def _rule(self, kind: Kind, message: Answer | Refusal, identity: Identity) -> Verdict | Refusal:
        """What becomes of a message; one that a lost task has logged as counted is not judged by itself."""
        if isinstance(message, Answer) and self._journal.found:
            counted = recorded(kind, message, identity)
            if self._logged(counted) is not None and workflow.patched(SAID_ONCE):
                return counted
        return self._judge(kind, message, identity)

    def _is_said(self, ruling: Verdict | Refusal) -> bool:
        """Whether a lost task of this run has logged this; each that it logged stands for one message."""
        logged = self._logged(ruling)
        if logged is None or not workflow.patched(SAID_ONCE):
            return False
        self._journal.found.remove(logged)
        return True

    def _logged(self, ruling: Verdict | Refusal) -> Entry | None:
        body = ruling.model_dump(mode="json", exclude={"comment"})
        for entry in self._journal.found:
            there = {name: value for name, value in entry.body.items() if name != "comment"}
            if entry.type is _event(ruling) and there == body:
                return entry
        return None

    async def wait(self) -> Standing:
        """Wait until the open intent is decided, or the run is too long to wait in it."""
        journal = self._journal
        intent, digest = journal.intent, journal.progress.digest
        if intent is None or digest is None:
            raise RuntimeError("there is no intent to wait for")
        journal.shown_at = journal.shown_at or journal.progress.delivered_at or workflow.now()
        if is_automatic(intent):
            await self._pass(intent, digest)

        def heard() -> tuple[int, tuple[str, ...]]:
            number = journal.progress.reminders
            return number, heard_by(intent.gate, number)

        crier = Crier(journal, digest, lambda: self._stands(intent, digest) is Standing.WAITING, heard)
        try:
            while (stands := self._stands(intent, digest)) is Standing.WAITING and not self.is_long:
                crier.keep_up()
                await self._wait_once(intent, digest)
        except asyncio.CancelledError:
            crier.stop()
            raise
        crier.stop()
        return stands

    def _stands(self, intent: Intent, digest: str) -> Standing:
        progress = self._journal.progress
        if progress.outcome is not None or progress.last_digest != digest:
            # Another history of this run has gone further; the loop looks again.
            return Standing.REVISED
        return progress.stands(intent)

    async def _wait_once(self, intent: Intent, digest: str) -> None:
        reminds = await self._reminds_at(intent, digest)
        closes, settled = self._closes_at(intent), len(self._journal.progress.notices)
        wakes = closes if reminds is None else min(closes, reminds)
        left = wakes - workflow.now()
        if left > timedelta(0):
            try:
                await workflow.wait_condition(
                    lambda: (
                        self._stands(intent, digest) is not Standing.WAITING
                        or self.is_long
                        or len(self._journal.progress.notices) != settled
                    ),
                    timeout=left,
                    timeout_summary="expiry" if wakes == closes else "reminder",
                )
            except TimeoutError:
                pass
            else:
                return
        await self._tick(intent, digest, closes, reminds)

    async def _tick(self, intent: Intent, digest: str, closes: datetime, reminds: datetime | None) -> None:
        async with self._journal.writing():
            if self._stands(intent, digest) is not Standing.WAITING:
                return
            now = workflow.now()
            if now >= closes:
                body = {"standing": Standing.EXPIRED.value, "digest": digest}
                await self._journal.append((EventType.GATE, body))
            elif reminds is not None and now >= reminds:
                number = self._journal.progress.reminders + 1
                body = {"digest": digest, "number": number}
                if intent.gate.hours is not None or self._counts_anew(intent, now, reminds):
                    body["at"] = now.isoformat()
                await self._journal.append((EventType.REMINDER, body))
        self.measure()

    def _counts_anew(self, intent: Intent, now: datetime, due: datetime) -> bool:
        """Whether the next reminder runs from this one: after a long absence one is enough."""
        every = timedelta(seconds=intent.gate.remind_seconds or 0)
        began = self._journal.progress.reminded_at is not None
        return began or (now - due >= every and workflow.patched(REMINDED_ONCE))

    async def _pass(self, intent: Intent, digest: str) -> None:
        async with self._journal.writing():
            if self._journal.progress.automatic or self._stands(intent, digest) is not Standing.PASSED:
                return
            body = {"standing": Standing.PASSED.value, "digest": digest}
            await self._journal.append((EventType.GATE, body))

    def _closes_at(self, intent: Intent) -> datetime:
        progress = self._journal.progress
        delivered = dict(progress.deliveries)
        delivered.setdefault(INBOX, self._journal.shown_at or workflow.now())
        return closes_at(
            intent, min((delivered[c] for c in intent.gate.channels if c in delivered), default=None)
        )

    async def _reminds_at(self, intent: Intent, digest: str) -> datetime | None:
        rule, shown = intent.gate, self._journal.shown_at
        if rule.remind_seconds is None or shown is None:
            return None
        every, progress = timedelta(seconds=rule.remind_seconds), self._journal.progress
        if rule.hours is None:
            last = progress.reminded_at
            return shown + every * (progress.reminders + 1) if last is None else last + every
        which = (digest, progress.reminders)
        if self._due is None or self._due[0] != which:
            due = Due(at=(progress.reminded_at or shown) + every, hours=rule.hours)
            found = await book(Reminders.remind_at, due, "next reminder by business hours")
            self._due = (which, found.at)
        return self._due[1]

    async def _identity(self, kind: Kind, message: Answer | Refusal) -> Identity:
        admitted = self._journal.admitted
        if isinstance(message, Refusal) or not admitted.people:
            return ANYBODY
        wanted = Identification(tenant=self._journal.request.tenant, kind=kind, answer=message)
        return await book(Approvals.identify, wanted, f"who is {message.approver[:60]}")

    def _judge(self, kind: Kind, message: Answer | Refusal, identity: Identity) -> Verdict | Refusal:
        if isinstance(message, Refusal):
            return message
        journal = self._journal
        progress, intent = journal.progress, journal.intent
        if message.review:
            return self.review.judge(kind, message, identity)
        if progress.outcome is not None:
            return _refuse(kind, message, f"the run has ended as {progress.outcome.status}; nothing is open")
        if progress.expired:
            return _refuse(kind, message, "the intent has expired; start the request again")
        if progress.digest is None or intent is None:
            return _refuse(kind, message, "nothing is waiting for an answer; wait for the next card")
        most = journal.admitted.policy.max_revisions
        if kind is Kind.REVISE and progress.intents > most:
            return _refuse(kind, message, f"it was revised {most} times, as often as policy allows")
        return judge(
            kind,
            message,
            intent,
            progress.digest,
            progress.verdicts,
            self._closes_at(intent),
            workflow.now(),
            identity,
        )

    async def _record(self, ruling: Verdict | Refusal, message: Answer | Refusal) -> bool:
        if isinstance(ruling, Refusal):
            return await self._refuse_all([ruling])
        comment = message.comment if isinstance(message, Answer) else ""
        return await self._journal.append(
            (_event(ruling), ruling.model_dump(mode="json")),
            actors=[("person", ruling.approver)],
            comment=comment,
        )

    def _reply(self, ruling: Verdict | Refusal) -> Judged:
        intent, progress = self._journal.intent, self._journal.progress
        state = progress.stands(intent) if intent is not None else Standing.WAITING
        if isinstance(ruling, Refusal):
            return Judged(
                counted=False, state=state, digest=progress.digest, field=ruling.field, remedy=ruling.remedy
            )
        if ruling.review:
            state = "reviewing" if self.review.is_open else "reviewed"
        return Judged(counted=True, state=state, digest=ruling.digest)


def _event(ruling: Verdict | Refusal) -> EventType:
    if isinstance(ruling, Refusal):
        return EventType.REFUSAL
    return EventType.REVIEW if ruling.review else EventType.VERDICT


def _refuse(kind: Kind, answer: Answer, remedy: str) -> Refusal:
    return Refusal(kind=kind, field="digest", remedy=remedy, approver=answer.approver)
