"""The `external` agent: any program's proposal, through the same gate as everybody else's."""

from __future__ import annotations

from temporalio import workflow

from activities.external import External as Reading
from models.agent import AgentSpec
from models.loop import Outcome, Proposal, Ref, Request
from models.orders import Reading as Order
from workflows.loop import Loop


@workflow.defn(name="external")
class External(Loop):
    """Takes the proposal from the request's body."""

    SPEC = AgentSpec(name="external", summary="Puts another program's proposal through the gate")

    @workflow.init
    def __init__(self, request: Request) -> None:
        """Start from a request whose body is a proposal."""
        super().__init__(request)

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        """Run the loop."""
        return await self.loop(request)

    async def propose(self, feedback: tuple[Ref, ...]) -> Proposal:
        """The proposal as it was sent; feedback is for the program that sent it."""
        order = Order(tenant=self.request.tenant, body=self.body, subject=self.request.subject)
        return await self.local(Reading.read_proposal, order)
