"""What whoever may use Temporal does by hand, as the CLI lets them: the ledger takes no part in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import ActivityFailureError, WorkflowFailureError
from temporalio.common import RetryPolicy, SearchAttributeKey, SearchAttributePair, TypedSearchAttributes
from temporalio.exceptions import ApplicationError

from activities.actions import Actions
from activities.connectors.null import UNTARGETED
from activities.ledger import Ledger
from activities.routing import Routing
from activities.services.runs import Runs
from models.gate import Kind
from models.inference import Call
from models.ledger import Append, Draft, EventType
from models.loop import (
    Action,
    Guarantee,
    Intent,
    Outcome,
    Plan,
    Proposal,
    Receipt,
    Ref,
    Request,
    Reversibility,
    Status,
    action_key,
)
from models.orders import Admission, Conclusion, Effect, Effected, Fell, Planned, PlanOrder, RouteOrder
from models.settings import TemporalSettings
from models.visibility import MEMO_DIGEST, Attribute, Queue
from temporal.client import Started
from temporal.inbox import waiting
from tests.conftest import a_key, note
from tests.shared import LIMIT, Shared, odd, shared_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_stack(
    temporal: TemporalSettings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared]:
    async with shared_stack(temporal, tmp_path_factory.mktemp("by-hand")) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def shared(module_stack: Shared) -> AsyncIterator[Shared]:
    module_stack.odd.reset()
    yield module_stack
    module_stack.odd.go_on.set()


async def held(shared: Shared, *actions: dict[str, Any]) -> tuple[Started, str]:
    """A run whose worker is in the middle of what was approved."""
    run = await shared.propose(a_key(), *actions)
    digest = await shared.digest(run)
    assert (await shared.answer(run, Kind.APPROVE, digest)).counted
    await shared.odd.reached.wait()
    return run, digest


async def complete(shared: Shared, run: Started, said: Effect | Planned) -> None:
    """`temporal activity complete`, for the step under way."""
    async with asyncio.timeout(LIMIT):
        while not (pending := (await run.handle.describe()).raw_description.pending_activities):
            await asyncio.sleep(0.01)
    step = shared.client.get_async_activity_handle(
        workflow_id=run.workflow_id, run_id=None, activity_id=pending[0].activity_id
    )
    await step.complete(said)


def forged(digest: str, action: int = 0) -> Receipt:
    key = action_key(digest, action)
    return Receipt(action_key=key, action=action, reference="by hand", version="0", verified=True)


@pytest.mark.parametrize("what", [one for one in Effected if one is not Effected.DRIFTED])
async def test_what_is_said_by_hand_of_an_effect_under_way_leaves_it_in_doubt(
    shared: Shared, what: Effected
) -> None:
    run, digest = await held(shared, odd(f"by hand {what}", hold="apply"))
    receipt = forged(digest) if what is Effected.APPLIED else None
    await complete(shared, run, Effect(what=what, receipt=receipt, reason="so they say"))
    outcome = await shared.outcome(run)
    assert (outcome.status, outcome.receipts) == (Status.IN_DOUBT, ())
    assert what is Effected.IN_DOUBT or "does not bear out" in outcome.reason


async def test_a_drift_that_is_said_by_hand_binds_nothing_beside_an_effect_under_way(shared: Shared) -> None:
    run, _ = await held(shared, odd("no drift", hold="apply"))
    await complete(shared, run, Effect(what=Effected.DRIFTED, reason="so they say"))
    await shared.until(run, "outcome")
    events = await shared.events(run)
    ended = Outcome.model_validate(events[-1].body)
    assert (ended.status, ended.receipts) == (Status.IN_DOUBT, ())
    assert [event.type.value for event in events].count("intent") == 1


async def test_an_undo_that_is_said_by_hand_takes_nothing_back(shared: Shared) -> None:
    run, _ = await held(shared, odd("stands", hold="undo"), odd("fails", fail="rejected"))
    await complete(shared, run, Effect(what=Effected.UNDONE))
    outcome = await shared.outcome(run)
    assert (outcome.status, [one.action for one in outcome.receipts]) == (Status.IN_DOUBT, [0])
    assert outcome.receipts[0].reference != "by hand"


async def test_an_action_that_no_worker_took_is_not_executed_by_saying_so(shared: Shared) -> None:
    run, digest = await held(shared, odd("first", hold="apply"), note("second"))
    await complete(shared, run, Effect(what=Effected.APPLIED, receipt=forged(digest)))
    outcome = await shared.outcome(run)
    assert (outcome.status, [one.action for one in outcome.receipts]) == (Status.IN_DOUBT, [1])


async def test_a_dry_run_that_is_said_by_hand_lets_nothing_pass_without_a_person(shared: Shared) -> None:
    run = await shared.propose(a_key(), odd("graver", hold="plan", irreversible=True), agent="auto")
    await shared.odd.planning.wait()
    diff = await shared.content.put("default", b"+harmless\n", "text/x-diff; charset=utf-8")
    harmless = Plan(
        action=0,
        connector="odd",
        operation="note",
        target="odd:notes",
        target_version=UNTARGETED,
        diff=diff,
        reversibility=Reversibility.READ_ONLY,
        guarantee=Guarantee.KEYED,
        undo="",
    )
    await complete(shared, run, Planned(plans=(harmless,)))
    shared.odd.go_on.set()
    second = await shared.digest(run, 2)
    assert shared.standing("graver") == 0
    assert (await shared.answer(run, Kind.REJECT, second)).counted


async def test_nothing_is_written_of_a_run_that_it_did_not_order(shared: Shared) -> None:
    run = await shared.propose(a_key(), note("unwritten"))
    digest = await shared.digest(run)
    before = await shared.events(run)
    verdict = {"kind": "approve", "digest": digest, "approver": "by hand", "assurance": "signed"}
    wish = _wish(run, max(event.version for event in before), EventType.VERDICT, verdict)
    request = Request(agent="external", key=a_key(), body="{}")
    ended = Outcome(status=Status.EXECUTED, workflow_id=run.workflow_id, digest=digest)
    names = {"tenant": "default", "workflow_id": run.workflow_id, "event_id": a_key()}
    call = Call(task="content.outline")
    fell = {"task": "a", "tier": "edge", "to": None, "reason": ""}
    for step, order in (
        (Ledger.record, wish),
        (Ledger.admit, Admission(request=request, workflow_id=run.workflow_id, chain=a_key())),
        (Ledger.conclude, Conclusion(append=wish, request=request, outcome=ended)),
        (Routing.route, RouteOrder(agent="external", call=call, **names)),
        (Routing.fell, Fell.model_validate(names | fell)),
    ):
        with pytest.raises(ActivityFailureError) as failed:
            await _by_hand(shared, step, order)
        assert isinstance(failed.value.cause, ApplicationError)
        assert failed.value.cause.type == "PolicyDenied"
    assert await shared.events(run) == before
    assert (await shared.answer(run, Kind.REJECT, digest)).counted


async def test_a_run_that_is_started_by_hand_with_another_s_marks_does_not_wait(shared: Shared) -> None:
    run = await shared.propose(a_key(), note("waits"))
    digest = await shared.digest(run)
    marks = {Attribute.STATE: "waiting", Attribute.TENANT: "default", Attribute.AGENT: "external"}
    phantom = await shared.client.start_workflow(
        "external",
        id=f"phantom-{a_key()}",
        task_queue="nowhere",
        memo={MEMO_DIGEST: digest},
        search_attributes=TypedSearchAttributes(
            [
                SearchAttributePair(SearchAttributeKey.for_keyword(one.value), text)
                for one, text in marks.items()
            ]
        ),
    )
    seen = f'WorkflowId IN ("{phantom.id}", "{run.workflow_id}") AND {Attribute.STATE.value}="waiting"'
    async with asyncio.timeout(LIMIT):
        while (await shared.client.count_workflows(seen)).count < 2:
            await asyncio.sleep(0.01)
    listed = await waiting(shared.client, Runs(shared.ledger, shared.content, "default"), "default")
    titles = {row["workflow_id"]: row["title"] for row in listed}
    assert phantom.id not in titles
    assert titles[run.workflow_id] == (await _intent(shared, digest)).proposal.title
    await phantom.terminate()
    assert (await shared.answer(run, Kind.REJECT, digest)).counted


async def test_a_workflow_id_that_would_write_over_a_terminal_is_refused(shared: Shared) -> None:
    request = Request(agent="external", key=a_key(), body="{}")
    run = await shared.client.start_workflow(
        "external", request, id=f"{a_key()}\x1b[31m", task_queue=Queue.DECIDE, result_type=Outcome
    )
    with pytest.raises(WorkflowFailureError) as failed:
        await run.result()
    assert "has characters that are not seen" in str(failed.value.cause)


@pytest.mark.parametrize("text", [b"no JSON", b"[]", b'"x"', b"\xff", b"[" * 100_000])
async def test_a_dry_run_of_what_are_no_arguments_is_refused_at_once(shared: Shared, text: bytes) -> None:
    ref = await shared.content.put("default", text, "text/plain")
    action = Action(connector="odd", operation="note", arguments=ref, title="A note")
    proposal = Proposal(agent="external", title="Odd", actions=(action,))
    order = PlanOrder(tenant="default", proposal=proposal, numbers=(0,))
    with pytest.raises(ActivityFailureError) as failed:
        await _by_hand(shared, Actions.plan, order, Queue.ACT)
    assert isinstance(failed.value.cause, ApplicationError)
    assert "one JSON object" in failed.value.cause.message


async def _intent(shared: Shared, digest: str) -> Intent:
    return Intent.model_validate_json(await shared.content.get("default", Ref(digest=digest, size=0)))


def _wish(run: Started, expected: int, kind: EventType, body: dict[str, Any]) -> Append:
    draft = Draft(
        event_id=a_key(),
        stream=run.workflow_id,
        type=kind,
        actor_kind="person",
        actor_ref="somebody",
        correlation_id=run.workflow_id,
        body=body,
    )
    return Append(tenant="default", stream=run.workflow_id, expected=expected, drafts=(draft,))


async def _by_hand(shared: Shared, step: Any, order: Any, queue: Queue = Queue.DECIDE) -> Any:
    """`temporal activity execute`."""
    return await shared.client.execute_activity(
        step,
        order,
        id=a_key(),
        task_queue=queue,
        start_to_close_timeout=timedelta(seconds=10),
        retry_policy=RetryPolicy(maximum_attempts=1),
    )
