"""What answers for agents that do not exist: a clear failure instead of a run that waits for ever."""

from __future__ import annotations

from collections.abc import Sequence

from temporalio import workflow
from temporalio.common import RawValue

from models.errors import UnknownName


@workflow.defn(dynamic=True)
class Unknown:
    """Refuses a run whose workflow type no agent has."""

    @workflow.run
    async def run(self, payloads: Sequence[RawValue]) -> None:
        """Name what was asked for.

        Raises:
            UnknownName: always.
        """
        asked = workflow.info().workflow_type[:80]
        raise UnknownName(f"agent: {asked!r} is not known; `countersign agents` lists those that are")
