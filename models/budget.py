"""Budgets: what a tenant, or one of its agents, may spend in a day. Integer micro-units, rounded up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from decimal import ROUND_UP, Decimal

from pydantic import Field

from models.loop import Amount, Currency, Frozen, Name

MICRO = 1_000_000


class Budget(Frozen):
    """What may be spent in one day, UTC. Every budget that covers a call must have room for it."""

    amount: Amount
    currency: Currency
    tenant: Name | None = None
    """`None`: every tenant, each for itself."""
    agent: Name | None = None
    """`None`: all agents of the tenant together."""


class Account(Frozen):
    """A budget on one day, and how much of it is spoken for, in millionths of its currency."""

    name: str
    currency: Currency
    cap: int = Field(ge=0)
    held: int = Field(default=0, ge=0)
    spent: int = Field(default=0, ge=0)

    @property
    def left(self) -> int:
        """What may still be reserved."""
        return max(0, self.cap - self.held - self.spent)


def micros(amount: Amount | Decimal) -> int:
    """Millionths, rounded up, so that no fraction goes unpaid."""
    return int((Decimal(amount) * MICRO).to_integral_value(rounding=ROUND_UP))


def amount_of(value: int) -> Amount:
    """Millionths as a decimal number."""
    whole, rest = divmod(value, MICRO)
    return f"{whole}.{rest:06}"


def accounts_of(budgets: Iterable[Budget], tenant: str, agent: str, now: datetime) -> tuple[Account, ...]:
    """The accounts a call of this agent draws on, empty as on the morning of the day."""
    day = now.astimezone(UTC).date().isoformat()
    return tuple(
        Account(
            name=f"{tenant}/{budget.agent or '*'}/{budget.currency}/{day}",
            currency=budget.currency,
            cap=micros(budget.amount),
        )
        for budget in budgets
        if budget.tenant in (None, tenant) and budget.agent in (None, agent)
    )


def same_scope(budgets: Sequence[Budget]) -> Budget | None:
    """The first budget that speaks of the same money as an earlier one, or could."""
    for number, one in enumerate(budgets):
        for other in budgets[:number]:
            tenants = one.tenant == other.tenant or None in (one.tenant, other.tenant)
            if tenants and one.agent == other.agent and one.currency == other.currency:
                return one
    return None


def lacking(accounts: Iterable[Account], worst: int | None, currency: str | None) -> str | None:
    """Why a call of this worst price may not be made; `None` if every account has room."""
    for account in accounts:
        if worst is None:
            return f"its price is unknown, and {account.name} is a budget"
        if currency != account.currency:
            return f"its price is in {currency}, and {account.name} is a budget in {account.currency}"
        if worst > account.left:
            return (
                f"it may take {amount_of(worst)} {currency} and {account.name} has "
                f"{amount_of(account.left)} of {amount_of(account.cap)} left"
            )
    return None
