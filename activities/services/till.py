"""What tries cost, and where answers are kept and paid for, each in one transaction."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from activities.services.budget import (
    BEGUN,
    Payment,
    Spent,
    pay_all_in,
    pay_in,
    refuse,
    resume_in,
    tried_in,
)
from activities.services.cache import Key, put_in
from activities.services.calibration import weigh_in
from activities.services.content import put_blob
from activities.services.database import Database
from activities.services.questions import Question
from activities.services.together import together
from models.budget import Account, micros
from models.errors import (
    CredentialsRejected,
    IdentityChanged,
    InvalidInput,
    RateLimited,
)
from models.inference import (
    Answered,
    Completion,
    Grant,
    Prompt,
    attempt_of,
)
from models.loop import Ref
from models.routing import REPAIR_TOKENS, allowance, price
from models.settings import TierSettings


@dataclass(slots=True)
class Try:
    """One activity attempt at one tier: what it may do, and what it did so far."""

    tenant: str
    tier: TierSettings
    question: Question
    grant: Grant
    number: int
    spent: list[Spent] = field(default_factory=list[Spent])

    def note(self, completion: Completion) -> None:
        """An answer came, and this is what it cost."""
        amount, currency = price(self.tier, completion.prompt_tokens, completion.completion_tokens)
        self._add(
            model=completion.model,
            milliseconds=completion.milliseconds,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            micros=None if amount is None else micros(amount),
            currency=currency,
        )

    def failed(self, error: BaseException, prompt: Prompt) -> None:
        """A try without an answer: free if the server never worked on it, else unknown, so at its worst."""
        attempt = attempt_of(error)
        refused = isinstance(error, RateLimited | InvalidInput | CredentialsRejected | IdentityChanged)
        free = refused or (attempt is not None and not attempt.sent)
        self._add(usable=False, micros=0 if free else self._worst(prompt), currency=self.tier.currency)

    def payment(self, settle: bool) -> Payment:
        """What it took."""
        return Payment(self.tenant, self.grant.reservation, self.spent, settle)

    def begun(self) -> Spent:
        """That this attempt had money when it began."""
        return self._spent(self._name(self.number) + BEGUN, micros=0, currency=self.tier.currency)

    def covers(self, again: Prompt) -> bool:
        """Whether the money that is held covers asking again; see `models.routing.allowance`."""
        if self.grant.reservation is None:
            return True
        first = self.question.own
        room = first.context_tokens + (first.answer_tokens or 0) + REPAIR_TOKENS
        return self.question.needs(again).context_tokens <= room

    def unusable(self) -> None:
        """The answers of this try helped nobody."""
        self.spent = [replace(one, usable=False) for one in self.spent]

    def vanished(self, known: Sequence[str]) -> list[Spent]:
        """Earlier tries here that ended with their process: what they took is unknown, so at its worst."""
        reported = {name.rpartition("/")[0] for name in known if not name.endswith(BEGUN)}
        # The first had its money from the router; of the others only those that were given some asked.
        later = (self._name(number) for number in range(2, self.number))
        earlier = [self._name(1), *(name for name in later if name + BEGUN in known)]
        paid = allowance(self.question.own, self.tier)
        return [
            self._spent(f"{name}/0", usable=False, micros=paid, currency=self.tier.currency)
            for name in earlier
            if name not in reported
        ]

    def _worst(self, prompt: Prompt) -> int | None:
        needs = self.question.needs(prompt)
        amount, _ = price(self.tier, needs.context_tokens - prompt.max_tokens, prompt.max_tokens)
        return None if amount is None else micros(amount)

    def _name(self, number: int) -> str:
        return f"{self.grant.reservation}/{self.tier.name}/{number}"

    def _add(self, **more: Any) -> None:
        paid = self.grant.reservation is not None
        name = f"{self._name(self.number)}/{len(self.spent)}" if paid else uuid.uuid4().hex
        self.spent.append(self._spent(name, **more))

    def _spent(self, name: str, **more: Any) -> Spent:
        unknown: dict[str, Any] = {"model": "", "milliseconds": 0, "prompt_tokens": 0, "completion_tokens": 0}
        return Spent(
            id=name,
            tenant=self.tenant,
            tier=self.tier.name,
            task=self.question.task.name,
            reservation=self.grant.reservation,
            **(unknown | more),
        )


@dataclass(frozen=True, slots=True)
class _Kept:
    """An answer that is to be kept and paid for."""

    tried: Try
    answered: Callable[[Ref], Answered]
    text: str
    cache: tuple[Key, int] | None

    def put(self, link: Connection) -> Answered:
        """Store its text."""
        question, text = self.tried.question, self.text.encode()
        ref = put_blob(link, self.tried.tenant, text, question.media_type, question.call.subject)
        return self.answered(ref)

    def note(self, link: Connection, made: Answered, now: datetime) -> None:
        """Remember it for the calibration and for identical calls, where it is wanted there."""
        task, weigh = self.tried.question.task.name, self.tried.grant.weigh
        if weigh is not None:
            weigh_in(link, self.tried.tenant, weigh, task, made, now)
        if self.cache is not None:
            key, seconds = self.cache
            put_in(link, key, made, task, now + timedelta(seconds=seconds))


class Till:
    """Where answers are kept and paid for, each in one transaction."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        """The clock says when a call was made."""
        self._database = database
        self._clock = clock

    async def keep(
        self, tried: Try, answered: Callable[[Ref], Answered], text: str, cache: tuple[Key, int] | None
    ) -> Answered:
        """Store the text, note and settle what it took, and keep it for identical calls."""
        return await self._database.write(together(self._keep, _Kept(tried, answered, text, cache)))

    def _keep(self, link: Connection, kept: Sequence[_Kept]) -> list[Answered]:
        made = [one.put(link) for one in kept]
        now = self._clock()
        # Where the next tier is asked too, it is paid from the same money.
        paid = [one.tried.payment(settle=not its.unsure) for one, its in zip(kept, made, strict=True)]
        pay_all_in(link, paid, now)
        for one, its in zip(kept, made, strict=True):
            one.note(link, its, now)
        return made

    async def resume(self, tried: Try) -> None:
        """Count what earlier attempts took that died with their process, and see that there is money left.

        Raises:
            BudgetExceeded: there is not.
        """
        tenant, reservation = tried.tenant, tried.grant.reservation
        if reservation is None or tried.number == 1:
            return
        needed = allowance(tried.question.own, tried.tier) or 0

        def work(link: Connection) -> Account | None:
            gone = tried.vanished(tried_in(link, tenant, reservation))
            pay_in(link, tenant, reservation, gone, self._clock(), settle=False)
            short = resume_in(link, tenant, reservation, needed, self._clock())
            if short is None:
                pay_in(link, tenant, reservation, [tried.begun()], self._clock(), settle=False)
            return short

        short = await self._database.write(work)
        if short is not None:
            raise refuse(short, needed)

    async def settle(self, tenant: str, reservation: str) -> None:
        """Give back what a reservation holds beyond what was spent."""
        await self._database.write(
            lambda link: pay_in(link, tenant, reservation, (), self._clock(), settle=True)
        )

    async def pay(self, tried: Try, settle: bool) -> None:
        """Note what a call took that gave no new answer."""
        if tried.spent or (settle and tried.grant.reservation is not None):
            await self._database.write(lambda link: self._pay(link, tried, settle))

    def _pay(self, link: Connection, tried: Try, settle: bool) -> None:
        pay_all_in(link, [tried.payment(settle)], self._clock())
