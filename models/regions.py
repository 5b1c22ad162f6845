"""Which process may take what: the pure rules of requests that are bound to a region."""

from __future__ import annotations

from models.loop import Request
from models.settings import Settings, TierSettings
from models.visibility import Queue, infer_queue, queue_of


def misplaced(settings: Settings, request: Request) -> str | None:
    """Why a process with these settings may not take a request; `None` if it may."""
    home = settings.home(request.tenant)
    if home is not None and request.region != home:
        return (
            f"region: {request.region!r} is not accepted; every request of {request.tenant} is bound to "
            f'"{home}", so write that'
        )
    if request.region != settings.region:
        here = "the centre" if settings.region is None else f"region {settings.region}"
        return (
            f"region: {request.region!r} is not served here, which is {here}; start it on the queue "
            f"{queue_of(Queue.DECIDE, request.region)}"
        )
    return _spelt_out(request)


def _spelt_out(request: Request) -> str | None:
    """A region's texts never travel: they are stored there, and their name is sent."""
    if request.region is None or not isinstance(request.body, str):
        return None
    return (
        f"body: text of {len(request.body)} characters is not accepted; store it in region "
        f"{request.region} first and send its reference"
    )


def served(settings: Settings) -> tuple[tuple[TierSettings, str], ...]:
    """The tiers that a process puts calls to, each with a queue it takes them from."""
    if settings.region is not None:
        own = (tier for tier in settings.tiers if tier.region == settings.region)
        return tuple((tier, infer_queue(tier.name, tier.region)) for tier in own)
    plain = tuple((tier, infer_queue(tier.name)) for tier in settings.tiers)
    # Calls may be bound to a region that keeps no store of its own; then this is as good as there.
    bound = (tier for tier in settings.tiers if tier.region and tier.region not in settings.regions)
    return (*plain, *((tier, infer_queue(tier.name, tier.region)) for tier in bound))
