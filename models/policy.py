"""Which gate an agent's intents get. Policy is data; its digest is bound into every intent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Self

from pydantic import Field, field_validator, model_validator

from models.canonical import digest_of
from models.errors import PolicyDenied
from models.loop import (
    Assurance,
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
POLICY_AGENT = "policy"
"""Puts changes of what other agents may do without a person; its own policy stands in the file alone."""
GATE_POLICY = "gate_policy"
"""The connector that such changes go through, and nothing else."""
OUTDATED = "the policy has changed since this was approved"
"""Why an intent is stale that was bound under another policy; says nothing of its actions."""


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

    @model_validator(mode="after")
    def _changes_take_people(self) -> Self:
        for agent, one in self.agents.items():
            if agent != POLICY_AGENT and GATE_POLICY in one.connectors:
                raise ValueError(f"{agent} may not change policies; only the agent {POLICY_AGENT} may")
        if (rule := self.agents.get(POLICY_AGENT)) is not None:
            if rule.connectors != (GATE_POLICY,) or rule.grants:
                raise ValueError(f'{POLICY_AGENT} has connectors = ["{GATE_POLICY}"], and no grants')
            if (wrong := change_rule_fault(rule.gate)) is not None:
                raise ValueError(f"gate of {POLICY_AGENT}: {wrong}")
        return self

    @property
    def may_change(self) -> bool:
        """Whether people may change it by an intent: only where the file says who has to agree."""
        return POLICY_AGENT in self.agents

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


def change_rule_fault(gate: GateRule) -> str | None:
    """Why this gate is too wide for a change of policy; `None` if it is not."""
    faults = (
        (gate.automatic, "automatic: a change of policy always needs people; leave it out"),
        (gate.self_approval, "self_approval: whoever asks for a change may not approve it; leave it out"),
        (gate.break_glass is not None, "break_glass: nobody changes policy alone; leave it out"),
        (not gate.roles, "roles: name the role that has to agree"),
        # What may be invented by whoever can write the database would let everything else be.
        (gate.assurance is not Assurance.SIGNED, 'assurance: write "signed"'),
    )
    return next((text for wrong, text in faults if wrong), None)


def change_fault(intent: Intent) -> str | None:
    """Why an intent may not change a policy, whatever was said to it; `None` if it may, or changes none."""
    if not _changes_policy(intent.plans) and all(
        action.connector != GATE_POLICY for action in intent.proposal.actions
    ):
        return None
    if intent.proposer != POLICY_AGENT or len(intent.proposal.actions) != 1:
        return f"a policy is changed by the agent {POLICY_AGENT}, one at a time"
    if intent.requester is None:
        return "nobody is named who asks for this change of policy"
    return change_rule_fault(intent.gate)


def _changes_policy(plans: Iterable[Plan]) -> bool:
    return any(plan.connector == GATE_POLICY for plan in plans)


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
    in_time = bool(plans) and now <= grant.valid_until and not _changes_policy(plans)
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
    alone = rule.automatic and not _changes_policy(plans)
    return alone and harmless and little and _is_cheap(rule, plans)


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
