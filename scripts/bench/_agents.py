"""The two workflows that are compared: a product agent with one model call, and five plain activities."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta

from temporalio import activity, workflow

from models.agent import AgentSpec
from models.inference import Call, Inputs, Message, Params, Prompt, Task
from models.ledger import derived_id
from models.loop import Action, Evidence, Outcome, Proposal, Ref, Request
from models.memory import Memo, Recall
from workflows.loop import Loop

TASK = "bench.line"


def line_task() -> Task:
    """One short answer, without a schema."""

    def build(inputs: Inputs, params: Params) -> Prompt:
        return Prompt(messages=(Message(role="user", content=inputs["body"][:500]),), max_tokens=32)

    def check(text: str, inputs: Inputs, params: Params) -> tuple[str, ...]:
        return () if text else ("say something",)

    return Task(TASK, "small", False, build, check)


@workflow.defn(name="stub")
class Stub(Loop):
    """Recalls, asks a model, and proposes one note whose arguments are the request's body."""

    SPEC = AgentSpec(name="stub", summary="What the benchmark runs")

    @workflow.init
    def __init__(self, request: Request) -> None:
        """Start from any body."""
        super().__init__(request)
        self._said: Ref | None = None

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        """Run the loop."""
        return await self.loop(request)

    async def propose(self, feedback: tuple[Ref, ...]) -> Proposal:
        """One note."""
        recalled = await self.recall(Recall(tenant=self.request.tenant, query=self.body))
        answered = await self.ask(Call(task=TASK, inputs={"body": self.body}))
        self._said = answered.text
        return Proposal(
            agent="stub",
            title=f"Note {self.request.key}",
            actions=(Action(connector="null", operation="note", arguments=self.body, title="Keep a note"),),
            reasons=answered.text,
            evidence=tuple(
                Evidence(reference=hit.record_id, version=hit.version) for hit in recalled.hits[:3]
            ),
            estimated=answered.cost,
        )

    def keepsakes(self, outcome: Outcome) -> tuple[Memo, ...]:
        """What the model said."""
        if self._said is None:
            return ()
        source = outcome.workflow_id
        return (
            Memo(
                record_id=derived_id("memo", source),
                tenant=self.request.tenant,
                kind="outcome",
                title=f"Note {self.request.key}",
                text=self._said,
                source=source,
            ),
        )


class Plain:
    """Five activities that do nothing but tell the driver that a run waits."""

    def __init__(self, waiting: Callable[[str], None]) -> None:
        """`waiting` is called with the id of a run that is about to wait."""
        self._waiting = waiting

    @activity.defn(name="plain")
    async def plain(self, text: str) -> str:
        """Answer."""
        return json.dumps({"text": text})

    @activity.defn(name="tell")
    async def tell(self, run_id: str) -> str:
        """Answer, and tell."""
        self._waiting(run_id)
        return run_id


@workflow.defn(name="bare")
class Bare:
    """Three activities, one signal, two activities."""

    def __init__(self) -> None:
        """Wait for nothing yet."""
        self._approved = False

    @workflow.signal
    def approve(self, text: str) -> None:
        """Go on."""
        self._approved = True

    @workflow.run
    async def run(self, text: str) -> str:
        """The floor."""
        limit = timedelta(seconds=60)
        for _ in range(2):
            text = await workflow.execute_activity("plain", text, start_to_close_timeout=limit)
        await workflow.execute_activity("tell", workflow.info().workflow_id, start_to_close_timeout=limit)
        await workflow.wait_condition(lambda: self._approved)
        for _ in range(2):
            text = await workflow.execute_activity("plain", "done", start_to_close_timeout=limit)
        return text
