"""What the ledger says of proposals that people approved unchanged, and what that suggests.

A class of actions is an agent, an operation on a connector, and how such an action could be taken back. Each
run counts once for every class in its first proposal. A drift or a rollback ends the record of its classes:
what was earned before it suggests nothing any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from models.gate import Kind, Standing
from models.ledger import Event, EventType
from models.loop import Exemption, Frozen, Reversibility, Status
from models.policy import GATE_POLICY, OUTDATED, SEVERITY, AgentPolicy

CONFIDENCE = 0.95
"""Of the interval, both sides together."""
TOLD = (
    EventType.REQUEST,
    EventType.PLAN,
    EventType.INTENT,
    EventType.VERDICT,
    EventType.GATE,
    EventType.DRIFT,
    EventType.COMPENSATION,
    EventType.OUTCOME,
)
"""The events that a record is made of."""
UNDONE = (
    Status.PARTLY_EXECUTED,
    Status.STALE,
    Status.COMPENSATED,
    Status.COMPENSATION_FAILED,
    Status.IN_DOUBT,
)


class ActionClass(Frozen):
    """Actions that are trusted, or not, as one."""

    agent: str
    connector: str
    operation: str
    reversibility: Reversibility


class Record(Frozen):
    """What became of proposals with one class of actions, since the last one that was undone."""

    unchanged: int = 0
    """Approved by people as they were first proposed, and carried out."""
    revised: int = 0
    rejected: int = 0
    alone: int = 0
    """Carried out without a person, by a limit or a grant."""
    expired: int = 0
    undone: int = 0
    """Drifted, taken back, or not known to be done; ever."""
    undone_at: datetime | None = None
    """The last time; the numbers before `undone` count from there."""

    @property
    def decided(self) -> int:
        """Proposals that people have said something about."""
        return self.unchanged + self.revised + self.rejected


class Suggestion(StrEnum):
    """What a person may want to do about a policy."""

    ASK = "ask"
    """Go on asking people."""
    GRANT = "grant"
    """Consider a narrow grant."""
    KEEP = "keep"
    """It passes without a person already, and nothing on record speaks against that."""
    NARROW = "narrow"
    """It passes without a person, and one was undone since: ask people again."""


class Advice(Frozen):
    """A class of actions, its record, and what that suggests."""

    action: ActionClass
    record: Record
    lower_permille: int
    """Between these lies the share that people would approve unchanged, rounded away from each other."""
    upper_permille: int
    suggestion: Suggestion
    why: str


@dataclass(slots=True)
class _Run:
    agent: str = ""
    planned: tuple[ActionClass, ...] = ()
    digest: str = ""
    approved: bool = False
    alone: bool = False
    settled: bool = False
    """It has counted, or cannot count any more."""


@dataclass(slots=True)
class Tally:
    """Follows the events of a tenant in the order of the log."""

    records: dict[ActionClass, Record] = field(default_factory=dict[ActionClass, Record])
    _runs: dict[str, _Run] = field(default_factory=dict[str, _Run])

    def take(self, event: Event) -> None:
        """Count the next event."""
        if event.stream != event.correlation_id:
            return
        run = self._runs.setdefault(event.stream, _Run())
        match event.type:
            case EventType.REQUEST:
                run.agent = str(event.body.get("agent", ""))
            case EventType.PLAN:
                run.planned = tuple(dict.fromkeys(_classes(run.agent, event.body)))
            case EventType.INTENT:
                run.digest, run.approved, run.alone = str(event.body.get("digest")), False, False
            case EventType.VERDICT:
                self._verdict(run, event.body)
            case EventType.GATE:
                self._gate(run, event.body)
            case EventType.DRIFT if event.body.get("reason") == OUTDATED:
                pass  # People changed the rules; nothing speaks against the action.
            case EventType.DRIFT | EventType.COMPENSATION:
                self._undone(run, event.recorded_at)
            case EventType.OUTCOME:
                self._outcome(run, event)
            case _:
                pass

    def _verdict(self, run: _Run, body: dict[str, Any]) -> None:
        if body.get("digest") != run.digest:
            return
        match body.get("kind"):
            case Kind.APPROVE:
                run.approved = True
                # Nobody approved it who had to; it says nothing of what people would approve.
                run.settled = run.settled or bool(body.get("break_glass"))
            case Kind.REVISE:
                self._count(run, "revised")
            case Kind.REJECT:
                self._count(run, "rejected")
            case _:
                pass

    def _gate(self, run: _Run, body: dict[str, Any]) -> None:
        if body.get("digest") != run.digest:
            return
        if body.get("standing") == Standing.PASSED:
            run.alone = True
        elif body.get("standing") == Standing.EXPIRED:
            self._count(run, "expired")

    def _outcome(self, run: _Run, event: Event) -> None:
        status = event.body.get("status")
        if status == Status.EXECUTED and (run.alone or run.approved):
            self._count(run, "alone" if run.alone else "unchanged")
        elif status in UNDONE and (run.alone or run.approved):
            self._undone(run, event.recorded_at)
        self._runs.pop(event.stream, None)

    def _count(self, run: _Run, what: str) -> None:
        if run.settled:
            return
        run.settled = True
        for one in run.planned:
            record = self.records.get(one, Record())
            self.records[one] = record.model_copy(update={what: getattr(record, what) + 1})

    def _undone(self, run: _Run, at: datetime) -> None:
        run.settled = True
        run.approved = run.alone = False
        for one in run.planned:
            undone = self.records.get(one, Record()).undone + 1
            self.records[one] = Record(undone=undone, undone_at=at)


def tally(events: Iterable[Event]) -> dict[ActionClass, Record]:
    """The record of each class of actions; events of one tenant in the order of the log."""
    counted = Tally()
    for event in events:
        counted.take(event)
    return counted.records


def advice(
    action: ActionClass, record: Record, policy: AgentPolicy | None, now: datetime, earned_permille: int
) -> Advice:
    """What a record suggests under the policy of now; never more than the lower end of the interval bears."""
    lower, upper = interval(record.unchanged, record.decided)
    low, high = math.floor(1000 * lower), math.ceil(1000 * upper)
    passes = policy is not None and may_pass(policy, action, now)
    suggestion, why = _suggested(action, record, passes, low, earned_permille)
    return Advice(
        action=action, record=record, lower_permille=low, upper_permille=high, suggestion=suggestion, why=why
    )


def may_pass(policy: AgentPolicy, action: ActionClass, now: datetime) -> bool:
    """Whether policy lets some action of this class pass without a person."""
    rule, severity = policy.gate, SEVERITY.index(action.reversibility)
    alone = rule.automatic and severity <= SEVERITY.index(Reversibility(rule.automatic_up_to))
    return alone or any(_speaks_of(grant, action) and now <= grant.valid_until for grant in policy.grants)


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Clopper and Pearson's interval at `CONFIDENCE`; exact, so that few cases never look like many."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials} is no share")
    return _lower(successes, trials), 1.0 - _lower(trials - successes, trials)


def _suggested(
    action: ActionClass, record: Record, passes: bool, low: int, earned: int
) -> tuple[Suggestion, str]:
    share = f"{record.unchanged} of {record.decided} approved unchanged"
    since = "" if record.undone_at is None else f" since one was undone at {record.undone_at.isoformat()}"
    if passes and record.undone_at is not None and low < earned:
        return Suggestion.NARROW, f"it passes without a person, and there are {share}{since}"
    if passes:
        return Suggestion.KEEP, f"it passes without a person, {record.alone} times{since}"
    if action.connector == GATE_POLICY:
        return Suggestion.ASK, "a change of policy always needs people"
    if action.reversibility is Reversibility.IRREVERSIBLE:
        return Suggestion.ASK, "what cannot be taken back needs a person, whatever the record"
    if low < earned:
        return Suggestion.ASK, f"{share}{since} bear {_percent(low)}, {_percent(earned)} are wanted"
    return Suggestion.GRANT, f"{share}{since} bear {_percent(low)}; a narrow grant may save asking"


def _speaks_of(grant: Exemption, action: ActionClass) -> bool:
    same = grant.connector == action.connector and action.operation in grant.operations
    return same and SEVERITY.index(action.reversibility) <= SEVERITY.index(grant.up_to)


def _classes(agent: str, body: dict[str, Any]) -> Iterator[ActionClass]:
    for plan in body.get("plans", ()):
        yield ActionClass(
            agent=agent,
            connector=plan["connector"],
            operation=plan["operation"],
            reversibility=plan["reversibility"],
        )


def _lower(successes: int, trials: int) -> float:
    """The share at which so many successes, or more, would be as unlikely as the interval allows."""
    if successes == 0:
        return 0.0
    low, high = 0.0, successes / trials
    for _ in range(60):
        middle = (low + high) / 2
        if _at_least(successes, trials, middle) < (1 - CONFIDENCE) / 2:
            low = middle
        else:
            high = middle
    return low


def _at_least(successes: int, trials: int, share: float) -> float:
    """How likely so many successes, or more, are; `share` lies below `successes / trials`, so terms fall."""
    total = 0.0
    for count in range(successes, trials + 1):
        ways = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
        chance = ways + count * math.log(share) + (trials - count) * math.log1p(-share)
        term = math.exp(chance)
        total += term
        if term < total * 1e-17:
            break
    return total


def _percent(permille: int) -> str:
    return f"{permille // 10}.{permille % 10} %"
