"""Which tier may take a call, and what it would cost. Pure, so that a recorded choice can be made again.

A hard constraint removes a tier for good: neither preference nor fallback brings it back, and with nothing
left the answer is a refusal, never the cheapest tier.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_UP, Decimal
from typing import Any, Literal

from pydantic import AwareDatetime, Field

from models.budget import Account, lacking, micros
from models.calibration import Odds
from models.canonical import Digest, digest_of
from models.cascade import Rung, Terms, bar_of, is_calibrated, ranks
from models.errors import BudgetExceeded, CountersignError, DeadlineMissed, PolicyDenied
from models.inference import Bar, Call, Candidate, Inputs, Needs, Prompt, Route, Task
from models.loop import Amount, Cost, Frozen, Name
from models.redaction import classes_of
from models.settings import AS_IT_IS, TaskSettings, TierSettings

MOST_TIERS = 2
"""The chosen one and one fallback."""
TRIES = 2
"""How often a tier may be tried for one call; more than `workflows/policies.py` allows would be unpaid."""
REPAIR_TOKENS = 512
"""Room for the objections to an answer, when it is asked for again."""
WITHOUT = (("url", "http://left-out.invalid"), ("token", None), ("cache_salt", None))
MILLION = 1_000_000
SMALLEST_AMOUNT = Decimal("0.00000001")

Prefer = Literal["small", "large"]


class Measured(Frozen):
    """What earlier calls of one task took on one tier, on average; `None` is unknown."""

    calls: int = Field(default=0, ge=0)
    milliseconds: int | None = None
    tokens: int | None = None
    amount: Amount | None = None
    currency: str | None = None
    slow_milliseconds: int | None = None
    """All but one in twenty calls were faster."""
    escalated_permille: int | None = Field(default=None, ge=0, le=1000)
    """How many of a thousand answers could not be used, so that another tier had to be asked."""


class Telemetry(Frozen):
    """What is known of one tier at the moment of a choice; `None` is unknown."""

    model: str | None = None
    measured: Measured = Measured()
    context_tokens: int | None = None
    """As probed; less than the settings say counts."""
    structured: bool | None = None
    logprobs: bool | None = None
    """As probed."""
    held: bool = False
    """Another model than the accepted one answers there."""
    suspended: bool = False
    """Its breaker is open."""
    busy: int | None = None
    room: int | None = None
    """Calls under way, and how many may be."""
    cached: bool = False
    """The answer to this very call is kept there."""
    odds: Odds | None = None
    """How its confidence translates into success at this task, where enough answers were judged."""


class Snapshot(Frozen):
    """All that a choice depends on besides the call and the policy."""

    tiers: dict[Name, Telemetry] = Field(default_factory=dict)
    accounts: tuple[Account, ...] = ()

    def of(self, tier: str) -> Telemetry:
        """What is known of a tier."""
        return self.tiers.get(tier, _NOTHING_KNOWN)

    def digest(self) -> Digest:
        """Its name; a field that a later version adds, left at its default, does not change it."""
        return digest_of(self.model_dump(mode="json", exclude_defaults=True))


class Wish(Frozen):
    """What is to be routed."""

    task: Name
    prefer: Prefer
    needs: Needs
    wrong: int | None = None
    """Millionths that a wrong answer costs; unknown leaves confidence out of the choice."""
    both: bool = False
    """Whatever the first tier answers, the next is asked too, to learn what it is worth."""


class RoutePolicy(Frozen):
    """What the settings say of the tiers, without addresses and secrets; named in each record."""

    tiers: tuple[TierSettings, ...]

    @classmethod
    def of(cls, tiers: Sequence[TierSettings]) -> RoutePolicy:
        """The policy behind settings."""
        return cls(tiers=tuple(tier.model_copy(update=dict(WITHOUT)) for tier in tiers))

    def stored(self) -> dict[str, Any]:
        """As JSON, to be named by its digest; `RoutePolicy.model_validate` reads it back."""
        return self.model_dump(mode="json")


class Decision(Frozen):
    """A route, or why there is none; either way every candidate is in it."""

    route: Route
    refused_as: Literal["PolicyDenied", "BudgetExceeded", "DeadlineMissed"] | None = None
    refusal: str = ""
    holds: int | None = None
    """Millionths to reserve: the worst that the tiers of the route may take together."""
    currency: str | None = None

    def raise_refusal(self) -> None:
        """Raise what was refused.

        Raises:
            PolicyDenied: a hard constraint leaves no tier.
            BudgetExceeded: only a budget stands in the way.
            DeadlineMissed: no tier can be expected to answer in time.
        """
        if self.refused_as is not None:
            raise REFUSALS[self.refused_as](self.refusal)


class RouteRecord(Frozen):
    """The body of a ROUTE event: all that is needed to make the same choice again."""

    route: Route
    needs: Needs
    prefer: Prefer = "small"
    wrong: int | None = None
    both: bool = False
    policy: Digest | None = None
    """Names the `RoutePolicy` in the content store."""
    snapshot: Snapshot = Snapshot()
    snapshot_digest: Digest | None = None
    """`None` in records older than this rule, which cannot be replayed."""
    refused_as: Literal["PolicyDenied", "BudgetExceeded", "DeadlineMissed"] | None = None
    refusal: str = ""
    holds: int | None = None
    currency: str | None = None
    reservation: str | None = None
    deadline: AwareDatetime | None = None

    def decision(self) -> Decision:
        """What was decided."""
        return Decision(
            route=self.route,
            refused_as=self.refused_as,
            refusal=self.refusal,
            holds=self.holds,
            currency=self.currency,
        )


def replayed(record: RouteRecord, policy: RoutePolicy) -> Decision:
    """Make a recorded decision again, from the policy that stood then; compare with `record.decision()`."""
    said = {name: getattr(record, name) for name in ("prefer", "needs", "wrong", "both")}
    return decide(Wish(task=record.route.purpose, **said), policy.tiers, record.snapshot)


_NOTHING_KNOWN = Telemetry()
REFUSALS: Mapping[str, type[CountersignError]] = {
    "PolicyDenied": PolicyDenied,
    "BudgetExceeded": BudgetExceeded,
    "DeadlineMissed": DeadlineMissed,
}


def route(
    task: str,
    needs: Needs,
    tiers: Sequence[TierSettings],
    prefer: Prefer,
    measured: Mapping[str, Measured] | None = None,
) -> Route:
    """Choose a tier and at most one fallback, and say of every other why it lost.

    Args:
        task: what the model is asked, for the record.
        needs: the hard constraints.
        tiers: in the order of the settings, cheap to capable.
        prefer: small starts with the least expected cost, large with the most capable.
        measured: earlier averages by tier.

    Raises:
        PolicyDenied: no tier satisfies the constraints; each one's reason is named.
        DeadlineMissed: none of those that do answers in time.
    """
    known = {name: Telemetry(measured=one) for name, one in (measured or {}).items()}
    decision = decide(Wish(task=task, prefer=prefer, needs=needs), tiers, Snapshot(tiers=known))
    decision.raise_refusal()
    return decision.route


def decide(wish: Wish, tiers: Sequence[TierSettings], snapshot: Snapshot) -> Decision:
    """Choose. A pure function: the same call, policy and snapshot give the same decision for ever."""
    return _Choice(wish, tiers, snapshot).decision()


class _Choice:
    """One decision in the making: each step may only take tiers away or put them in order."""

    def __init__(self, wish: Wish, tiers: Sequence[TierSettings], snapshot: Snapshot) -> None:
        self.wish, self.needs, self.snapshot = wish, wish.needs, snapshot
        self.tiers = {tier.name: tier for tier in tiers}
        self.place = {name: number for number, name in enumerate(self.tiers)}
        self.expected = {
            tier.name: estimate(self.needs, tier, snapshot.of(tier.name).measured) for tier in tiers
        }
        self.lost: dict[str, str | None] = {}
        self.worsts: dict[str, int | None] = {}
        self.queued = self.needs.within_milliseconds is None
        self.by_cost = wish.prefer == "small"

    def decision(self) -> Decision:
        fitting = self._fitting()
        if not fitting:
            return self._refused("PolicyDenied", "add a [[tiers]] block to countersign.toml that may")
        paid = self._paid(fitting)
        if not paid:
            return self._refused("BudgetExceeded", "raise the budget or wait for the next day")
        timely = self._timely(paid)
        if not timely:
            return self._refused("DeadlineMissed", "allow more time, or let it queue (may_queue)")
        return self._chosen(self._ranked(timely))

    def _fitting(self) -> list[str]:
        for name, tier in self.tiers.items():
            self.lost[name] = barred(self.needs, tier, self.snapshot.of(name))
        return [name for name, reason in self.lost.items() if reason is None]

    def _paid(self, fitting: Sequence[str]) -> list[str]:
        for name in fitting:
            tier = self.tiers[name]
            self.lost[name] = lacking(self.snapshot.accounts, self._worst(name), tier.currency)
        return [name for name in fitting if self.lost[name] is None]

    def _worst(self, name: str) -> int | None:
        if name not in self.worsts:
            # Nobody asks for it where there is no budget.
            self.worsts[name] = worst(self.needs, self.tiers[name]) if self.snapshot.accounts else None
        return self.worsts[name]

    def _timely(self, paid: list[str]) -> list[str]:
        if self.needs.within_milliseconds is None:
            return paid
        late = {name: self._late(name, self.needs.within_milliseconds) for name in paid}
        timely = [name for name in paid if late[name] is None]
        if not timely and self.needs.may_queue:
            self.queued = True
            return paid
        self.lost |= late
        return timely

    def _late(self, name: str, within: int) -> str | None:
        predicted = predicted_milliseconds(self.expected[name].milliseconds, self.snapshot.of(name))
        if predicted is None or predicted <= within:
            return None
        return f"it would take {predicted} ms and somebody waits {within}"

    def _ranked(self, names: Sequence[str]) -> list[str]:
        rungs = self._rungs(names) if self.by_cost or self.wish.wrong is not None else []
        self.by_cost = self.by_cost or is_calibrated(rungs, self._terms())
        ordered = sorted(names, key=lambda name: self.place[name], reverse=not self.by_cost)
        if self.by_cost and rungs:
            totals = ranks(rungs, self._terms())
            ordered.sort(key=lambda name: totals[name])
        # Sorting keeps the order among equals; with every tier suspended or full nothing changes.
        ordered.sort(key=self._reluctance)
        return ordered

    def _reluctance(self, name: str) -> tuple[bool, bool, bool]:
        known = self.snapshot.of(name)
        full = known.busy is not None and known.room is not None and known.busy >= known.room
        return not known.cached, known.suspended, full

    def _rungs(self, names: Sequence[str]) -> list[Rung]:
        """The tiers and what each is expected to cost, least capable first; none if one is unknown."""
        rungs = [self._rung(name) for name in sorted(names, key=lambda name: self.place[name])]
        priced = [rung for rung in rungs if rung is not None]
        same = len({self.expected[name].currency for name in names}) == 1
        return priced if same and len(priced) == len(names) else []

    def _rung(self, name: str) -> Rung | None:
        known, expected = self.snapshot.of(name), self.expected[name]
        if expected.amount is None:
            return None
        micros, again = Decimal(expected.amount) * MILLION, known.measured.escalated_permille or 0
        took = predicted_milliseconds(expected.milliseconds, known)
        return Rung(name, micros, known.model, known.odds, again, took, known.logprobs is False)

    def _terms(self) -> Terms:
        within = None if self.queued else self.needs.within_milliseconds
        return Terms(self.wish.wrong, within, self.wish.both)

    def _bar(self, chosen: Sequence[str]) -> Bar | None:
        """From where on the first tier's answer is taken; only one that knows more is asked for another."""
        first, *others = chosen
        if not others or (self.wish.wrong is None and not self.wish.both):
            return None
        if self.place[first] > self.place[others[0]] or self.snapshot.of(others[0]).suspended:
            return None
        rungs = self._rungs(chosen)
        return bar_of(rungs[0], rungs[1], self._terms()) if rungs else None

    def _chosen(self, ranked: Sequence[str]) -> Decision:
        first, *others = ranked
        chosen, holds = [first], self._worst(first)
        for name in sorted(others, key=lambda name: self._second(first, name)):
            both = _sum(holds, self._worst(name))
            lacks = lacking(self.snapshot.accounts, both, self.tiers[name].currency)
            if len(chosen) == MOST_TIERS:
                self.lost[name] = self._passed_over(name, chosen)
            elif lacks is not None:
                self.lost[name] = f"as a fallback {lacks}"
            else:
                chosen.append(name)
                holds = both
        route = self._route(tuple(chosen), self._bar(chosen))
        accounts = self.snapshot.accounts
        if not accounts:
            return Decision(route=route)
        return Decision(route=route, holds=holds, currency=accounts[0].currency)

    def _second(self, first: str, name: str) -> tuple[bool, bool, int]:
        """A fallback is one that works and knows more; failing that, the nearest."""
        below = self.by_cost and self.place[name] < self.place[first]
        return self.snapshot.of(name).suspended, below, abs(self.place[name] - self.place[first])

    def _passed_over(self, name: str, chosen: Sequence[str]) -> str:
        why = "its breaker is open; " if self.snapshot.of(name).suspended else ""
        return f"{why}{' and '.join(chosen)} come first; at most one fallback is tried"

    def _route(self, chosen: tuple[str, ...], bar: Bar | None = None) -> Route:
        return Route(
            purpose=self.wish.task,
            tiers=chosen,
            candidates=tuple(self._candidate(name) for name in self.tiers),
            queued=self.queued,
            bar=bar,
        )

    def _candidate(self, name: str) -> Candidate:
        expected = self.expected[name]
        return Candidate(
            tier=name,
            lost=self.lost[name],
            predicted_milliseconds=predicted_milliseconds(expected.milliseconds, self.snapshot.of(name)),
            predicted_amount=expected.amount,
            currency=expected.currency,
        )

    def _refused(
        self, kind: Literal["PolicyDenied", "BudgetExceeded", "DeadlineMissed"], remedy: str
    ) -> Decision:
        reasons = "; ".join(f"{name}: {why}" for name, why in self.lost.items()) or "no tier is configured"
        text = f"{self.wish.task}: no tier may take this call ({reasons}); {remedy}, or ask for less"
        return Decision(route=self._route(()), refused_as=kind, refusal=text)


def unsuitable(needs: Needs, tier: TierSettings) -> str | None:
    """Why this tier may not take the call by its settings; `None` if it may."""
    if needs.data_class not in tier.data_classes and needs.redacted not in tier.data_classes:
        return f"data class {needs.data_class} is not among {', '.join(tier.data_classes) or 'none'}"
    if needs.region is not None and needs.region != tier.region:
        return f"region {tier.region or 'unknown'} is not {needs.region}"
    if needs.pin is not None and needs.pin != tier.name:
        return f"the call is pinned to {needs.pin}"
    if needs.context_tokens > tier.context_tokens:
        return f"{needs.context_tokens} tokens are more than its {tier.context_tokens}"
    if needs.structured and not tier.structured:
        return "it cannot be held to a schema"
    return None


def barred(needs: Needs, tier: TierSettings, known: Telemetry) -> str | None:
    """Why this tier may not take the call, by its settings and by what was seen of its server."""
    reason = unsuitable(needs, tier)
    if reason is not None:
        return reason
    if known.held:
        return "another model than the accepted one answers there; accept it in the settings"
    if known.context_tokens is not None and needs.context_tokens > known.context_tokens:
        return f"{needs.context_tokens} tokens are more than the {known.context_tokens} its server takes"
    if needs.structured and known.structured is False:
        return "its server was seen to ignore a schema"
    return None


def predicted_milliseconds(expected: int | None, known: Telemetry) -> int | None:
    """How long an answer would take there, waiting included; from the slow end of what was measured."""
    own = known.measured.slow_milliseconds or expected
    if own is None or known.busy is None or not known.room:
        return own
    turns = max(0, known.busy - known.room + 1)
    return own + -(-turns * own // known.room)


def worst(needs: Needs, tier: TierSettings) -> int | None:
    """Millionths that all tries on one tier may take together; `None` without a price."""
    one = allowance(needs, tier)
    return None if one is None else one * TRIES


def allowance(needs: Needs, tier: TierSettings) -> int | None:
    """Millionths that one try may take, its repair included; `None` without a price."""
    if needs.answer_tokens is None:
        return None
    prompt = max(0, needs.context_tokens - needs.answer_tokens)
    amounts = [
        price(tier, tokens, needs.answer_tokens)[0]
        for tokens in (prompt, prompt + needs.answer_tokens + REPAIR_TOKENS)
    ]
    return sum(micros(amount) for amount in amounts if amount is not None) if None not in amounts else None


def needs_of(
    task: Task, call: Call, prompt: Prompt, inputs: Inputs | None = None, wanted: TaskSettings | None = None
) -> Needs:
    """The hard constraints of a call whose prompt is known; personal data in its inputs raises its class."""
    wanted = wanted or AS_IT_IS
    data_class, redacted, tokens = classes_of(call, inputs or {}, prompt, wanted.redact)
    return Needs(
        data_class=data_class,
        region=call.region,
        context_tokens=tokens + prompt.max_tokens,
        structured=task.structured or prompt.answer_schema is not None,
        answer_tokens=prompt.max_tokens,
        pin=call.pin or wanted.tier,
        within_milliseconds=wanted.within_milliseconds,
        may_queue=wanted.may_queue,
        redacted=redacted,
    )


def estimate(needs: Needs, tier: TierSettings, measured: Measured | None = None) -> Cost:
    """What the call would take there: as measured, else as the settings say, else unknown."""
    seen = measured if measured is not None and measured.calls else _NOTHING_KNOWN.measured
    amount, currency = seen.amount, seen.currency
    if amount is None:
        amount, currency = _expected_amount(needs, tier)
    milliseconds = seen.milliseconds
    if milliseconds is None:
        milliseconds = _expected_milliseconds(needs, tier)
    return Cost(
        amount=amount,
        currency=currency,
        milliseconds=milliseconds,
        tokens=seen.tokens or needs.context_tokens,
    )


def price(tier: TierSettings, prompt_tokens: int, answer_tokens: int) -> tuple[Amount | None, str | None]:
    """Amount and currency of a call, rounded up; unknown unless both prices and the currency are set."""
    if tier.price_per_million_input is None or tier.price_per_million_output is None or not tier.currency:
        return None, None
    micro = tier.price_per_million_input * prompt_tokens + tier.price_per_million_output * answer_tokens
    return format((micro / MILLION).quantize(SMALLEST_AMOUNT, rounding=ROUND_UP), "f"), tier.currency


def averaged(costs: Iterable[Cost]) -> Measured:
    """Averages over earlier calls; a value missing in one of them is unknown in the average."""
    seen = tuple(costs)
    if not seen:
        return Measured()
    currencies = {cost.currency for cost in seen}
    amounts = [cost.amount for cost in seen]
    amount = _mean_amount(amounts) if len(currencies) == 1 and None not in currencies else None
    return Measured(
        calls=len(seen),
        milliseconds=_mean([cost.milliseconds for cost in seen]),
        tokens=_mean([cost.tokens for cost in seen]),
        amount=amount,
        currency=seen[0].currency if amount is not None else None,
    )


def _expected_amount(needs: Needs, tier: TierSettings) -> tuple[Amount | None, str | None]:
    if needs.answer_tokens is None:
        return None, None
    return price(tier, max(0, needs.context_tokens - needs.answer_tokens), needs.answer_tokens)


def _expected_milliseconds(needs: Needs, tier: TierSettings) -> int | None:
    if needs.answer_tokens is None or tier.tokens_per_second is None:
        return None
    return -(-needs.answer_tokens * 1000 // tier.tokens_per_second)


def _mean(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) // len(known) if len(known) == len(values) else None


def _mean_amount(amounts: Sequence[Amount | None]) -> Amount | None:
    known = [Decimal(amount) for amount in amounts if amount is not None]
    if len(known) != len(amounts):
        return None
    mean = sum(known, Decimal(0)) / len(known)
    return format(mean.quantize(SMALLEST_AMOUNT, rounding=ROUND_UP), "f")


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other
