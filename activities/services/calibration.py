"""Holds what people and code said of answers against how sure their models were, and keeps what comes of it.

A calibration is an event like any other: whoever reads the ledger can make it again from the events before
it. A verdict speaks of all answers that the card before it rests on; that is coarse, and the best there is.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, select

from activities.services.database import Database
from activities.services.ledger_store import EVENT, add_in, entries_in
from models.calibration import Fit, Judged, Odds, fits_of, odds_of
from models.canonical import derived_id, digest_of
from models.gate import Kind
from models.inference import Answered, Weigh
from models.ledger import Draft, EventType, calibration_stream, route_stream
from models.loop import Status

FRESH = timedelta(seconds=30)
"""How long a process believes the calibration it read."""
MOST = 10_000
"""Answers a fit rests on at most; the newest count."""
READ = (EventType.ANSWER, EventType.VERDICT, EventType.OUTCOME)
CARRIED_OUT = frozenset({Status.EXECUTED, Status.PARTLY_EXECUTED, Status.COMPENSATED})

Told = tuple[EventType, str, Mapping[str, Any]]
"""An event: type, run and body."""


@dataclass(slots=True)
class _Run:
    """What of one run waits for a verdict."""

    waiting: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    approved: bool = False


class Calibrations:
    """The calibrations of all tasks."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        """The clock says when to read again."""
        self._database = database
        self._clock = clock
        self._known: dict[tuple[str, str], tuple[datetime, Mapping[str, Odds]]] = {}

    async def odds(self, tenant: str, task: str) -> Mapping[str, Odds]:
        """What may be relied on at one task, by model."""
        now = self._clock()
        read, known = self._known.get((tenant, task), (None, {}))
        if read is None or now - read >= FRESH:
            known = odds_of(await self._database.read(lambda link: _standing(link, tenant, task)))
            self._known[tenant, task] = (now, known)
        return known

    async def refit(self, tenant: str) -> tuple[Fit, ...]:
        """Fit everything again from the ledger, and put on record what has changed."""
        # Nobody else's writing waits while this reads and fits.
        fits = await self._database.read(lambda link: fits_of(newest(judged_of(_told(link, tenant)))))
        await self._database.write(lambda link: self._keep_all(link, tenant, fits))
        self._known.clear()
        return fits

    def _keep_all(self, link: Connection, tenant: str, fits: Iterable[Fit]) -> None:
        tasks: dict[str, list[Fit]] = defaultdict(list)
        for fit in fits:
            tasks[fit.task].append(fit)
        for task, mine in tasks.items():
            self._keep(link, tenant, task, mine)

    def _keep(self, link: Connection, tenant: str, task: str, fits: list[Fit]) -> None:
        stream = calibration_stream(task)
        body = {"task": task, "fits": [fit.model_dump(mode="json") for fit in fits]}
        standing = entries_in(link, tenant, stream)
        if standing and standing[-1].body == body:
            return
        draft = Draft(
            event_id=derived_id("calibration", tenant, task, len(standing), digest_of(body)),
            stream=stream,
            type=EventType.CALIBRATION,
            actor_kind="system",
            actor_ref="router",
            correlation_id=stream,
            body=body,
        )
        add_in(link, tenant, draft, self._clock())


def weigh_in(
    link: Connection, tenant: str, weigh: Weigh, task: str, answered: Answered, now: datetime
) -> None:
    """Record how sure a model was, in the transaction that keeps its answer; once per route and tier."""
    draft = Draft(
        event_id=derived_id("answer", tenant, weigh.route, answered.tier),
        stream=route_stream(weigh.workflow_id),
        type=EventType.ANSWER,
        actor_kind="system",
        actor_ref="router",
        correlation_id=weigh.workflow_id,
        body={
            "route": weigh.route,
            "task": task,
            "tier": answered.tier,
            "model": answered.model,
            "confidence": answered.confidence,
            "unsure": answered.unsure,
            "problems": len(answered.problems),
        },
    )
    add_in(link, tenant, draft, now)


def judged_of(told: Iterable[Told]) -> Iterator[Judged]:
    """What became of answers, in the order in which that was known.

    A verdict of people counts first. Where a run was carried out without one, the checks of code count. An
    answer that waits, that was passed on, or whose run ended without anybody's judgement counts as one that
    nobody judged, unless code objected.
    """
    runs: dict[str, _Run] = defaultdict(_Run)
    for kind, name, body in told:
        yield from _taken(runs[name], kind, body)
    for run in runs.values():
        yield from _by_code(run, carried_out=False)


def newest(judged: Iterable[Judged]) -> list[Judged]:
    """The last ones of each task and model."""
    kinds: dict[tuple[str, str, str | None], list[Judged]] = defaultdict(list)
    for one in judged:
        kinds[one.task, one.model, one.after].append(one)
    return [one for kind in kinds.values() for one in kind[-MOST:]]


def _taken(run: _Run, kind: EventType, body: Mapping[str, Any]) -> Iterator[Judged]:
    if kind is EventType.ANSWER:
        run.waiting.append(body)
    elif kind is EventType.OUTCOME:
        carried_out = body.get("status") in CARRIED_OUT
        if run.approved and carried_out:
            yield from _by_people(run, right=True)
        else:
            yield from _by_code(run, carried_out)
    elif body.get("kind") == Kind.APPROVE:
        run.approved = True
    elif body.get("kind") in (Kind.REVISE, Kind.REJECT):
        yield from _by_people(run, right=False)


def _by_people(run: _Run, right: bool) -> Iterator[Judged]:
    waiting, run.waiting, run.approved = run.waiting, [], False
    for one in waiting:
        # Of one that was doubted people saw what the next tier made of it.
        yield _judged(one, waiting, None if one["unsure"] else right, by_people=not one["unsure"])


def _by_code(run: _Run, carried_out: bool) -> Iterator[Judged]:
    waiting, run.waiting = run.waiting, []
    for one in waiting:
        says = one["problems"] or (carried_out and not one["unsure"])
        yield _judged(one, waiting, not one["problems"] if says else None, by_people=False)


def _judged(
    one: Mapping[str, Any], waiting: Iterable[Mapping[str, Any]], right: bool | None, by_people: bool
) -> Judged:
    earlier = [other for other in waiting if other["route"] == one["route"] and other["tier"] != one["tier"]]
    doubted = next((other for other in earlier if other["unsure"]), None)
    if doubted is None or one["unsure"]:
        return Judged(one["task"], one["model"], one["confidence"], right, by_people)
    return Judged(one["task"], one["model"], doubted["confidence"], right, by_people, doubted["model"])


def _told(link: Connection, tenant: str) -> Iterator[Told]:
    wanted = (EVENT.c.log_id == tenant) & EVENT.c.type.in_([kind.value for kind in READ])
    query = select(EVENT.c.type, EVENT.c.correlation_id, EVENT.c.envelope).where(wanted)
    for kind, run, envelope in link.execute(query.order_by(EVENT.c.seq)):
        yield EventType(kind), run, json.loads(envelope)["body"]


def _standing(link: Connection, tenant: str, task: str) -> tuple[Fit, ...]:
    entries = entries_in(link, tenant, calibration_stream(task))
    return tuple(Fit.model_validate(one) for one in entries[-1].body["fits"]) if entries else ()
