"""The run's stream as its workflow sees it. What stands there is the state; what was meant is not.

Every append names the version it expects. When something else stands there (an attempt of this run that was
lost, a run that was reset or terminated), the whole stream is read again and the run goes on from that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from temporalio import workflow

from activities.ledger import Ledger
from models.canonical import canonical, digest_of
from models.ledger import Append, Appended, Draft, Entry, EventType, event_id
from models.loop import Intent, Outcome, Proposal, Ref, Request, keyed
from models.memory import Memo
from models.orders import Admission, Admitted, Conclusion, Presentation, Presented
from models.progress import Progress
from workflows.policies import book, book_apart

Event = tuple[EventType, dict[str, Any]]
Actor = tuple[str, str]
"""Kind and name."""


class Journal:
    """One stream, written under a lock, so that judging and recording are one step."""

    def __init__(self, request: Request) -> None:
        """Nothing is known until `open`."""
        info = workflow.info()
        self.request = keyed(request, info.workflow_id)
        self.workflow_id = info.workflow_id
        self.chain = info.first_execution_run_id
        self.progress = Progress()
        self.intent: Intent | None = None
        self.proposal: Proposal | None = None
        self.card = ""
        self.shown_at: datetime | None = None
        """When the inbox accepted the open intent."""
        self.is_open = False
        self.keeps_found = False
        """Whether what was found stays for those behind: of a crowd not everybody comes again in order."""
        self.found: list[Entry] = []
        """What a lost attempt of this run had logged, until it is said again or something else is logged."""
        self._admitted: Admitted | None = None
        self._lock = asyncio.Lock()

    @property
    def admitted(self) -> Admitted:
        """Policy and pace of this run."""
        if self._admitted is None:
            raise RuntimeError("the run has not been admitted yet")
        return self._admitted

    async def open(self) -> Admitted:
        """Claim the request, and go to where its stream says it is."""
        admission = Admission(request=self.request, workflow_id=self.workflow_id, chain=self.chain)
        admitted: Admitted = await book(Ledger.admit, admission, "admit")
        self._admitted = admitted
        asked = admitted.requester or self.request.requester
        self.request = self.request.model_copy(update={"body": admitted.body, "requester": asked})
        self.progress = Progress()
        self.progress.take(admitted.entries)
        self.intent, self.card, self.proposal = admitted.intent, admitted.card, admitted.proposal
        self.is_open = not admitted.refusal and admitted.earlier is None
        return admitted

    @asynccontextmanager
    async def writing(self) -> AsyncGenerator[None]:
        """Hold the stream: what is decided inside rests on what stands."""
        async with self._lock:
            yield

    async def append(
        self, *events: Event, actors: Sequence[Actor] = (), comment: str = "", apart: bool = False
    ) -> bool:
        """Append inside `writing()`. False: other events stand there, and the journal has moved to them.

        `actors` did the last of the events, one each; a comment goes with the last. `apart` ends the task.
        """
        wish = self._append((*self._delivery(), *events), actors, comment)
        step = book_apart if apart else book
        appended: Appended = await step(Ledger.record, wish, f"log {events[-1][0]}")
        return await self._moved(appended.won, appended.entries or self._entries(wish.drafts))

    async def propose(self, proposal: Proposal) -> bool:
        """Log a proposal inside `writing()`; false as for `append`."""
        text = canonical(proposal).decode()
        ref = Ref(digest=digest_of(proposal), size=len(text.encode()), media_type="application/json")
        body = {"proposal": ref.model_dump(mode="json")} | _outline(proposal)
        wish = self._append(((EventType.PROPOSAL, body),)).model_copy(update={"keep": (text,)})
        appended: Appended = await book(Ledger.record, wish, "log proposal")
        if await self._moved(appended.won, self._entries(wish.drafts)):
            self.proposal = proposal
            return True
        return False

    def place(self) -> Append:
        """Where plan and intent go; the store fills their bodies."""
        return self._append(((EventType.PLAN, {}), (EventType.INTENT, {})))

    async def present(self, presentation: Presentation) -> bool:
        """Log plan and intent inside `writing()`; false as for `append`."""
        presented: Presented = await book(Ledger.present, presentation, f"log intent {presentation.number}")
        if not presented.won or presented.digest is None:
            return await self._moved(won=False, entries=())
        version = self.progress.version
        intent = {"digest": presented.digest, "number": presentation.number}
        self.progress.take(
            [self._entry(version + 1, EventType.PLAN, {}), self._entry(version + 2, EventType.INTENT, intent)]
        )
        self.intent, self.card, self.shown_at = presented.intent, presented.card, None
        return True

    async def conclude(self, outcome: Outcome, memos: tuple[Memo, ...]) -> bool:
        """Log the end inside `writing()`; false as for `append`."""
        wish = self._append((*self._delivery(), (EventType.OUTCOME, outcome.model_dump(mode="json"))))
        conclusion = Conclusion(append=wish, request=self.request, outcome=outcome, memos=memos)
        appended: Appended = await book(Ledger.conclude, conclusion, f"log outcome {outcome.status}")
        # What stands may be another outcome than was meant, where the ledger does not bear that out.
        return await self._moved(appended.won, appended.entries or self._entries(wish.drafts))

    def draft(self, kind: EventType, body: dict[str, Any], version: int) -> Draft:
        """An event of this run at a version of its stream."""
        return Draft(
            event_id=event_id(self.request.tenant, self.workflow_id, self.chain, kind, version),
            stream=self.workflow_id,
            type=kind,
            actor_kind="agent",
            actor_ref=self.request.agent,
            correlation_id=self.workflow_id,
            body=body,
        )

    def _append(self, events: Iterable[Event], actors: Sequence[Actor] = (), comment: str = "") -> Append:
        expected = self.progress.version
        drafts = [self.draft(kind, body, expected + n) for n, (kind, body) in enumerate(events, start=1)]
        for place, (kind, ref) in enumerate(actors, len(drafts) - len(actors)):
            drafts[place] = drafts[place].model_copy(update={"actor_kind": kind, "actor_ref": ref})
        return Append(
            tenant=self.request.tenant,
            stream=self.workflow_id,
            expected=expected,
            drafts=tuple(drafts),
            comment=comment,
            subject=self.request.subject,
        )

    def _delivery(self) -> tuple[Event, ...]:
        """That the inbox took the intent is known once a later task runs; it goes before what comes next."""
        if self.shown_at is None or self.progress.digest is None or self.progress.delivered_at is not None:
            return ()
        body = {
            "channel": "inbox",
            "at": self.shown_at.isoformat(),
            "digest": self.progress.digest,
        }
        return ((EventType.DELIVERY, body),)

    async def _moved(self, won: bool, entries: Iterable[Entry]) -> bool:
        if won:
            self.progress.take(entries)
            if not self.keeps_found:
                self.found.clear()
        else:
            workflow.logger.info("other events stand in the stream; going on from those")
            seen = self.progress.version
            await self.open()
            self.found = [entry for entry in self.admitted.entries if entry.version > seen]
        return won

    def _entries(self, drafts: Iterable[Draft]) -> list[Entry]:
        start = self.progress.version
        return [self._entry(start + n, d.type, d.body) for n, d in enumerate(drafts, start=1)]

    def _entry(self, version: int, kind: EventType, body: dict[str, Any]) -> Entry:
        return Entry(version=version, type=kind, body=body, recorded_at=workflow.now())


def _outline(proposal: Proposal) -> dict[str, Any]:
    """What a reader of the ledger sees of a proposal: names and digests, no texts."""
    return {
        "actions": [
            {"connector": one.connector, "operation": one.operation, "arguments": one.arguments.digest}
            for one in proposal.actions
        ],
        "evidence": [one.model_dump(mode="json") for one in proposal.evidence],
        "concerns": len(proposal.concerns),
    }
