"""Agents that differ from `external` only in their policy or habits, so that one stack serves many tests."""

from __future__ import annotations

from datetime import timedelta

from temporalio import workflow

from models.agent import AgentSpec
from models.loop import Outcome, Proposal, Ref, Request
from workflows.agents.external import External
from workflows.loop import Loop


class Variant(Loop):
    async def propose(self, feedback: tuple[Ref, ...]) -> Proposal:
        proposal = await External.propose(self, feedback)  # pyright: ignore[reportArgumentType]
        return proposal.model_copy(update={"agent": self.SPEC.name})


@workflow.defn(name="pair")
class Pair(Variant):
    SPEC = AgentSpec(name="pair", summary="Needs two people")

    @workflow.init
    def __init__(self, request: Request) -> None:
        super().__init__(request)

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        return await self.loop(request)


@workflow.defn(name="roles")
class Roles(Variant):
    SPEC = AgentSpec(name="roles", summary="Needs an editor and a lawyer")

    @workflow.init
    def __init__(self, request: Request) -> None:
        super().__init__(request)

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        return await self.loop(request)


@workflow.defn(name="auto")
class Auto(Variant):
    SPEC = AgentSpec(name="auto", summary="Needs nobody for what can be taken back")

    @workflow.init
    def __init__(self, request: Request) -> None:
        super().__init__(request)

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        return await self.loop(request)


@workflow.defn(name="keep")
class Keep(Variant):
    SPEC = AgentSpec(name="keep", summary="Keeps what was applied")

    @workflow.init
    def __init__(self, request: Request) -> None:
        super().__init__(request)

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        return await self.loop(request)


@workflow.defn(name="short")
class Short(Variant):
    SPEC = AgentSpec(name="short", summary="Continues as new after two intents", revisions_per_run=2)

    @workflow.init
    def __init__(self, request: Request) -> None:
        super().__init__(request)

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        return await self.loop(request)


@workflow.defn(name="hasty")
class Hasty(Variant):
    SPEC = AgentSpec(name="hasty", summary="Waits for a second only")

    @workflow.init
    def __init__(self, request: Request) -> None:
        super().__init__(request)

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        return await self.loop(request)


@workflow.defn(name="later")
class Later(Variant):
    SPEC = AgentSpec(name="later", summary="Does in an hour what was approved")

    @workflow.init
    def __init__(self, request: Request) -> None:
        super().__init__(request)

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        return await self.loop(request)

    async def propose(self, feedback: tuple[Ref, ...]) -> Proposal:
        proposal = await super().propose(feedback)
        return proposal.model_copy(update={"not_before": workflow.now() + timedelta(hours=1)})


AGENTS = (Pair, Roles, Auto, Keep, Short, Hasty, Later)
