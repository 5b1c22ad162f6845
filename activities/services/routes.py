"""The router as a worker runs it: build the prompt, apply the pure rule, put the choice on record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from activities.services.content import ContentStore
from activities.services.ledger_store import LedgerStore
from models.errors import UnknownName
from models.inference import Task
from models.ledger import Draft, EventType, route_stream
from models.orders import Fell, Routed, RouteOrder
from models.routing import estimate, needs_of, route
from models.settings import TierSettings
from models.visibility import infer_queue


class Routes:
    """Chooses tiers for tasks."""

    def __init__(
        self,
        tiers: Sequence[TierSettings],
        tasks: Mapping[str, Task],
        content: ContentStore,
        ledger: LedgerStore,
    ) -> None:
        """Tiers in the order of the settings, tasks by name."""
        self._tiers = {tier.name: tier for tier in tiers}
        self._tasks = tasks
        self._content = content
        self._ledger = ledger

    async def route(self, order: RouteOrder) -> Routed:
        """Choose a tier and at most one fallback, and record every candidate.

        Raises:
            UnknownName: no such task.
            PolicyDenied: no tier may take the call.
        """
        task = self._task(order.call.task)
        inputs = {
            name: await self._content.text(order.tenant, ref) for name, ref in order.call.inputs.items()
        }
        needs = needs_of(task, order.call, task.build(inputs, order.call.params))
        chosen = route(task.name, needs, tuple(self._tiers.values()), task.prefer)
        await self._ledger.add(
            order.tenant,
            _draft(order.workflow_id, order.event_id, EventType.ROUTE, order.agent).model_copy(
                update={
                    "body": {"route": chosen.model_dump(mode="json"), "needs": needs.model_dump(mode="json")}
                }
            ),
        )
        first = self._tiers[chosen.tiers[0]]
        return Routed(
            route=chosen,
            queues=tuple(infer_queue(name, self._tiers[name].region) for name in chosen.tiers),
            estimated=estimate(needs, first),
        )

    async def fell(self, fell: Fell) -> None:
        """Record that a tier failed and what is tried next."""
        draft = _draft(fell.workflow_id, fell.event_id, EventType.FALLBACK, "router")
        body = {"task": fell.task, "tier": fell.tier, "to": fell.to, "reason": fell.reason}
        await self._ledger.add(fell.tenant, draft.model_copy(update={"body": body}))

    def _task(self, name: str) -> Task:
        try:
            return self._tasks[name]
        except KeyError:
            known = ", ".join(sorted(self._tasks)) or "none"
            raise UnknownName(f"task: {name!r} is not registered; known: {known}") from None


def _draft(workflow_id: str, event_id: str, kind: EventType, actor: str) -> Draft:
    return Draft(
        event_id=event_id,
        stream=route_stream(workflow_id),
        type=kind,
        actor_kind="system",
        actor_ref=actor,
        correlation_id=workflow_id,
    )
