"""Upkeep by the clock: a schedule starts it, it puts things in order, it ends. It decides nothing."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from temporalio import workflow

from activities.calibrating import Calibrating
from activities.knowledge import Knowledge
from models.calibration import Calibrate, Calibrated
from models.errors import InvalidInput
from models.knowledge import Chores, Warm, Warmed
from models.loop import Request
from workflows.policies import book

UPKEEP = "upkeep"
"""What a schedule names as its agent."""


@workflow.defn(name=UPKEEP)
class Upkeep:
    """Has ready what agents will ask about, or fits again what confidences are worth, as its body says."""

    @workflow.run
    async def run(self, *payloads: Any) -> Warmed | Calibrated:
        """Pre-warm the process that runs this; with `calibrate` in the body, fit again instead.

        Raises:
            InvalidInput: there is no request, or more than one, or its body asks for what there is not.
        """
        if len(payloads) != 1 or not isinstance(payloads[0], dict):
            raise InvalidInput.field("input", f"{len(payloads)} payloads", "send one Request")
        request = Request.model_validate(payloads[0])
        if _chores(request).calibrate:
            return await book(Calibrating.calibrate, Calibrate(tenant=request.tenant), "calibrate")
        return await book(Knowledge.prewarm, Warm(tenant=request.tenant), "pre-warm")


def _chores(request: Request) -> Chores:
    if not isinstance(request.body, str):
        return Chores()
    try:
        return Chores.model_validate_json(request.body or "{}")
    except ValidationError:
        raise InvalidInput.field("body", "(its JSON)", 'write {} or {"calibrate": true}') from None
