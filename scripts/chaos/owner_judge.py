"""What must hold of one subject when all its deciders have ended, read from beliefs, ledger and Temporal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select
from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError

from activities.services.beliefs import HEAD, SNAPSHOT, Beliefs, belief_stream
from activities.services.verifier import check_rows
from models.beliefs import Belief, Change, Handled, Settled, Value, apply, owner_id
from models.canonical import sha256
from models.ledger import Event
from scripts.chaos.deciders import ANSWERS, COUNTER, PRICING, SUBJECT, Plan, counts, event_of
from scripts.chaos.supervisor import Chaos
from workers.compose import utc_now

EVERYTHING = 10_000_000


@dataclass(frozen=True, slots=True)
class Term:
    """One run of the owner: when it was open."""

    run: str
    opened: datetime
    closed: datetime | None
    ended: str


async def judge(chaos: Chaos, plan: Plan) -> dict[str, Any]:
    """Counts, and under `wrong` everything that should not be."""
    tenant, beliefs = chaos.settings.tenant, Beliefs(chaos.database, utc_now)
    events = await chaos.ledger.tail(tenant, EVERYTHING)
    past = {agent: await beliefs.history(tenant, agent, SUBJECT, EVERYTHING) for agent in (PRICING, COUNTER)}
    rows = await chaos.database.read(lambda link: _rows(link, tenant))
    answers = list(_answers(chaos.settings.data, plan))
    owners = _owners(events)
    terms = await _terms(chaos, owners)
    wrong = [
        *once(plan, past),
        *(text for agent, history in past.items() for text in _gapless(tenant, agent, history, rows)),
        *(text for agent in past for text in _logged(tenant, agent, rows, events)),
        *fenced(events),
        *one_at_a_time(terms),
        *_kept(answers, past),
        *await chaos.database.read(lambda link: [one.what for one in check_rows(link, tenant)]),
    ]
    return {
        "handled": {agent: len(history) for agent, history in past.items()},
        "owners": len(owners),
        "owners_ended_as": dict(Counter(term.ended for term in terms)),
        "answers_heard": len(answers),
        "repetitions_answered": sum(one.known for one in answers),
        "compare_and_sets_refused": sum(not one.won for one in answers),
        "wrong": wrong[:50],
    }


def _rows(link: Connection, tenant: str) -> dict[tuple[str, int], Any]:
    mine = SNAPSHOT.c.tenant == tenant, SNAPSHOT.c.subject == SUBJECT
    found: dict[tuple[str, int], Any] = {
        (row.agent, row.version): row for row in link.execute(select(SNAPSHOT).where(*mine))
    }
    heads = link.execute(select(HEAD).where(HEAD.c.tenant == tenant, HEAD.c.subject == SUBJECT))
    return found | {(row.agent, 0): row for row in heads}


def _head(agent: str, rows: Mapping[tuple[str, int], Any]) -> int:
    return int(rows[agent, 0].version) if (agent, 0) in rows else 0


def _answers(data: Path, plan: Plan) -> Iterator[Handled]:
    for number in range(plan.processes):
        lines = (data / ANSWERS.format(number)).read_text().splitlines(keepends=True)
        # A process that was killed may have left half a line.
        yield from (Handled.model_validate_json(line) for line in lines if line.endswith("}\n"))


def once(plan: Plan, past: Mapping[str, Sequence[Settled]]) -> Iterator[str]:
    """Each event of each decider was handled, and none twice."""
    own = [
        (event_of(name, number), counts(number))
        for process in range(plan.processes)
        for name in plan.names(process)
        for number in range(plan.share(name))
    ]
    wanted = {
        PRICING: [one for one, count in own if not count],
        COUNTER: [one for one, count in own if count],
    }
    for agent, events in wanted.items():
        handled = Counter(one.reason.partition(".")[0] for one in past[agent])
        yield from (f"{agent}: {one} was handled {handled[one]} times" for one in events if handled[one] != 1)
        yield from (f"{agent}: {one} was never sent" for one in handled.keys() - set(events))


def _gapless(
    tenant: str, agent: str, history: Sequence[Settled], rows: Mapping[tuple[str, int], Any]
) -> Iterator[str]:
    """Each version is the one before it and its own event, and nothing else: no update was lost."""
    before = Belief(tenant=tenant, agent=agent, subject=SUBJECT)
    for one in history:
        if one.belief != apply(before, _change(before, one.reason)):
            yield f"{agent}: version {one.belief.version} is not version {before.version} and {one.reason}"
        before = one.belief
    if _head(agent, rows) != len(history):
        yield f"{agent}: the head is at {_head(agent, rows)}, {len(history)} versions stand"


def _change(before: Belief, event: str) -> Change:
    name, _, rest = event.partition("-")
    key, value = (name, int(rest) + 1) if before.agent == PRICING else ("count", _count(before) + 1)
    sets: dict[str, Value] = {key: value}
    return Change(tenant=before.tenant, agent=before.agent, subject=SUBJECT, event=event, sets=sets)


def _count(before: Belief) -> int:
    return int(before.value("count") or 0)


def _logged(
    tenant: str, agent: str, rows: Mapping[tuple[str, int], Any], events: Sequence[Event]
) -> Iterator[str]:
    """The ledger says the same as the beliefs, version by version, from the same owner."""
    stream = belief_stream(tenant, agent, SUBJECT)
    logged = [event for event in events if event.stream == stream]
    if len(logged) != _head(agent, rows):
        yield f"{agent}: {_head(agent, rows)} versions, {len(logged)} ledger events"
        return
    for number, event in enumerate(logged, 1):
        row = rows[agent, number]
        same = (number, row.digest, row.epoch, row.event_id)
        told = (event.body["version"], event.body["state"], event.body["epoch"], event.causation_id)
        if (event.version, *told) != (number, *same) or row.digest != sha256(bytes(row.state)):
            yield f"{agent}: version {number} and its ledger event differ"


def _owners(events: Sequence[Event]) -> dict[str, int]:
    """Runs that changed the subject, in order, and the last epoch of each."""
    return {str(event.body["owner"]): int(event.body["epoch"]) for event in events if "owner" in event.body}


def fenced(events: Sequence[Event]) -> Iterator[str]:
    """Epochs of writes only grow, and each is one run's."""
    holders: dict[int, set[str]] = {}
    last = 0
    for event in (event for event in events if "owner" in event.body):
        epoch = int(event.body["epoch"])
        if epoch < last:
            yield f"ledger event {event.seq}: a write of epoch {epoch} after one of {last}"
        last = epoch
        holders.setdefault(epoch, set()).add(str(event.body["owner"]))
    yield from (f"epoch {epoch} had {len(runs)} owners" for epoch, runs in holders.items() if len(runs) > 1)


async def _terms(chaos: Chaos, owners: Mapping[str, int]) -> list[Term]:
    """What Temporal says of every run that changed the subject."""
    terms: list[Term] = []
    for run in owners:
        handle = chaos.client.get_workflow_handle(owner_id(chaos.settings.tenant, SUBJECT), run_id=run)
        try:
            one = await handle.describe()
        except RPCError as error:
            terms.append(Term(run, utc_now(), utc_now(), f"unknown: {error.message}"))
            continue
        status = one.status or WorkflowExecutionStatus.RUNNING
        terms.append(Term(run, one.start_time, one.close_time, status.name.lower()))
    return terms


def one_at_a_time(terms: Sequence[Term]) -> Iterator[str]:
    """No run was open before the one before it had closed, and they wrote in that order."""
    for before, after in zip(terms, terms[1:], strict=False):
        if before.closed is None or before.closed > after.opened:
            yield f"owner {after.run} was there before {before.run} had ended"


def _kept(answers: Sequence[Handled], past: Mapping[str, Sequence[Settled]]) -> Iterator[str]:
    """Whoever was told that a change stands finds it at that version."""
    standing = {(one.belief.agent, one.reason): one.belief.version for of in past.values() for one in of}
    for one in answers:
        if standing.get((one.agent, one.event)) != (one.version if one.won else None):
            yield f"{one.agent}: {one.event} was answered {one.won} at {one.version}, and that is not so"
