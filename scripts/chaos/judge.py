"""What must hold when all runs have ended: one outcome, one effect per key, ledger and effect agree."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from activities.services.database import Database
from activities.services.ledger_store import LedgerStore
from activities.services.requests import Requests
from models.gate import Kind
from models.ledger import Event, EventType, act_stream
from models.loop import Guarantee, Outcome, Status
from models.orders import Pace
from models.policy import Policy
from models.settings import Settings
from scripts.chaos.cases import BLIND, Case, Story
from scripts.chaos.worker import arms_of, letters
from workers.compose import utc_now

EVERYTHING = 10_000_000


@dataclass(frozen=True, slots=True)
class Found:
    """What the targets hold: how often each action key had an effect, and how often one was taken back."""

    effects: Counter[str] = field(default_factory=Counter[str])
    undone: Counter[str] = field(default_factory=Counter[str])


async def judge(
    settings: Settings, database: Database, cases: Sequence[Case], outcomes: Mapping[str, Outcome]
) -> list[str]:
    """Everything that is wrong, in words; empty means that all promises held."""
    ledger = LedgerStore(database, utc_now)
    requests = Requests(database, Policy(), Pace(), utc_now)
    events = await ledger.tail(settings.tenant, EVERYTHING)
    wrong = list(_gaps(events))
    found = look(settings)
    known: set[str] = set()
    for case in cases:
        own = [event for event in events if event.correlation_id == case.workflow_id]
        claim = await requests.outcome(settings.tenant, case.agent, case.key)
        outcome = outcomes[case.workflow_id]
        known |= {str(event.body["key"]) for event in own if event.type is EventType.APPLY}
        complaints = (
            *_outcome(case, own, outcome, claim),
            *_order(own),
            *_effects(case, own, outcome, found),
        )
        wrong += [f"{case.key}: {text}" for text in complaints]
    wrong += [f"an effect nobody ordered: {key}" for key in found.effects if key not in known]
    return wrong


def look(settings: Settings) -> Found:
    """Count effects at the targets themselves."""
    found = Found()
    notes = settings.data / "notes"
    found.effects.update(path.name for path in _files(notes / "notes"))
    found.undone.update(str(json.loads(path.read_bytes())["undoes"]) for path in _files(notes / "undone"))
    for site in settings.sites:
        _look_at(settings.data / site.repository, site.branch, found)
    for guarantee in (Guarantee.ASKED, Guarantee.BLIND):
        found.effects.update(letters(settings, guarantee, arms_of(settings)).keys())
    return found


def _look_at(repository: Path, branch: str, found: Found) -> None:
    if not repository.exists():
        return
    trailers = "%(trailers:key=Countersign-Action,valueonly,separator=%x20)"
    undoes = "%(trailers:key=Countersign-Undoes,valueonly,separator=%x20)"
    command = ["git", "-C", str(repository), "log", branch, f"--format=%H|{trailers}|{undoes}"]
    rows = [line.split("|") for line in subprocess.check_output(command, text=True).splitlines()]
    keys = {commit: key for commit, key, _ in rows}
    for _, key, undone in rows:
        if undone:
            found.undone[keys[undone]] += 1
        elif key:
            found.effects[key] += 1


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def _gaps(events: Sequence[Event]) -> Iterator[str]:
    if [event.seq for event in events] != list(range(1, len(events) + 1)):
        yield "the ledger's sequence has gaps"
    streams: Counter[str] = Counter()
    for event in events:
        streams[event.stream] += 1
        if event.version != streams[event.stream]:
            yield f"stream {event.stream} has a gap before version {event.version}"
    doubled = [one for one, count in Counter(event.event_id for event in events).items() if count > 1]
    yield from (f"event {one} stands twice" for one in doubled)


def _outcome(case: Case, events: Sequence[Event], outcome: Outcome, claim: Outcome | None) -> Iterator[str]:
    logged = [event for event in events if event.type is EventType.OUTCOME]
    if len(logged) != 1:
        yield f"{len(logged)} outcomes in the ledger"
        return
    if Outcome.model_validate(logged[0].body) != outcome:
        yield "the workflow returned another outcome than the ledger holds"
    if claim != outcome:
        yield "the claim holds another outcome than the workflow returned"
    if outcome.status not in case.expected:
        yield f"ended as {outcome.status} ({outcome.reason}); expected {', '.join(sorted(case.expected))}"
    # What comes too late is refused on record. A doubt may be lifted: an attempt that was stopped wakes and
    # tells what it had done. Nothing else may follow.
    allowed = {EventType.REFUSAL} | ({EventType.RECEIPT} if outcome.status is Status.IN_DOUBT else set())
    after = [event.type for event in events if event.seq > logged[0].seq]
    if not allowed.issuperset(after):
        yield f"logged after the outcome: {', '.join(after)}"


def _order(events: Sequence[Event]) -> Iterator[str]:
    """Every effect's events stand in their order: intent, verdict, apply, receipt."""
    counted: dict[str, list[str]] = {}
    intents: set[str] = set()
    begun: set[str] = set()
    received: Counter[str] = Counter()
    for event in events:
        match event.type:
            case EventType.INTENT:
                intents.add(str(event.body["digest"]))
            case EventType.VERDICT:
                counted.setdefault(str(event.body["digest"]), []).append(str(event.body["kind"]))
            case EventType.APPLY:
                begun.add(str(event.body["key"]))
                if event.body["digest"] not in intents or counted.get(event.body["digest"]) != [Kind.APPROVE]:
                    yield f"apply of {event.body['key']} before its intent and its one verdict"
            case EventType.COMPENSATION if event.stream == act_stream(event.correlation_id):
                begun.add(str(event.body["key"]))
            case EventType.RECEIPT:
                received[str(event.body["key"])] += 1
                if event.body["key"] not in begun:
                    yield f"receipt of {event.body['key']} without an apply before it"
            case _:
                pass
    yield from (f"{len(kinds)} verdicts on {one}" for one, kinds in counted.items() if len(kinds) != 1)
    yield from (f"{count} receipts of {key}" for key, count in received.items() if count != 1)


def _effects(case: Case, events: Sequence[Event], outcome: Outcome, found: Found) -> Iterator[str]:
    applied = {str(event.body["key"]) for event in events if event.type is EventType.APPLY}
    receipts = {str(event.body["key"]) for event in events if event.type is EventType.RECEIPT}
    for key in sorted(applied):
        effects, undone = found.effects[key], found.undone[key]
        if effects > 1 or undone > 1:
            yield f"{key}: {effects} effects, {undone} undone"
        if effects != (key in receipts) and outcome.status is not Status.IN_DOUBT:
            yield f"{key}: {effects} effects, but the ledger has {int(key in receipts)} receipts"
        if undone != (f"{key}.undo" in receipts):
            yield f"{key}: taken back {undone} times, which the ledger does not say"
    yield from _count(case, events, outcome, found)


def _count(case: Case, events: Sequence[Event], outcome: Outcome, found: Found) -> Iterator[str]:
    keys = {str(event.body["key"]) for event in events if event.type is EventType.APPLY}
    standing = sum(found.effects[key] - found.undone[key] for key in keys)
    if outcome.status is Status.EXECUTED and standing != 1:
        yield f"executed, but {standing} effects stand"
    if outcome.status in (Status.REJECTED, Status.COMPENSATED) and standing:
        yield f"{outcome.status}, but {standing} effects stand"
    if outcome.status is Status.REJECTED and keys:
        yield "rejected, but an apply was begun"
    if case.connector == BLIND and sum(event.type is EventType.APPLY for event in events) > 1:
        yield "a target that cannot be asked was tried twice"
    intents = sum(event.type is EventType.INTENT for event in events)
    if intents != (2 if case.story is Story.DRIFTED else 1):
        yield f"{intents} intents"
