"""Upkeep by the clock: a schedule starts it, it puts things in order, it ends. It decides nothing."""

from __future__ import annotations

from typing import Any

from temporalio import workflow

from activities.knowledge import Knowledge
from models.errors import InvalidInput
from models.knowledge import Warm, Warmed
from models.loop import Request
from workflows.policies import book

UPKEEP = "upkeep"
"""What a schedule names as its agent."""


@workflow.defn(name=UPKEEP)
class Upkeep:
    """Has ready what agents will ask about."""

    @workflow.run
    async def run(self, *payloads: Any) -> Warmed:
        """Pre-warm the process that runs this.

        Raises:
            InvalidInput: there is no request, or more than one.
        """
        if len(payloads) != 1 or not isinstance(payloads[0], dict):
            raise InvalidInput.field("input", f"{len(payloads)} payloads", "send one Request")
        request = Request.model_validate(payloads[0])
        return await book(Knowledge.prewarm, Warm(tenant=request.tenant), "pre-warm")
