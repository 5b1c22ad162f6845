"""`python -m tests.record_histories` writes `tests/histories/*.json` from real runs, one per path.

Run it when a history is wanted that today's code should replay for ever; never to make a failing replay pass.
"""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from temporalio.client import WorkflowContinuedAsNewError, WorkflowFailureError

from activities.connectors.null import Null
from activities.services.beliefs import Beliefs
from activities.tiers.scripted import Scripted
from models.beliefs import Change, Mail, Ownership, Owning, owner_id
from models.calibration import Calibrated
from models.content import ContentSettings
from models.gate import ANYBODY, Answer, Kind, recorded
from models.knowledge import Warmed
from models.ledger import EventType
from models.loop import GateRule, Outcome, Request
from models.orders import Pace
from models.policy import AgentPolicy
from models.settings import Settings, SiteSettings, TemporalSettings, TierSettings
from models.visibility import Queue, Role
from temporal import dev_server
from temporal.beliefs import settle, tell
from temporal.client import Started, submit
from tests.conftest import ROLES, a_key, free_port, note, settings_for, stack_of
from tests.shared import Odd, Shared, odd, policies
from tests.test_agents_content import BRIEF
from tests.test_amendments import agrees, proposal_of, settings_with
from tests.test_calendar import ask, child, editor, remember
from tests.test_signatures import make_key
from tests.variants import AGENTS
from workers.compose import Parts, utc_now

FOLDER = Path(__file__).parent / "histories"
Flow = Callable[[Shared], Awaitable[Started]]
FLOWS: dict[str, Flow] = {}
SIGNING = "ann"
"""File of the key that signs, in the data folder."""
SHORT = ("--dynamic-config-value", "limit.historyCount.suggestContinueAsNew=60")
KINDS: dict[str, tuple[Any, ...]] = {"policy": (True,), "long": (False, *SHORT)}
"""Whether people are named, and flags of the server, for flows whose names begin so."""
IDENTITY = re.compile(r"\d+@[A-Za-z0-9.\-]+")


def flow(run: Flow) -> Flow:
    FLOWS[run.__name__] = run
    return run


async def approved(shared: Shared, *actions: dict[str, Any], agent: str = "external") -> Started:
    run = await shared.propose(a_key(), *actions, agent=agent)
    await shared.approve(run)
    return run


@flow
async def external_approved(shared: Shared) -> Started:
    return await approved(shared, note("one"), note("two"))


@flow
async def external_rejected(shared: Shared) -> Started:
    run = await shared.propose(a_key(), note())
    await shared.answer(run, Kind.REJECT, await shared.digest(run), comment="no")
    return run


@flow
async def external_revised_twice(shared: Shared) -> Started:
    run = await shared.propose(a_key(), note(), reasons="because")
    for number in (1, 2):
        digest = await shared.digest(run, number)
        await run.handle.signal("revise", {"digest": digest, "approver": "ann", "comment": "again"})
    await shared.approve(run, 3)
    return run


@flow
async def external_refused_then_delegated(shared: Shared) -> Started:
    run = await shared.propose(a_key(), note())
    digest = await shared.digest(run)
    await run.handle.signal("approve")
    await run.handle.signal("approve", args=[1, 2])
    await shared.answer(run, Kind.APPROVE, "0" * 64)
    await shared.answer(run, Kind.DELEGATE, digest, to="bob")
    await shared.answer(run, Kind.APPROVE, digest)
    await shared.answer(run, Kind.APPROVE, digest, approver="bob")
    return run


@flow
async def external_crowded(shared: Shared) -> Started:
    run = await shared.propose(a_key(), note())
    digest = await shared.digest(run)
    junk = {"digest": "0" * 64, "approver": "eve@example.test"}
    await asyncio.gather(*(run.handle.signal("approve", junk) for _ in range(60)))
    await shared.answer(run, Kind.APPROVE, digest)
    return run


@flow
async def external_drifted(shared: Shared) -> Started:
    name = a_key()
    run = await shared.propose(a_key(), note("drift", target=name))
    digest = await shared.digest(run)
    shared.target(name, "changed")
    await shared.answer(run, Kind.APPROVE, digest)
    await shared.approve(run, 2)
    return run


@flow
async def external_compensated(shared: Shared) -> Started:
    return await approved(shared, odd("a"), odd("b"), odd("c", fail="rejected"))


@flow
async def external_compensation_failed(shared: Shared) -> Started:
    return await approved(shared, odd("a", stuck=True), odd("b", fail="rejected"))


@flow
async def external_cancelled_while_waiting(shared: Shared) -> Started:
    run = await shared.propose(a_key(), note())
    await shared.digest(run)
    await run.handle.cancel()
    return run


@flow
async def external_cancelled_while_acting(shared: Shared) -> Started:
    shared.odd.reset()
    run = await approved(shared, odd("a", hold="apply"), odd("b"))
    await shared.odd.reached.wait()
    await run.handle.cancel()
    shared.odd.go_on.set()
    return run


@flow
async def external_taken_up_again(shared: Shared) -> Started:
    key = a_key()
    run = await shared.propose(key, note("again"))
    digest = await shared.digest(run)
    await run.handle.terminate()
    again = await shared.propose(key, note("again"))
    await shared.answer(again, Kind.APPROVE, digest)
    return again


@flow
async def external_answered_already(shared: Shared) -> Started:
    key = a_key()
    run = await shared.propose(key, note("answered"))
    await shared.approve(run)
    await run.handle.result()
    return await shared.propose(key, note("answered"))


@flow
async def external_failed(shared: Shared) -> Started:
    return await shared.propose(a_key(), note() | {"connector": "nope"})


@flow
async def external_no_request(shared: Shared) -> Started:
    return await _raw(shared, "external", {"agent": "external"})


@flow
async def unknown_agent(shared: Shared) -> Started:
    return await _raw(shared, "nobody")


@flow
async def pair_approved(shared: Shared) -> Started:
    run = await shared.propose(a_key(), note(), agent="pair")
    digest = await shared.digest(run)
    await shared.answer(run, Kind.APPROVE, digest)
    await shared.answer(run, Kind.APPROVE, digest, approver="bob")
    return run


@flow
async def auto_passed(shared: Shared) -> Started:
    return await shared.propose(a_key(), note(), agent="auto")


@flow
async def keep_partly(shared: Shared) -> Started:
    return await approved(shared, odd("a"), odd("b", fail="rejected"), agent="keep")


@flow
async def hasty_reminded_and_expired(shared: Shared) -> Started:
    return await shared.propose(a_key(), note(), agent="hasty")


@flow
async def roles_reminded_once(shared: Shared) -> Started:
    run = await shared.propose(a_key(), note(), agent="roles")
    digest = await shared.digest(run)
    # As long as nobody can write, reminders fall due and none goes out.
    with closing(sqlite3.connect(shared.settings.data / "countersign.db", isolation_level=None)) as link:
        link.execute("BEGIN IMMEDIATE")
        await asyncio.sleep(4)
    await shared.until(run, "reminder", 4)
    await shared.answer(run, Kind.APPROVE, digest)
    return run


@flow
async def short_continued(shared: Shared) -> Started:
    """The history of the first run of its chain; the next one goes on by itself."""
    run = await shared.propose(a_key(), note(), agent="short")
    first = (await run.handle.describe()).run_id
    for number in (1, 2):
        await shared.answer(run, Kind.REVISE, await shared.digest(run, number), comment="again")
    await shared.approve(run, 3)
    return Started(run.workflow_id, shared.client.get_workflow_handle(run.workflow_id, run_id=first))


@flow
async def long_one_by_one(shared: Shared) -> Started:
    run = await shared.propose(a_key(), note())
    digest, first = await shared.digest(run), (await run.handle.describe()).run_id
    while (await run.handle.describe()).run_id == first:
        await shared.answer(run, Kind.APPROVE, "0" * 64)
    await shared.answer(run, Kind.REJECT, digest)
    return Started(run.workflow_id, shared.client.get_workflow_handle(run.workflow_id, run_id=first))


@flow
async def content_revised_and_published(shared: Shared) -> Started:
    body = await shared.content.put("default", BRIEF.encode(), "text/markdown; charset=utf-8")
    run = await submit(
        shared.client, Request(agent="content", key=a_key(), body=body), shared.settings.temporal
    )
    await shared.answer(run, Kind.REVISE, await shared.digest(run), comment="warmer")
    await shared.approve(run, 2)
    return run


@flow
async def calendar_started(shared: Shared) -> Started:
    title = "Bakery rolls"
    await remember(shared, title, "# Title\n\n## Heading\n\nWe bake early.\n\n- The rolls cost 2.50")
    run = await ask(shared, per_week=1)
    await run.handle.result()
    article = child(shared, title)
    await shared.until(Started(article, shared.client.get_workflow_handle(article)), EventType.INTENT)
    await shared.client.get_workflow_handle(article).cancel()
    return run


@flow
async def belief_settled(shared: Shared) -> Started:
    subject = a_key()
    for number, event in enumerate(("e1", "e2", "e1")):
        mail = Mail(agent="pricing", event=event, sets={"price": str(number)})
        await settle(shared.client, "default", subject, mail)
    owner = owner_id("default", subject)
    handle = shared.client.get_workflow_handle(owner, result_type=Outcome)
    await handle.terminate("recorded")
    return Started(owner, handle)


@flow
async def belief_handed_over(shared: Shared) -> Started:
    """An owner's first run: two agents with one event id, a repetition, a late step of an earlier run."""
    subject = a_key()
    start = Ownership(tenant="default", subject=subject, hand_over_after=5)
    owner = await shared.client.start_workflow(
        "belief", start, id=owner_id("default", subject), task_queue=Queue.DECIDE, result_type=Outcome
    )
    sets = {"price": "10"}
    for agent in ("pricing", "content", "pricing"):
        await tell(shared.client, "default", subject, Mail(agent=agent, event="e1", sets=sets))
    await settle(shared.client, "default", subject, Mail(agent="pricing", event="e2", sets=sets))
    beliefs = Beliefs(shared.database, utc_now)
    await beliefs.own(Owning(tenant="default", subject=subject, holder="an earlier run"))
    await settle(shared.client, "default", subject, Mail(agent="pricing", event="e3", sets=sets))
    first = shared.client.get_workflow_handle(owner.id, run_id=owner.first_execution_run_id)
    with suppress(WorkflowContinuedAsNewError):
        await first.result(follow_runs=False)
    await shared.client.get_workflow_handle(owner.id).terminate("recorded")
    return Started(owner.id, first)


@flow
async def external_answer_logged_by_a_lost_task(shared: Shared) -> Started:
    run = await shared.propose(a_key(), note())
    digest = await shared.digest(run)
    given = recorded(Kind.APPROVE, Answer(digest=digest, approver="ann@example.test"), ANYBODY)
    await shared.lose(run, (EventType.VERDICT, given.model_dump(mode="json")))
    await shared.answer(run, Kind.APPROVE, digest, approver="ann@example.test")
    return run


@flow
async def upkeep_prewarmed(shared: Shared) -> Started:
    request = Request(agent="upkeep", key=a_key(), body="{}")
    handle: Any = await shared.client.start_workflow(
        "upkeep", request, id=a_key(), task_queue=Queue.DECIDE, result_type=Warmed
    )
    return Started(handle.id, handle)


@flow
async def upkeep_calibrated(shared: Shared) -> Started:
    request = Request(agent="upkeep", key=a_key(), body='{"calibrate": true}')
    handle: Any = await shared.client.start_workflow(
        "upkeep", request, id=a_key(), task_queue=Queue.DECIDE, result_type=Calibrated
    )
    return Started(handle.id, handle)


@flow
async def content_about_a_subject(shared: Shared) -> Started:
    subject = a_key()
    change = Change(tenant="default", agent="content", subject=subject, event="e1", sets={"opens": "7:00"})
    await Beliefs(shared.database, utc_now).change(change)
    body = await shared.content.put("default", BRIEF.encode(), "text/markdown; charset=utf-8")
    request = Request(agent="content", key=a_key(), body=body, subject=subject)
    run = await submit(shared.client, request, shared.settings.temporal)
    await shared.answer(run, Kind.REJECT, await shared.digest(run), comment="no")
    return run


@flow
async def policy_changed(shared: Shared) -> Started:
    key = shared.settings.data / SIGNING
    first = await proposal_of(shared, {"agent": "external", "autonomy": {"automatic": True}})
    run = await proposal_of(shared, {"agent": "external", "autonomy": {"automatic_up_to": "read_only"}})
    await agrees(shared, first, key)
    await first.handle.result()
    await agrees(shared, run, key)
    digest = await shared.digest(run, 2)
    await shared.answer(run, Kind.APPROVE, digest, approver="bob", role="owner")
    await agrees(shared, run, key)
    return run


async def _raw(shared: Shared, kind: str, *payloads: Any) -> Started:
    handle = await shared.client.start_workflow(
        kind, args=payloads, id=a_key(), task_queue=Queue.DECIDE, result_type=Outcome
    )
    return Started(handle.id, handle)


def settings_of(temporal: TemporalSettings, data: Path) -> Settings:
    rules = policies(hasty=GateRule(absolute_seconds=3, remind_seconds=1), roles=GateRule(remind_seconds=1))
    plain = AgentPolicy(connectors=("site",), gate=GateRule(remind_seconds=None))
    more = {"content": plain, "calendar": AgentPolicy(connectors=())}
    site = SiteSettings(
        name="site",
        repository=Path("site.git"),
        build=Path("site"),
        address=f"http://127.0.0.1:{free_port()}",
        engine="plain",
    )
    return settings_for(
        temporal,
        data,
        tiers=(TierSettings(name="large", kind="llama_cpp", url="http://127.0.0.1:9"),),
        sites=(site,),
        content=ContentSettings(min_words=5),
        policy=rules.model_copy(update={"agents": rules.agents | more}),
        pace=Pace(attempt=timedelta(seconds=5)),
    )


@asynccontextmanager
async def stack(data: Path, people: bool, *flags: str) -> AsyncGenerator[Shared]:
    """A server and all roles, for as long as the block lasts."""
    temporal = TemporalSettings(address=f"127.0.0.1:{free_port()}", ui_port=free_port(), managed=False)
    with open(data / "log", "wb") as log:
        argv = [*dev_server.argv(dev_server.binary(), temporal, data), *flags]
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        await dev_server.wait_ready(temporal)
        target = Odd(Null(data / "notes", utc_now))
        parts = Parts(
            agents=AGENTS,
            endpoints={"large": Scripted("large", editor)},
            connectors=lambda known: {**known, "odd": target},
        )
        # Where people are named every answer's giver is established first; most flows are of where none are.
        settings = settings_of(temporal, data)
        if people:
            settings = settings_with(temporal, data, make_key(data, SIGNING))
        async with stack_of(settings, parts, (*ROLES, Role.DESK)) as made:
            yield Shared(made.client, made.settings, made.database, target)
    finally:
        process.terminate()
        process.wait()


def neutral(history: dict[str, Any]) -> str:
    """The same without process names and stack traces, which say where it was recorded."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if key != "stackTrace"}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return IDENTITY.sub("worker", value) if isinstance(value, str) else value

    return json.dumps(clean(history), sort_keys=True, separators=(",", ":")) + "\n"


async def record(names: list[str]) -> None:
    wanted = names or list(FLOWS)
    for given in ((False,), *KINDS.values()):
        if some := [name for name in wanted if KINDS.get(name.partition("_")[0], (False,)) == given]:
            with tempfile.TemporaryDirectory() as data:
                async with stack(Path(data), *given) as shared:
                    await record_all(shared, some)


async def record_all(shared: Shared, names: list[str]) -> None:
    for name in names:
        run = await FLOWS[name](shared)
        try:
            await run.handle.result(follow_runs=False)
        except WorkflowFailureError:
            pass
        except Exception as error:
            assert "ContinuedAsNew" in type(error).__name__, error
        history = await run.handle.fetch_history()
        (FOLDER / f"{name}.json").write_text(neutral(history.to_json_dict()))
        sys.stdout.write(f"{name}: {len(history.events)} events\n")


if __name__ == "__main__":
    asyncio.run(record(sys.argv[1:]))
