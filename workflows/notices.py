"""Telling people beside the waiting: each channel on its own, receipted, and never in the way of the run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

from models.ledger import EventType
from models.notices import NoticeOrder
from workflows import policies
from workflows.journal import Journal

Key = tuple[int, str]


class Crier:
    """Tells people of one intent for as long as it waits."""

    def __init__(
        self,
        journal: Journal,
        digest: str,
        is_waiting: Callable[[], bool],
        heard_by: Callable[[], tuple[int, tuple[str, ...]]],
    ) -> None:
        """Nothing goes out before `keep_up`; `heard_by` gives the round of now and its channels."""
        self._journal = journal
        self._heard_by = heard_by
        self._digest = digest
        self._is_waiting = is_waiting
        self._sending: dict[Key, asyncio.Task[None]] = {}
        self._started: set[Key] = set()

    def keep_up(self) -> None:
        """Start whatever is due and neither settled nor under way."""
        number, channels = self._heard_by()
        for channel in channels:
            key = (number, channel)
            if key not in self._journal.progress.notices and key not in self._started:
                self._started.add(key)
                self._sending[key] = asyncio.create_task(self._tell(key))

    def stop(self) -> None:
        """It waits no more: call off what has not gone out. What is being written down is written."""
        for task in self._sending.values():
            task.cancel()

    async def _tell(self, key: Key) -> None:
        number, channel = key
        order = NoticeOrder(
            tenant=self._journal.request.tenant,
            workflow_id=self._journal.workflow_id,
            digest=self._digest,
            channel=channel,
            round=number,
        )
        body: dict[str, Any] = {"digest": self._digest, "channel": channel, "round": number}
        try:
            region = self._journal.request.region
            told = await policies.notice(order, self._journal.admitted.pace, region)
        except ActivityError as error:
            if is_cancelled_exception(error):
                return
            kind, body = EventType.NOTICE_FAILED, body | {"reason": policies.error_text(error)}
            workflow.logger.warning("nobody was told on channel %s; mend it", channel)
        else:
            kind = EventType.DELIVERY
            body |= {"at": told.at.isoformat(), "reference": told.reference, "missed": told.missed}
        self._sending.pop(key, None)
        await self._record(kind, body)

    async def _record(self, kind: EventType, body: dict[str, Any]) -> None:
        async with self._journal.writing():
            while self._is_waiting() and not await self._journal.append((kind, body)):
                pass
