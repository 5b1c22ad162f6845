"""Temporal schedules from settings: create what is missing, change what differs, delete ours that are gone.

A schedule repeats one fixed request. Temporal gives each run an id that ends in its scheduled time, and the
request's key derives from that id, so that each time is one request and a start that is sent twice acts once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import ValidationError
from temporalio.api.common.v1 import Payload
from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleDescription,
    ScheduleHandle,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    ScheduleState,
    ScheduleUpdate,
    ScheduleUpdateInput,
)
from temporalio.service import RPCError, RPCStatusCode

from models.canonical import sha256
from models.errors import InvalidInput, UnknownName
from models.loop import Frozen, Request
from models.settings import ScheduleSettings, TemporalSettings
from models.visibility import Queue
from temporal.client import attributes
from temporal.converter import is_sealed, unveiled, veiled

MEMO_SCHEDULE = "schedule"
"""On the runs of a schedule, and thereby in the schedule: what it was made from."""
CATCH_UP = timedelta(days=1)
"""A time missed by more than this, because Temporal was away, is left out."""
NEXT_TIMES = 3


class Change(StrEnum):
    """What applying did to one schedule."""

    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"
    DELETED = "deleted"


class Standing(StrEnum):
    """How a schedule in Temporal compares with the settings."""

    APPLIED = "applied"
    DIFFERENT = "different"
    MISSING = "missing"
    SURPLUS = "surplus"


class Mark(Frozen):
    """What a schedule was made from."""

    name: str
    digest: str
    paused: bool


class Changed(Frozen):
    """One schedule after applying."""

    name: str
    id: str
    change: Change


class Scheduled(Frozen):
    """One schedule as it stands in Temporal and in the settings."""

    name: str
    id: str
    agent: str
    standing: Standing
    paused: bool = False
    note: str = ""
    cron: str = ""
    """As the settings say; Temporal keeps its own form of it."""
    next: tuple[datetime, ...] = ()
    runs: tuple[str, ...] = ()
    """Workflow ids of recent runs."""


class Schedules:
    """The schedules of one tenant."""

    def __init__(self, client: Client, tenant: str, settings: TemporalSettings) -> None:
        """Schedules of other tenants in the same namespace are left alone."""
        self._client = client
        self._codec = client.data_converter.payload_codec
        self._tenant = tenant
        self._settings = settings

    async def apply(self, wanted: Sequence[ScheduleSettings], agents: Collection[str]) -> list[Changed]:
        """Make Temporal hold exactly the schedules of the settings; applying twice changes nothing.

        A schedule that was paused by hand or by a failed run stays paused.

        Raises:
            InvalidInput: a schedule names no agent of ours, has a cron Temporal refuses, or a name twice.
        """
        _check(wanted, agents)
        changed = [await self._put(one) for one in wanted]
        kept = {schedule_id(self._tenant, one.name) for one in wanted}
        for gone in [found for found in await self._ids() if found not in kept]:
            await self._delete(gone)
            changed.append(Changed(name=self._name(gone), id=gone, change=Change.DELETED))
        return changed

    async def listed(self, wanted: Sequence[ScheduleSettings]) -> list[Scheduled]:
        """Every schedule of ours, in Temporal or in the settings."""
        by_id = {schedule_id(self._tenant, one.name): one for one in wanted}
        ids = list(dict.fromkeys([*by_id, *await self._ids()]))
        return [await self._described(found, by_id.get(found)) for found in ids]

    async def pause(self, name: str, note: str) -> None:
        """Start no more runs until `resume`.

        Raises:
            UnknownName: there is no such schedule in Temporal.
        """
        await self._told(name, self.handle(name).pause(note=await veiled(note, self._codec)))

    async def resume(self, name: str, note: str) -> None:
        """Start runs again.

        Raises:
            UnknownName: there is no such schedule in Temporal.
        """
        await self._told(name, self.handle(name).unpause(note=await veiled(note, self._codec)))

    def handle(self, name: str) -> ScheduleHandle:
        """The schedule in Temporal."""
        return self._client.get_schedule_handle(schedule_id(self._tenant, name))

    async def _put(self, one: ScheduleSettings) -> Changed:
        made, found = await self._schedule(one), schedule_id(self._tenant, one.name)
        try:
            await self._client.create_schedule(found, made)
        except ScheduleAlreadyRunningError:
            return Changed(name=one.name, id=found, change=await self._renew(one, made))
        except RPCError as error:
            raise _refusal(one, error) from None
        return Changed(name=one.name, id=found, change=Change.CREATED)

    async def _renew(self, one: ScheduleSettings, made: Schedule) -> Change:
        change = Change.UNCHANGED

        async def renewed(given: ScheduleUpdateInput) -> ScheduleUpdate | None:
            nonlocal change
            standing = given.description.schedule
            mark = await self._mark(standing)
            if mark is not None and mark.digest == _digest(one) and self._is_kept_alike(standing):
                return None
            change = Change.UPDATED
            state = _state(one, mark, standing.state)
            state = replace(state, note=await veiled(state.note or "", self._codec) or None)
            return ScheduleUpdate(schedule=replace(made, state=state))

        try:
            await self.handle(one.name).update(renewed)
        except RPCError as error:
            raise _refusal(one, error) from None
        return change

    async def _delete(self, found: str) -> None:
        try:
            await self._client.get_schedule_handle(found).delete()
        except RPCError as error:
            # Listing lags behind; one that is gone already is as wanted.
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise

    async def _ids(self) -> list[str]:
        ours = schedule_id(self._tenant, "")
        found = await self._client.list_schedules()
        return sorted([each.id async for each in found if each.id.startswith(ours)])

    async def _described(self, found: str, wanted: ScheduleSettings | None) -> Scheduled:
        try:
            described = await self._client.get_schedule_handle(found).describe()
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            return Scheduled(
                name=self._name(found),
                id=found,
                agent=wanted.agent if wanted else "",
                cron=wanted.cron if wanted else "",
                standing=Standing.MISSING,
            )
        schedule = described.schedule
        note = await unveiled(schedule.state.note or "", self._codec)
        mark = await self._mark(schedule) if self._is_kept_alike(schedule) else None
        return _scheduled(self._name(found), described, mark, wanted).model_copy(update={"note": note})

    async def _told(self, name: str, telling: object) -> None:
        try:
            await telling  # pyright: ignore[reportGeneralTypeIssues]
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            known = ", ".join(self._name(found) for found in await self._ids()) or "none"
            raise UnknownName(
                f"schedule: {name!r} is not in Temporal; known: {known}; "
                "`countersign schedules apply` makes those of the settings"
            ) from None

    async def _mark(self, schedule: Schedule) -> Mark | None:
        """What a schedule was made from; `None` if somebody else made it."""
        raw = _raw_mark(schedule)
        if raw is None:
            return None
        try:
            return Mark.model_validate((await self._client.data_converter.decode([raw]))[0])
        except ValidationError:
            return None

    def _is_kept_alike(self, schedule: Schedule) -> bool:
        """Whether it is sealed if anything is: it may be from before encryption was switched on."""
        raw = _raw_mark(schedule)
        return raw is not None and is_sealed(raw) == (self._codec is not None)

    async def _schedule(self, one: ScheduleSettings) -> Schedule:
        request = self._request(one)
        mark = Mark(name=one.name, digest=_digest(one), paused=one.paused)
        return Schedule(
            action=ScheduleActionStartWorkflow(
                one.agent,
                request,
                id=schedule_id(self._tenant, one.name),
                task_queue=Queue.DECIDE,
                task_timeout=self._settings.task_timeout,
                typed_search_attributes=attributes(request),
                static_summary=f"{one.agent}: schedule {one.name}",
                memo={MEMO_SCHEDULE: mark.model_dump()},
            ),
            spec=ScheduleSpec(cron_expressions=[one.cron]),
            policy=SchedulePolicy(
                overlap=ScheduleOverlapPolicy.SKIP, catchup_window=CATCH_UP, pause_on_failure=True
            ),
            state=ScheduleState(note=await veiled(one.note, self._codec) or None, paused=one.paused),
        )

    def _request(self, one: ScheduleSettings) -> Request:
        try:
            return Request(
                tenant=self._tenant,
                agent=one.agent,
                key=schedule_id(self._tenant, one.name),
                key_from_workflow_id=True,
                body=_body(one),
                requester=one.requester,
            )
        except ValidationError as error:
            raise InvalidInput.field(
                f"schedules.{one.name}.body", "(its JSON)", error.errors()[0]["msg"]
            ) from None

    def _name(self, found: str) -> str:
        return found.removeprefix(schedule_id(self._tenant, ""))


def schedule_id(tenant: str, name: str) -> str:
    """The schedule's id in Temporal; no name holds a colon, so no two can meet."""
    return f"countersign-{tenant}:{name}"


def _check(wanted: Iterable[ScheduleSettings], agents: Collection[str]) -> None:
    seen: set[str] = set()
    for one in wanted:
        if one.agent not in agents:
            known = ", ".join(sorted(agents)) or "none"
            raise InvalidInput.field(f"schedules.{one.name}.agent", one.agent, f"known agents: {known}")
        if one.name in seen:
            raise InvalidInput.field("schedules", one.name, "two schedules have that name; rename one")
        seen.add(one.name)


def _raw_mark(schedule: Schedule) -> Payload | None:
    action = schedule.action
    memo = action.memo if isinstance(action, ScheduleActionStartWorkflow) else None
    raw = (memo or {}).get(MEMO_SCHEDULE)
    return raw if isinstance(raw, Payload) else None


def _body(one: ScheduleSettings) -> str:
    return json.dumps(one.body, sort_keys=True, ensure_ascii=False)


def _digest(one: ScheduleSettings) -> str:
    return sha256(one.model_dump_json().encode())


def _state(one: ScheduleSettings, mark: Mark | None, standing: ScheduleState) -> ScheduleState:
    """Only a changed `paused` in the settings overrules the hand that paused."""
    asked = mark is None or mark.paused != one.paused
    paused = one.paused if asked else standing.paused
    note = standing.note if paused and not asked else one.note
    return replace(standing, paused=paused, note=note or None)


def _scheduled(
    name: str, described: ScheduleDescription, mark: Mark | None, wanted: ScheduleSettings | None
) -> Scheduled:
    standing = Standing.SURPLUS
    if wanted is not None:
        same = mark is not None and mark.digest == _digest(wanted)
        standing = Standing.APPLIED if same else Standing.DIFFERENT
    action, state = described.schedule.action, described.schedule.state
    return Scheduled(
        name=name,
        id=described.id,
        agent=action.workflow if isinstance(action, ScheduleActionStartWorkflow) else "",
        standing=standing,
        paused=state.paused,
        note=state.note or "",
        cron=wanted.cron if wanted else "",
        next=tuple(described.info.next_action_times[:NEXT_TIMES]),
        runs=_runs(described),
    )


def _runs(described: ScheduleDescription) -> tuple[str, ...]:
    actions = [recent.action for recent in described.info.recent_actions]
    return tuple(getattr(action, "workflow_id", "") for action in actions)


def _refusal(one: ScheduleSettings, error: RPCError) -> Exception:
    if error.status is not RPCStatusCode.INVALID_ARGUMENT:
        return error
    return InvalidInput.field(
        f"schedules.{one.name}.cron",
        one.cron,
        f"write minute hour day month weekday, as 0 8 * * 1 ({error.message})",
    )
