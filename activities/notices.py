"""Telling people that something waits, and when to tell them again."""

from __future__ import annotations

from typing import Protocol

from temporalio import activity

from models.business_hours import next_open
from models.notices import Due, Moment, NoticeOrder, Told


class Telling(Protocol):
    """Knows the channels."""

    async def notify(self, order: NoticeOrder) -> Told:
        """Tell people on one channel."""
        ...


class Notices:
    """Notices, on the queue of the `act` role: they go out of the house."""

    def __init__(self, telling: Telling) -> None:
        """Take who knows the channels."""
        self._telling = telling

    @activity.defn(name="notify")
    async def notify(self, order: NoticeOrder) -> Told:
        """Tell people on one channel that an intent waits; telling them twice does no harm."""
        return await self._telling.notify(order)


class Reminders:
    """When reminders go out, as a local activity: zone rules change, and a recorded answer does not."""

    @activity.defn(name="remind_at")
    async def remind_at(self, due: Due) -> Moment:
        """The first moment from then on at which people are at work."""
        return Moment(at=next_open(due.hours, due.at))
