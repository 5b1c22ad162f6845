"""Which gate an agent's intents get. Policy is data; its digest is bound into every intent."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from models.canonical import digest_of
from models.errors import PolicyDenied
from models.loop import Frozen, GateRule, Name, Plan, Proposal, Reversibility

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
    max_revisions: int = Field(default=50, ge=0)


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


def risk(plans: Iterable[Plan]) -> Reversibility:
    """The gravest class among the plans."""
    return max((plan.reversibility for plan in plans), key=SEVERITY.index, default=Reversibility.READ_ONLY)
