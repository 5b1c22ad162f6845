"""The smallest agent that uses every role: it recalls, asks a model, proposes what it says, and remembers."""

from __future__ import annotations

from temporalio import workflow

from activities.external import External as Reading
from models.agent import AgentSpec
from models.inference import Call
from models.loop import Outcome, Proposal, Ref, Request
from models.memory import Memo, Recall
from models.orders import Reading as Order
from workflows.loop import Loop

TASK = "suggest"


@workflow.defn(name="stub")
class Stub(Loop):
    """Proposes whatever the model answers."""

    SPEC = AgentSpec(name="stub", summary="Uses every role once")

    @workflow.init
    def __init__(self, request: Request) -> None:
        """Start from a request whose body is any text."""
        super().__init__(request)

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        """Run the loop."""
        return await self.loop(request)

    async def propose(self, feedback: tuple[Ref, ...]) -> Proposal:
        """Recall, ask, and take the answer for a proposal."""
        await self.recall(Recall(tenant=self.request.tenant, query=self.body))
        answered = await self.ask(Call(task=TASK, inputs={"wish": self.body}))
        order = Order(tenant=self.request.tenant, body=answered.text)
        proposal: Proposal = await self.local(Reading.read_proposal, order)
        return proposal.model_copy(update={"agent": self.SPEC.name})

    def keepsakes(self, outcome: Outcome) -> tuple[Memo, ...]:
        """That it happened."""
        memo = Memo(
            record_id=outcome.workflow_id,
            tenant=self.request.tenant,
            kind="outcome",
            title=outcome.status.value,
            text=self.body,
            source=outcome.workflow_id,
        )
        return (memo,)
