"""How many activities wait in a queue, as the Temporal server counts them."""

from __future__ import annotations

from datetime import timedelta

from temporalio.api.enums.v1 import TaskQueueKind, TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client
from temporalio.service import RPCError

from activities.services.loads import Line

PATIENCE = timedelta(seconds=2)


class Backlog:
    """Counts queues of one namespace."""

    def __init__(self, client: Client) -> None:
        """Ask by this client."""
        self._client = client

    async def line(self, queue: str) -> Line | None:
        """What stands in a queue of activities; `None` when the server does not say."""
        wanted = DescribeTaskQueueRequest(
            namespace=self._client.namespace,
            task_queue=TaskQueue(name=queue, kind=TaskQueueKind.TASK_QUEUE_KIND_NORMAL),
            task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
            report_stats=True,
        )
        try:
            said = await self._client.workflow_service.describe_task_queue(wanted, timeout=PATIENCE)
        except RPCError:
            return None
        if not said.HasField("stats"):
            return None
        served_by = len({poller.identity for poller in said.pollers})
        return Line(said.stats.approximate_backlog_count, served_by)
