"""Which gate an agent's intents get. Policy is data; its digest is bound into every intent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from fnmatch import fnmatchcase

from pydantic import Field, field_validator

from models.canonical import digest_of
from models.errors import PolicyDenied
from models.loop import (
    Change,
    Cost,
    Exemption,
    Frozen,
    GateRule,
    Intent,
    Limits,
    Name,
    Plan,
    Proposal,
    Reversibility,
    Use,
    sum_costs,
)

SEVERITY = (
    Reversibility.READ_ONLY,
    Reversibility.REVERSIBLE,
    Reversibility.CORRECTABLE,
    Reversibility.IRREVERSIBLE,
)


class AgentPolicy(Frozen):
    """What one agent may do and who must agree."""

    connectors: tuple[Name, ...]
    """The only connectors its actions may name."""
    gate: GateRule = GateRule()
    start_roles: tuple[Name, ...] = ()
    """Any one of them is needed to start a run; empty is anybody."""
    cancel_roles: tuple[Name, ...] = ()
    """Any one of them is needed to stop a run by the command line; empty is anybody."""
    max_revisions: int = Field(default=50, ge=0)
    grants: tuple[Exemption, ...] = ()
    """What passes without a person, narrowly, so often and so long."""

    @field_validator("grants")
    @classmethod
    def _names_differ(cls, grants: tuple[Exemption, ...]) -> tuple[Exemption, ...]:
        if len({one.name for one in grants}) < len(grants):
            raise ValueError("two grants have one name; uses are counted by it, so rename one")
        return grants


class Policy(Frozen):
    """One policy per agent; an agent without one may do nothing."""

    agents: dict[Name, AgentPolicy] = Field(default_factory=dict)

    def of(self, agent: str) -> AgentPolicy:
        """Policy of one agent.

        Raises:
            PolicyDenied: none is configured.
        """
        try:
            return self.agents[agent]
        except KeyError:
            raise PolicyDenied(
                f"agent: {agent!r} has no policy; add [policy.agents.{agent}] to countersign.toml"
            ) from None


def policy_digest(policy: AgentPolicy) -> str:
    """Name of the policy as it stands."""
    return digest_of(policy)


def permit(policy: AgentPolicy, proposal: Proposal) -> None:
    """Refuse a proposal that reaches beyond the agent's connectors.

    Raises:
        PolicyDenied: an action names a connector outside the policy.
    """
    for number, action in enumerate(proposal.actions):
        if action.connector not in policy.connectors:
            allowed = ", ".join(policy.connectors) or "none"
            raise PolicyDenied(
                f"actions[{number}].connector: {action.connector!r} is not allowed for "
                f"{proposal.agent}; allowed: {allowed}"
            )


def covers(grant: Exemption, plans: Sequence[Plan], now: datetime) -> bool:
    """Whether everything that is planned lies within a grant, at this time."""
    in_time = bool(plans) and now <= grant.valid_until
    return in_time and all(_within(grant, plan) for plan in plans) and moves_little(grant, plans)


def counts(use: Use, plans: Sequence[Plan], bound_at: datetime) -> bool:
    """Whether a use that was bound into an intent was one that its grant allows."""
    return use.number <= use.grant.max_uses and covers(use.grant, plans, bound_at)


def is_current(policy: AgentPolicy, intent: Intent, now: datetime) -> bool:
    """Whether the gate an intent was bound to, and the grant it takes, are what policy says now."""
    use = intent.use
    granted = use is None or (use.grant in policy.grants and now <= use.grant.valid_until)
    same = intent.policy_digest == policy_digest(policy) and intent.gate == policy.gate
    return same and granted


def passes_alone(rule: GateRule, plans: Sequence[Plan]) -> bool:
    """Whether the rule lets these plans pass without a person: by class, and by cost where it names one."""
    harmless = SEVERITY.index(risk(plans)) <= SEVERITY.index(Reversibility(rule.automatic_up_to))
    little = rule.automatic_within is None or moves_little(rule.automatic_within, plans)
    return rule.automatic and harmless and little and _is_cheap(rule, plans)


def moves_little(limits: Limits, plans: Sequence[Plan]) -> bool:
    """Whether every number that is moved lies within the limits; what is not said is within none."""
    changes = [change for plan in plans for change in plan.changes]
    if limits.at_most_permille is None and limits.at_most_minor is None:
        return True
    if not all(plan.changes for plan in plans):
        return False
    return _is_small_part(limits, plans, changes) and _is_small_sum(limits, changes)


def _is_small_part(limits: Limits, plans: Sequence[Plan], changes: Iterable[Change]) -> bool:
    most = limits.at_most_permille
    if most is None:
        return True
    # Two small steps on one target could be a large one.
    apart = len({plan.target for plan in plans}) == len(plans)
    return apart and all(1000 * abs(one.new - one.old) <= most * one.old for one in changes)


def _is_small_sum(limits: Limits, changes: Sequence[Change]) -> bool:
    if limits.at_most_minor is None:
        return True
    same = all(one.currency == limits.currency for one in changes)
    return same and sum(abs(one.new - one.old) for one in changes) <= limits.at_most_minor


def _is_cheap(rule: GateRule, plans: Iterable[Plan]) -> bool:
    if rule.automatic_amount is None:
        return True
    total: Cost | None = None
    for plan in plans:
        total = sum_costs(total, plan.cost)
    # A cost that nobody knows is within no limit.
    if total is None or total.amount is None or total.currency != rule.automatic_currency:
        return False
    return Decimal(total.amount) <= Decimal(rule.automatic_amount)


def _within(grant: Exemption, plan: Plan) -> bool:
    return (
        plan.connector == grant.connector
        and plan.operation in grant.operations
        and any(fnmatchcase(plan.target, pattern) for pattern in grant.targets)
        and SEVERITY.index(plan.reversibility) <= SEVERITY.index(grant.up_to)
    )


def risk(plans: Iterable[Plan]) -> Reversibility:
    """The gravest class among the plans."""
    return max((plan.reversibility for plan in plans), key=SEVERITY.index, default=Reversibility.READ_ONLY)
