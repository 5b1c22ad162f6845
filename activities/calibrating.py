"""The activity that fits again what the confidence of models is worth."""

from __future__ import annotations

from typing import Protocol

from temporalio import activity

from models.calibration import Calibrate, Calibrated, Fit, Reported


class Fitter(Protocol):
    """What fits; `services/calibration.py` in a worker."""

    async def refit(self, tenant: str) -> tuple[Fit, ...]:
        """Fit everything again from the ledger, and put on record what has changed."""
        ...


class Calibrating:
    """Local activity: it reads and writes one database, and doing it twice records nothing new."""

    def __init__(self, fitter: Fitter) -> None:
        """Take what fits."""
        self._fitter = fitter

    @activity.defn(name="calibrate")
    async def calibrate(self, order: Calibrate) -> Calibrated:
        """Fit again, and say with what error."""
        fits = await self._fitter.refit(order.tenant)
        return Calibrated(fits=tuple(Reported.of(fit) for fit in fits))
