"""The owner of one subject: a single run that handles its mail in the order in which it came.

The workflow id is the election, continue-as-new the hand-over, and the epoch fences off a run that Temporal
has given up on. That mail counts once is the database's promise: the id of its event is committed with the
change it makes. The answers carried from run to run only spare asking it again, and are few.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from pydantic import ValidationError
from temporalio import workflow
from temporalio.exceptions import ApplicationError

from activities.beliefs import Believing
from models.beliefs import Delivered, Delivery, Handled, Mail, Ownership, Owning
from workflows.policies import book

BATCH = 50
"""Mail handled in one transaction."""
REMEMBERED = 200
"""Answers that go along to the next run: a few tens of kilobytes, however much mail there was."""
BY_SENDER = "belief-mail-by-sender"
"""Since then two agents may use one event id, and repeated mail counts towards the hand-over."""
IDLE = timedelta(hours=24)
"""An owner without mail ends; the next mail starts one."""


@workflow.defn(name="belief")
class BeliefOwner:
    """Handles everything that is to change beliefs about one subject."""

    @workflow.init
    def __init__(self, start: Ownership) -> None:
        """Take over what the run before left."""
        self._start = start
        self._by_sender = workflow.patched(BY_SENDER)
        self._queue = deque(start.waiting)
        self._answered = {self._key(one): one for one in start.answered}
        self._handled, self._refused = start.handled, start.refused
        self._here = 0
        self._epoch = 0

    @workflow.run
    async def run(self, start: Ownership) -> int:
        """Handle mail until there was none for a day; how much there was in all."""
        await self._own()
        while await self._mail_came():
            await self._handle()
            if self._here >= start.hand_over_after or workflow.info().is_continue_as_new_suggested():
                await self._hand_over()
        return self._handled

    @workflow.signal(name="tell", description="Change a belief: {agent, event, sets, removes?, expected?}")
    async def tell(self, *payloads: Any) -> None:
        """Queue mail; what cannot be read is counted and dropped."""
        mail = _read(payloads)
        if isinstance(mail, Mail):
            self._queue.append(mail)
        else:
            self._refused += 1

    @workflow.update(name="settle", description="As signal tell, and says what became of it")
    async def settle(self, *payloads: Any) -> Handled:
        """Queue mail and wait for its turn."""
        mail = _read(payloads)
        if not isinstance(mail, Mail):
            raise ApplicationError(mail, type="InvalidInput", non_retryable=True)
        key = self._key(mail)
        if key not in self._answered:
            self._queue.append(mail)
            await workflow.wait_condition(lambda: key in self._answered)
        return self._answered[key]

    @settle.validator
    def _shape(self, *payloads: Any) -> None:
        mail = _read(payloads)
        if not isinstance(mail, Mail):
            raise ApplicationError(mail, type="InvalidInput", non_retryable=True)

    @workflow.query(name="order", description="What was handled, in order, and what waits")
    def order(self) -> dict[str, Any]:
        """The newest answers, oldest first."""
        return {
            "subject": self._start.subject,
            "handled": self._handled,
            "refused": self._refused,
            "answers": [one.model_dump(mode="json") for one in self._answered.values()],
            "waiting": [mail.event for mail in self._queue],
        }

    async def _mail_came(self) -> bool:
        try:
            await workflow.wait_condition(lambda: bool(self._queue), timeout=IDLE, timeout_summary="idle")
        except TimeoutError:
            return bool(self._queue)
        return True

    async def _own(self) -> None:
        start = self._start
        owning = Owning(tenant=start.tenant, subject=start.subject, holder=workflow.info().run_id)
        self._epoch = await book(Believing.own, owning, "own")

    async def _handle(self) -> None:
        batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
        known = {self._key(mail): mail for mail in batch}
        new = tuple(mail for key, mail in known.items() if key not in self._answered)
        if new:
            for one in (await self._delivered(new)).handled:
                self._answered[self._key(one)] = one
        self._handled += len(new)
        self._here += len(batch) if self._by_sender else len(new)

    async def _delivered(self, mails: tuple[Mail, ...]) -> Delivered:
        start = self._start
        while True:
            delivery = Delivery(tenant=start.tenant, subject=start.subject, epoch=self._epoch, mails=mails)
            delivered: Delivered = await book(Believing.deliver, delivery, f"{len(mails)} changes")
            if not delivered.fenced:
                return delivered
            # A step of a run that is over came late and took the subject; this run is the one that lives.
            await self._own()

    def _key(self, one: Mail | Handled) -> tuple[str, str]:
        return (one.agent if self._by_sender else "", one.event)

    async def _hand_over(self) -> None:
        """Answer whoever waits, then go on as a new run; mail that is only queued goes along."""
        while not workflow.all_handlers_finished():
            await workflow.wait_condition(lambda: bool(self._queue) or workflow.all_handlers_finished())
            await self._handle()
        workflow.continue_as_new(
            self._start.model_copy(
                update={
                    "answered": tuple(self._answered.values())[-REMEMBERED:],
                    "waiting": tuple(self._queue),
                    "handled": self._handled,
                    "refused": self._refused,
                }
            )
        )


def _read(payloads: Sequence[Any]) -> Mail | str:
    """The mail, or why it is none."""
    if len(payloads) != 1 or not isinstance(payloads[0], dict):
        return "input: send one JSON object with agent, event and sets"
    try:
        return Mail.model_validate(payloads[0])
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc']) or 'input'}: {first['msg']}"[:300]
