"""The `policy` agent: a change of what another agent may do without a person, put to people as any intent."""

from __future__ import annotations

from temporalio import workflow

from activities.amendments import Amending
from models.agent import AgentSpec
from models.errors import InvalidInput
from models.loop import Outcome, Proposal, Ref, Request
from models.orders import Reading
from models.policy import POLICY_AGENT
from workflows.loop import Loop


@workflow.defn(name=POLICY_AGENT)
class Policy(Loop):
    """Takes the change from the request's body."""

    SPEC = AgentSpec(name=POLICY_AGENT, summary="Puts a change of policy through the gate")

    @workflow.init
    def __init__(self, request: Request) -> None:
        """Start from a request whose body is a change."""
        super().__init__(request)

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        """Run the loop."""
        return await self.loop(request)

    async def propose(self, feedback: tuple[Ref, ...]) -> Proposal:
        """The change as it was sent; feedback is for whoever sent it.

        Raises:
            InvalidInput: nobody is named who asks for it, so nobody could be kept from approving it.
        """
        if self.request.requester is None:
            raise InvalidInput.field("requester", None, "say who asks for the change; they cannot approve it")
        order = Reading(tenant=self.request.tenant, body=self.body, subject=self.request.subject)
        return await self.local(Amending.read_amendment, order)
