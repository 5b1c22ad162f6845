"""Which tier may take a call, and what it would cost. Pure, so that a recorded choice can be made again.

A hard constraint removes a tier for good: neither preference nor fallback brings it back, and with nothing
left the answer is a refusal, never the cheapest tier.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_UP, Decimal
from typing import Literal

from pydantic import Field

from models.errors import PolicyDenied
from models.inference import Call, Candidate, Needs, Prompt, Route, Task
from models.loop import Amount, Cost, Frozen
from models.settings import TierSettings

MOST_TIERS = 2
"""The chosen one and one fallback."""
MILLION = 1_000_000
MESSAGE_TOKENS = 12
"""Room for the marks a chat template puts around one message."""
TEMPLATE_TOKENS = 48
"""Room for the system message some templates add by themselves."""
SMALLEST_AMOUNT = Decimal("0.00000001")

Prefer = Literal["small", "large"]

_WORD = re.compile(r"(?<![0-9A-Za-z])[A-Za-z]+(?![0-9A-Za-z])")


class Measured(Frozen):
    """What earlier calls of one task took on one tier, on average; `None` is unknown."""

    calls: int = Field(default=0, ge=0)
    milliseconds: int | None = None
    tokens: int | None = None
    amount: Amount | None = None
    currency: str | None = None


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
        prefer: small takes them in that order, large in reverse.
        measured: earlier averages by tier.

    Raises:
        PolicyDenied: no tier satisfies the constraints; each one's reason is named.
    """
    lost = {tier.name: unsuitable(needs, tier) for tier in tiers}
    fitting = [tier.name for tier in tiers if lost[tier.name] is None]
    if not fitting:
        raise PolicyDenied(_refusal(task, lost))
    ranked = fitting if prefer == "small" else fitting[::-1]
    chosen = tuple(ranked[:MOST_TIERS])
    for name in ranked[MOST_TIERS:]:
        lost[name] = f"{' and '.join(chosen)} come first; at most one fallback is tried"
    known = measured or {}
    candidates = tuple(_candidate(needs, tier, lost[tier.name], known.get(tier.name)) for tier in tiers)
    return Route(purpose=task, tiers=chosen, candidates=candidates)


def unsuitable(needs: Needs, tier: TierSettings) -> str | None:
    """Why this tier may not take the call; `None` if it may."""
    if needs.data_class not in tier.data_classes:
        return f"data class {needs.data_class} is not among {', '.join(tier.data_classes) or 'none'}"
    if needs.region is not None and needs.region != tier.region:
        return f"region {tier.region or 'unknown'} is not {needs.region}"
    if needs.context_tokens > tier.context_tokens:
        return f"{needs.context_tokens} tokens are more than its {tier.context_tokens}"
    if needs.structured and not tier.structured:
        return "it cannot be held to a schema"
    return None


def needs_of(task: Task, call: Call, prompt: Prompt) -> Needs:
    """The hard constraints of a call whose prompt is known."""
    return Needs(
        data_class=call.data_class,
        region=call.region,
        context_tokens=prompt_tokens(prompt) + prompt.max_tokens,
        structured=task.structured or prompt.answer_schema is not None,
        answer_tokens=prompt.max_tokens,
    )


def prompt_tokens(prompt: Prompt) -> int:
    """Tokens of a prompt, estimated from above."""
    texts = sum(tokens_from_above(message.content) + MESSAGE_TOKENS for message in prompt.messages)
    return texts + TEMPLATE_TOKENS


def tokens_from_above(text: str) -> int:
    """More tokens than the usual vocabularies make of a text.

    Two letters per token in a Latin word, one byte per token in everything else, which includes letters
    among digits, as in a hash. The server has the last word: it refuses what is too long and never cuts.
    """
    words = sum((len(word) + 1) // 2 for word in _WORD.findall(text))
    return words + sum(_bytes(between) for between in _WORD.split(text))


def estimate(needs: Needs, tier: TierSettings, measured: Measured | None = None) -> Cost:
    """What the call would take there: as measured, else as the settings say, else unknown."""
    seen = measured if measured is not None and measured.calls else Measured()
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
    amount = None
    if len(currencies) == 1 and None not in currencies:
        amount = _mean_amount(amounts)
    return Measured(
        calls=len(seen),
        milliseconds=_mean([cost.milliseconds for cost in seen]),
        tokens=_mean([cost.tokens for cost in seen]),
        amount=amount,
        currency=seen[0].currency if amount is not None else None,
    )


def _bytes(between: str) -> int:
    # A single space joins the word after it in every vocabulary we meet.
    return 0 if between == " " else len(between.encode("utf-8", "surrogatepass"))


def _candidate(needs: Needs, tier: TierSettings, lost: str | None, measured: Measured | None) -> Candidate:
    expected = estimate(needs, tier, measured)
    return Candidate(
        tier=tier.name,
        lost=lost,
        predicted_milliseconds=expected.milliseconds,
        predicted_amount=expected.amount,
        currency=expected.currency,
    )


def _refusal(task: str, lost: Mapping[str, str | None]) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in lost.items()) or "no tier is configured"
    return (
        f"{task}: no tier may take this call ({reasons}); add a [[tiers]] block to countersign.toml that "
        f"may, or ask for less"
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
