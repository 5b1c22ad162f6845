"""Asks one tier one question and lets only a checked answer out.

The choice of tiers is `models.routing`; here its hard constraints are applied once more, because the caller's
word that a tier may see the data is not enough. Retries nothing and falls back to nothing by itself. An
answer, what it cost, and the end of the reservation that paid for it are one transaction.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Protocol

from activities.services.admission import Admission
from activities.services.breaker import Breaker, Breakers, Pass, Sign, sign_of_error
from activities.services.cache import Cache, Key, Scope, key_of
from activities.services.model_calls import ModelCalls
from activities.services.questions import (
    Examined,
    Question,
    as_sent,
    best_of,
    for_the_record,
    permit,
    refusal,
    repair,
    retold,
    veiled,
)
from activities.services.till import Till, Try
from activities.tiers.base import Endpoint
from models.calibration import confidence
from models.canonical import digest_of, sha256
from models.cascade import unsure
from models.errors import (
    CountersignError,
    CredentialsRejected,
    DeadlineMissed,
    Final,
    IdentityChanged,
    InvalidInput,
    OutputInvalid,
    TierUnavailable,
    UnknownName,
)
from models.inference import (
    Answered,
    Call,
    Completion,
    Grant,
    Message,
    Prompt,
    Task,
)
from models.loop import Cost, Ref
from models.routing import RoutePolicy, needs_of, price
from models.settings import AS_IT_IS, TaskSettings, TierSettings

PROBE = Prompt(messages=(Message(role="user", content="Say yes."),), max_tokens=1, temperature=0)


class Contents(Protocol):
    """Where texts are kept."""

    async def text(self, tenant: str, ref: Ref) -> str:
        """The text behind a reference."""
        ...

    async def put(self, tenant: str, data: bytes, media_type: str = ..., subject: str | None = ...) -> Ref:
        """Keep bytes and name them."""
        ...


class Alike(Protocol):
    """What answers calls with what similar ones got; `services.similar.Similar` does."""

    async def answer(self, tried: Try, scope: Scope, make: Callable[[], Awaitable[Answered]]) -> Answered:
        """An answer, from there or made."""
        ...

    async def record(self, tried: Try, answered: Answered) -> None:
        """Put on record why it was given, if it is from there."""
        ...


class Answerer:
    """The tiers of this process: each with its door, its breakers, and one answer for identical calls."""

    def __init__(
        self,
        tiers: Sequence[TierSettings],
        endpoints: Mapping[str, Endpoint],
        tasks: Mapping[str, Task],
        contents: Contents,
        *,
        till: Till | None = None,
        cache: Cache | None = None,
        similar: Alike | None = None,
        breakers: Breakers | None = None,
        wanted: Mapping[str, TaskSettings] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        ticks: Callable[[], float] = time.monotonic,
        calls: ModelCalls | None = None,
    ) -> None:
        """Take settings and endpoints by tier name, tasks by name, and the content store.

        Without a till answers are stored and nothing is booked; without a cache every call is made.
        """
        self._tiers = {tier.name: tier for tier in tiers if tier.name in endpoints}
        self._endpoints = endpoints
        self._tasks = tasks
        self._contents = contents
        self._till = till
        self._cache = cache
        self._similar = similar
        self._breakers = breakers or Breakers(ticks, random.random)
        self._wanted = wanted or {}
        self._calls = calls or ModelCalls()
        self._making = set[str | None]()
        """Reservations that a call is being made with."""
        self._clock = clock
        self._doors = {tier.name: Admission(tier.concurrency, ticks) for tier in tiers}
        self._models = {tier.name: tier.model for tier in tiers}
        self._policy = digest_of(RoutePolicy.of(tiers).stored())

    async def answer(
        self, tenant: str, call: Call, tier: str, grant: Grant | None = None, attempt: int = 1
    ) -> Answered:
        """Build the prompt, ask, check, ask once more if need be, and store the answer.

        Args:
            tenant: whose texts and money.
            call: what is asked.
            tier: where.
            grant: money held for it and its deadline, as the router said.
            attempt: which attempt of its activity this is, so that lost ones are paid for too.

        Raises:
            UnknownName: no such tier or task here.
            PolicyDenied: the tier may not take this call, whatever the caller says.
            DeadlineMissed: nobody waits for the answer any more.
            TierUnavailable: the tier failed, or its breaker is open.
            OutputInvalid: the answer breaks its schema even after one repair.
        """
        grant = grant or Grant()
        settings = self._tier(tier)
        if grant.deadline is None:
            return await self._answered(tenant, call, settings, grant, attempt)
        async with self._in_time(tenant, call, grant, grant.deadline):
            return await self._answered(tenant, call, settings, grant, attempt)

    async def _answered(
        self, tenant: str, call: Call, tier: TierSettings, grant: Grant, attempt: int
    ) -> Answered:
        question = await self._question(tenant, call)
        tried = Try(tenant, tier, question, grant, attempt)
        try:
            permit(tier, question, question.prompt)
            if self._till is not None:
                await self._till.resume(tried)
            return await self._shared(tried)
        except BaseException as error:
            if _is_last_word(error):
                await self._book(tried, settle=True)
            raise

    @asynccontextmanager
    async def _in_time(
        self, tenant: str, call: Call, grant: Grant, deadline: datetime
    ) -> AsyncGenerator[None]:
        left = (deadline - self._clock()).total_seconds()
        if left <= 0:
            await self._end(tenant, grant)
            raise DeadlineMissed(f"{call.task}: its deadline has passed; ask again with more time")
        limit = asyncio.timeout(left)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            await self._end(tenant, grant)
            raise DeadlineMissed(
                f"{call.task}: no answer within the time somebody waits for it; allow more, or let it queue"
            ) from None

    def _tier(self, name: str) -> TierSettings:
        if name not in self._tiers:
            known = ", ".join(self._tiers) or "none"
            raise UnknownName(f"tier: {name!r} is not served here; known: {known}")
        return self._tiers[name]

    async def _question(self, tenant: str, call: Call) -> Question:
        task = self._tasks.get(call.task)
        if task is None:
            raise UnknownName(f"task: {call.task!r} is unknown; known: {', '.join(sorted(self._tasks))}")
        inputs = {name: await self._contents.text(tenant, ref) for name, ref in call.inputs.items()}
        prompt = task.build(inputs, call.params)
        if task.structured and prompt.answer_schema is None:
            raise InvalidInput.field(
                "answer_schema", None, f"{task.name} is structured; build it with a schema"
            )
        wanted = self._wanted.get(task.name, AS_IT_IS)
        seconds = task.cache_seconds if wanted.cache_seconds is None else wanted.cache_seconds
        needs = needs_of(task, call, prompt, inputs, wanted)
        return Question(task, call, inputs, prompt, needs, seconds)

    async def _shared(self, tried: Try) -> Answered:
        """From the cache, from an identical call under way, or from the tier."""
        key = self._key(tried, self._models[tried.tier.name])
        if self._cache is None or key is None:
            return await self._made(tried)
        cache = self._cache

        async def made() -> Answered:
            # Looked up while others wait: what one of them had found missing, another may have made since.
            # The name is taken anew, for the model may have said who it is by now.
            model = self._models[tried.tier.name]
            kept = await cache.get(self._key(tried, model) or key)
            if kept is not None or self._similar is None:
                return kept or await self._made(tried)
            return await self._similar.answer(tried, self._scope(tried, model), lambda: self._made(tried))

        answered = await cache.once(key, made)
        if not answered.cached:
            return answered
        if self._similar is not None:
            await self._similar.record(tried, answered)
        await self._book(tried, settle=not answered.unsure)
        return answered.model_copy(update={"cost": _nothing(tried.tier)})

    def _key(self, tried: Try, model: str) -> Key | None:
        question = tried.question
        if self._cache is None or question.cache_seconds == 0:
            return None
        return key_of(self._scope(tried, model), question.prompt)

    def _scope(self, tried: Try, model: str) -> Scope:
        question = tried.question
        return Scope(
            tenant=tried.tenant,
            data_class=question.own.data_class,
            region=question.own.region,
            policy=self._policy,
            tier=tried.tier.name,
            model=model,
            task=question.task.name,
            subject=question.call.subject,
        )

    async def _made(self, tried: Try) -> Answered:
        """Ask the tier, and note what it took however it ends."""
        self._making.add(tried.grant.reservation)
        try:
            return await self._kept(tried)
        except BaseException:
            # Past its deadline nobody asks again with this money.
            deadline = tried.grant.deadline
            await self._book(tried, settle=deadline is not None and self._clock() >= deadline)
            raise
        finally:
            self._making.discard(tried.grant.reservation)

    async def _kept(self, tried: Try) -> Answered:
        tier, question = tried.tier, tried.question
        answers = await self._asked(tried)
        best = best_of(answers)
        if not best.usable:
            tried.unusable()
            broken = "; ".join(map(for_the_record, best.objections))
            raise OutputInvalid(
                f"{question.task.name} on {tier.name}: the answer breaks its schema after "
                f"{len(answers) - 1} repair ({broken}); try another tier"
            )

        sure = confidence(best.completion.chances, question.schema is not None)
        doubted = unsure(tried.grant.bar, tier.name, best.completion.model, sure)

        def answered(ref: Ref) -> Answered:
            return Answered(
                text=ref,
                tier=tier.name,
                model=best.completion.model,
                problems=best.objections,
                repaired=best is not answers[0],
                cost=cost_of(tier, [answer.completion for answer in answers]),
                confidence=sure,
                unsure=doubted,
            )

        if self._till is None:
            subject = question.call.subject
            ref = await self._contents.put(tried.tenant, best.text.encode(), question.media_type, subject)
            return answered(ref)
        key = self._key(tried, best.completion.model) if not best.objections and not doubted else None
        kept = None if key is None else (key, question.cache_seconds)
        return await self._till.keep(tried, answered, best.text, kept)

    async def _asked(self, tried: Try) -> list[Examined]:
        tier = tried.tier.name
        breaker = self._breakers.of(tier, self._models[tier], tried.question.mode)
        schemas = self._schemas(tried)
        await self._pass(tier, breaker)
        judging = schemas is not None and _judged(tier, schemas)
        door = self._doors[tier]
        door.share = breaker.share
        try:
            async with door.entered():
                answers = await self._ask(tried, breaker)
        except BaseException:
            if schemas is not None and judging:
                schemas.abandoned()
            raise
        # The first answer may have told us which model this is, and that has a breaker of its own.
        after = schemas if judging else self._schemas(tried)
        if after is not None:
            _judge(after, best_of(answers).usable, judging)
        return answers

    def _schemas(self, tried: Try) -> Breaker | None:
        """The breaker of structured output: this schema, on this tier, with this model."""
        schema, tier = tried.question.schema, tried.tier.name
        if schema is None:
            return None
        # By its name, for it may hold what the call is about, which is to be gone with the call.
        named = sha256(json.dumps(schema, sort_keys=True).encode())
        return self._breakers.of(f"schema of {tier}", self._models[tier], named)

    async def _pass(self, tier: str, breaker: Breaker) -> None:
        match breaker.ask():
            case Pass.GO:
                return
            case Pass.STOP:
                raise TierUnavailable(f"{tier}: its breaker is open after failures; try another tier")
            case Pass.PROBE:
                await self._probe(tier, breaker)

    async def _probe(self, tier: str, breaker: Breaker) -> None:
        """Generate one token; a health page that says yes is not enough."""
        try:
            await self._endpoints[tier].complete(PROBE)
        except CountersignError as error:
            # Back-pressure means that the server works; so does a refusal of this very prompt.
            alive = sign_of_error(error) not in (Sign.FAULT, Sign.UNREACHED)
            breaker.probed(alive)
            if not alive:
                raise
        except BaseException:
            breaker.abandoned()
            raise
        else:
            breaker.probed(alive=True)

    async def _ask(self, tried: Try, breaker: Breaker) -> list[Examined]:
        question = tried.question
        first = question.examine(await self._complete(tried, breaker, question.prompt))
        if not first.objections:
            return [first]
        for again in (repair(question.prompt, first), retold(question.prompt, first)):
            sent, _ = as_sent(question, tried.tier, again)
            if refusal(tried.tier, question, sent) is None and tried.covers(sent):
                return [first, question.examine(await self._complete(tried, breaker, again))]
        return [first]

    async def _complete(self, tried: Try, breaker: Breaker, prompt: Prompt) -> Completion:
        tier = tried.tier.name
        door = self._doors[tier]
        if tried.grant.deadline is not None and self._clock() >= tried.grant.deadline:
            raise DeadlineMissed(f"{tried.question.task.name}: its deadline has passed; allow more time")
        if tried.grant.weigh is not None and tier not in tried.grant.silent:
            prompt = prompt.model_copy(update={"logprobs": True})
        try:
            # A server's prefix cache must not tell one tenant what another one asks.
            own = prompt.model_copy(update={"cache_group": tried.tenant})
            with self._calls.made(tried.tier, tried.question.task.name) as answered:
                completion = await veiled(tried.question, tried.tier, own, self._endpoints[tier].complete)
                answered(completion)
        except BaseException as error:
            sign = sign_of_error(error)
            breaker.saw(sign)
            if sign is Sign.PRESSURE:
                door.pressed()
            tried.failed(error, prompt)
            raise
        breaker.saw(Sign.GOOD)
        door.share = breaker.share
        door.good()
        self._models[tier] = completion.model
        if self._till is not None:
            tried.note(completion)
        return completion

    async def _end(self, tenant: str, grant: Grant) -> None:
        # Where others still wait for what was asked with this money, the end of that call settles it.
        if self._till is not None and grant.reservation is not None and grant.reservation not in self._making:
            await self._till.settle(tenant, grant.reservation)

    async def _book(self, tried: Try, settle: bool) -> None:
        if self._till is not None:
            await self._till.pay(tried, settle)


def cost_of(tier: TierSettings, completions: Sequence[Completion]) -> Cost:
    """What the calls took together; the amount is unknown unless the tier has prices."""
    asked = sum(completion.prompt_tokens for completion in completions)
    answered = sum(completion.completion_tokens for completion in completions)
    amount, currency = price(tier, asked, answered)
    return Cost(
        amount=amount,
        currency=currency,
        milliseconds=sum(completion.milliseconds for completion in completions),
        tokens=asked + answered,
    )


def _nothing(tier: TierSettings) -> Cost:
    """What an answer costs that was there already; in no currency where the tier has none."""
    amount = "0" if tier.currency is not None else None
    return Cost(amount=amount, currency=tier.currency, milliseconds=0, tokens=0)


def _is_last_word(error: BaseException) -> bool:
    """Whether nobody will try again after this error, so that its money can be settled."""
    return isinstance(error, Final) and not isinstance(
        error, OutputInvalid | CredentialsRejected | IdentityChanged
    )


def _judged(tier: str, schemas: Breaker) -> bool:
    """Whether this call is the one that tries out a schema that failed; refuse it while it must not."""
    match schemas.ask():
        case Pass.GO:
            return False
        case Pass.PROBE:
            return True
        case Pass.STOP:
            raise OutputInvalid(f"{tier}: it broke this schema several times in a row; try another tier")


def _judge(schemas: Breaker, kept: bool, judging: bool) -> None:
    if judging:
        schemas.probed(kept)
    else:
        # In a row is what counts for a schema, as it does for connections.
        schemas.saw(Sign.GOOD if kept else Sign.UNREACHED)
