from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType as Temporal
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.common import RetryPolicy

from activities.actions import Actions
from models.canonical import canonical
from models.gate import Kind
from models.loop import Intent, Status, action_key
from models.orders import Effect, Effected, EffectOrder
from models.settings import TemporalSettings
from models.visibility import Queue
from temporal.client import Started
from tests.conftest import a_key, note
from tests.shared import Shared, odd, shared_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANN = "ann@example.test"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_stack(
    temporal: TemporalSettings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared]:
    async with shared_stack(temporal, tmp_path_factory.mktemp("saga")) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def shared(module_stack: Shared) -> AsyncIterator[Shared]:
    module_stack.odd.reset()
    yield module_stack
    module_stack.odd.go_on.set()


async def act(shared: Shared, step: Any, order: EffectOrder) -> Effect:
    """An activity of the act role, started by nobody's loop."""
    return await shared.client.execute_activity(
        step,
        order,
        id=a_key(),
        task_queue=Queue.ACT,
        result_type=Effect,
        start_to_close_timeout=timedelta(seconds=10),
        retry_policy=RetryPolicy(maximum_attempts=1),
    )


def order(run: Started, digest: str, action: int = 0) -> EffectOrder:
    return EffectOrder(tenant="default", workflow_id=run.workflow_id, digest=digest, action=action)


async def reject(shared: Shared, run: Started, digest: str) -> None:
    assert (await shared.answer(run, Kind.REJECT, digest)).counted
    assert (await shared.outcome(run)).status is Status.REJECTED


# Who enforces.


@pytest.mark.parametrize("step", ["apply", "undo"])
async def test_an_effect_started_outside_any_loop_is_refused_and_recorded(shared: Shared, step: str) -> None:
    run = await shared.propose(a_key(), note("unasked"))
    digest = await shared.digest(run)
    effect = await act(shared, getattr(Actions, step), order(run, digest))
    assert effect.what is Effected.REFUSED
    assert [event.body["reason"] for event in await shared.until(run, "refusal")] == [effect.reason]
    assert shared.standing("unasked") == 0
    await reject(shared, run, digest)
    assert (await act(shared, getattr(Actions, step), order(run, digest))).what is Effected.REFUSED
    assert shared.standing("unasked") == 0


async def test_a_digest_that_nobody_logged_is_refused_and_recorded(shared: Shared) -> None:
    run = await shared.propose(a_key(), note("forged"))
    digest = await shared.digest(run)
    bound = await shared.database.read(lambda link: _intent(link, digest))
    forged = bound.model_copy(update={"nonce": "another"})
    stored = await shared.content.put("default", canonical(forged), "application/json")
    junk = await shared.content.put("default", b"not an intent", "text/plain")
    await shared.answer(run, Kind.APPROVE, digest)
    await shared.outcome(run)
    for wrong in ("0" * 64, stored.digest, junk.digest):
        for step in (Actions.apply, Actions.undo):
            assert (await act(shared, step, order(run, wrong))).what is Effected.REFUSED
    assert len(await shared.until(run, "refusal", 6)) == 6
    assert shared.standing("forged") == 1


async def test_an_intent_does_not_count_for_another_run_or_another_action(shared: Shared) -> None:
    one = await shared.propose(a_key(), note("mine"))
    two = await shared.propose(a_key(), note("theirs"))
    digest = await shared.digest(one)
    await shared.answer(one, Kind.APPROVE, digest)
    await shared.outcome(one)
    assert (await act(shared, Actions.apply, order(two, digest))).what is Effected.REFUSED
    assert (await act(shared, Actions.apply, order(one, digest, action=7))).what is Effected.REFUSED
    assert len(await shared.until(two, "refusal")) == 1
    await reject(shared, two, await shared.digest(two))
    assert (shared.standing("mine"), shared.standing("theirs")) == (1, 0)


async def test_nothing_happens_after_the_outcome(shared: Shared) -> None:
    run = await shared.propose(a_key(), note("closed"))
    digest = await shared.digest(run)
    await shared.answer(run, Kind.APPROVE, digest)
    await shared.outcome(run)
    for step in (Actions.apply, Actions.undo):
        effect = await act(shared, step, order(run, digest))
        assert (effect.what, effect.reason) == (Effected.REFUSED, "the run has ended")
    assert shared.standing("closed") == 1


async def test_settling_an_intent_that_nobody_passed_does_not_close_its_key(shared: Shared) -> None:
    run = await shared.propose(a_key(), note("unsettled"))
    digest = await shared.digest(run)
    assert (await act(shared, Actions.settle, order(run, digest))).what is Effected.REFUSED
    await shared.answer(run, Kind.APPROVE, digest)
    assert (await shared.outcome(run)).status is Status.EXECUTED
    assert shared.standing("unsettled") == 1


async def test_what_can_be_taken_back_passes_alone_and_what_cannot_needs_a_person(shared: Shared) -> None:
    run = await shared.propose(a_key(), odd("harmless"), agent="auto")
    assert (await shared.outcome(run)).status is Status.EXECUTED
    assert (await shared.types(run)).count("verdict") == 0
    run = await shared.propose(a_key(), odd("mild"), odd("grave", irreversible=True), agent="auto")
    digest = await shared.digest(run)
    assert (await act(shared, Actions.apply, order(run, digest))).what is Effected.REFUSED
    assert shared.standing("mild") == 0
    assert (await shared.answer(run, Kind.APPROVE, digest)).counted
    assert (await shared.outcome(run)).status is Status.EXECUTED
    assert shared.standing("grave") == 1


# Drift.


async def test_drift_before_the_first_effect_asks_again_under_a_new_digest(shared: Shared) -> None:
    name = a_key()
    run = await shared.propose(a_key(), note("moved", target=name))
    old = await shared.digest(run)
    shared.target(name, "changed")
    assert (await shared.answer(run, Kind.APPROVE, old)).counted
    new = await shared.digest(run, 2)
    assert new != old
    assert (await shared.answer(run, Kind.APPROVE, old)).field == "digest"
    assert (await act(shared, Actions.apply, order(run, old))).what is Effected.REFUSED
    assert shared.standing("moved") == 0
    assert (await shared.answer(run, Kind.APPROVE, new)).counted
    outcome = await shared.outcome(run)
    assert (outcome.status, outcome.digest) == (Status.EXECUTED, new)
    assert shared.standing("moved") == 1


async def test_drift_after_the_first_effect_takes_it_back_and_asks_for_all_again(shared: Shared) -> None:
    name = a_key()
    run = await shared.propose(a_key(), odd("one", hold="apply"), note("two", target=name))
    old = await shared.digest(run)
    await shared.answer(run, Kind.APPROVE, old)
    await shared.odd.reached.wait()
    shared.target(name, "changed")
    shared.odd.go_on.set()
    new = await shared.digest(run, 2)
    assert (shared.standing("one"), shared.standing("two")) == (0, 0)
    # The odd target took one back; nothing of the old intent may be applied any more.
    for action in (0, 1):
        assert (await act(shared, Actions.apply, order(run, old, action))).what is Effected.REFUSED
    await shared.answer(run, Kind.APPROVE, new)
    outcome = await shared.outcome(run)
    assert [receipt.action_key for receipt in outcome.receipts] == [action_key(new, 0), action_key(new, 1)]
    assert (shared.standing("one"), shared.standing("two")) == (1, 1)


async def _drifted_after_one(shared: Shared, text: str) -> tuple[Started, str, str]:
    name = a_key()
    run = await shared.propose(
        a_key(), odd(f"{text} 1", hold="apply"), note(f"{text} 2", target=name), agent="keep"
    )
    old = await shared.digest(run)
    await shared.answer(run, Kind.APPROVE, old)
    await shared.odd.reached.wait()
    shared.target(name, "changed")
    shared.odd.go_on.set()
    return run, old, await shared.digest(run, 2)


async def test_what_policy_keeps_is_not_done_again_and_the_new_card_says_so(shared: Shared) -> None:
    run, old, new = await _drifted_after_one(shared, "kept")
    assert "Already applied earlier: 1" in await run.handle.query("card")
    await shared.answer(run, Kind.APPROVE, new)
    outcome = await shared.outcome(run)
    assert outcome.status is Status.EXECUTED
    assert [receipt.action_key for receipt in outcome.receipts] == [action_key(old, 0), action_key(new, 1)]
    assert (shared.standing("kept 1"), shared.standing("kept 2")) == (1, 1)


async def test_what_was_kept_stays_kept_when_the_rest_is_revised(shared: Shared) -> None:
    run, old, new = await _drifted_after_one(shared, "revised")
    await shared.answer(run, Kind.REVISE, new, comment="again")
    third = await shared.digest(run, 3)
    assert "Already applied earlier: 1" in await run.handle.query("card")
    await shared.answer(run, Kind.APPROVE, third)
    outcome = await shared.outcome(run)
    assert [receipt.action_key for receipt in outcome.receipts] == [action_key(old, 0), action_key(third, 1)]
    assert (shared.standing("revised 1"), shared.standing("revised 2")) == (1, 1)


async def test_a_rejection_after_a_part_was_kept_does_not_hide_the_part(shared: Shared) -> None:
    run, old, new = await _drifted_after_one(shared, "partly")
    await shared.answer(run, Kind.REJECT, new)
    outcome = await shared.outcome(run)
    assert (outcome.status, len(outcome.receipts)) == (Status.PARTLY_EXECUTED, 1)
    assert outcome.receipts[0].action_key == action_key(old, 0)
    assert "rejected" in outcome.reason
    assert shared.standing("partly 1") == 1


# Failing targets.


async def test_a_refusal_of_the_target_takes_back_what_went_before_in_reverse(shared: Shared) -> None:
    run = await shared.propose(a_key(), odd("a"), odd("b"), odd("c", fail="rejected"), odd("d"))
    digest = await shared.digest(run)
    await shared.answer(run, Kind.APPROVE, digest)
    outcome = await shared.outcome(run)
    assert (outcome.status, outcome.receipts) == (Status.COMPENSATED, ())
    assert shared.odd.undoes == [f"{action_key(digest, n)}.undo" for n in (1, 0)]
    assert [shared.standing(text) for text in "abcd"] == [0, 0, 0, 0]
    types = await shared.types(run)
    assert types.index("compensation") > types.index("absent")


async def test_a_refused_single_action_fails_without_an_effect(shared: Shared) -> None:
    run = await shared.propose(a_key(), odd("alone", fail="rejected"))
    await shared.approve(run)
    outcome = await shared.outcome(run)
    assert (outcome.status, outcome.receipts) == (Status.FAILED, ())
    assert shared.standing("alone") == 0


async def test_what_cannot_be_taken_back_is_named_in_the_outcome(shared: Shared) -> None:
    run = await shared.propose(
        a_key(), odd("x"), odd("stays", stuck=True), odd("z"), odd("w", fail="rejected")
    )
    digest = await shared.digest(run)
    await shared.answer(run, Kind.APPROVE, digest)
    outcome = await shared.outcome(run)
    assert outcome.status is Status.COMPENSATION_FAILED
    assert [receipt.action for receipt in outcome.receipts] == [0, 1]
    assert [shared.standing(text) for text in ("x", "stays", "z", "w")] == [1, 1, 0, 0]


async def test_policy_may_keep_a_part_when_the_rest_fails(shared: Shared) -> None:
    run = await shared.propose(a_key(), odd("first"), odd("second", fail="rejected"), agent="keep")
    await shared.approve(run)
    outcome = await shared.outcome(run)
    assert (outcome.status, [r.action for r in outcome.receipts]) == (Status.PARTLY_EXECUTED, [0])
    assert shared.standing("first") == 1


# Cancelling.


async def test_cancelled_while_thinking_nothing_is_proposed(shared: Shared) -> None:
    run = await shared.propose(a_key(), odd("thought", hold="plan"))
    await shared.odd.planning.wait()
    await run.handle.cancel()
    await shared.until(run, "outcome")
    shared.odd.go_on.set()
    assert (await shared.outcome(run)).status is Status.CANCELLED
    assert "intent" not in await shared.types(run)


async def test_cancelled_while_waiting_nothing_is_done(shared: Shared) -> None:
    run = await shared.propose(a_key(), odd("waited"))
    digest = await shared.digest(run)
    await run.handle.cancel()
    assert (await shared.outcome(run)).status is Status.CANCELLED
    assert (await act(shared, Actions.apply, order(run, digest))).what is Effected.REFUSED
    assert shared.odd.sends == []


@pytest.mark.parametrize(
    ("agent", "ends"), [("external", Status.COMPENSATED), ("keep", Status.PARTLY_EXECUTED)]
)
async def test_cancelled_while_acting_the_step_under_way_ends_and_the_outcome_is_true(
    shared: Shared, agent: str, ends: Status
) -> None:
    text = f"under way {agent}"
    run = await shared.propose(a_key(), odd(text, hold="apply"), odd("never"), agent=agent)
    await shared.approve(run)
    await shared.odd.reached.wait()
    await run.handle.cancel()
    await _cancel_seen(run)
    shared.odd.go_on.set()
    outcome = await shared.outcome(run)
    assert outcome.status is ends
    assert shared.standing(text) == (1 if agent == "keep" else 0)
    assert len(outcome.receipts) == shared.standing(text)
    assert shared.standing("never") == 0


async def test_cancelled_during_the_last_action_it_is_executed_all_the_same(shared: Shared) -> None:
    run = await shared.propose(a_key(), odd("last", hold="apply"))
    await shared.approve(run)
    await shared.odd.reached.wait()
    await run.handle.cancel()
    await _cancel_seen(run)
    shared.odd.go_on.set()
    assert (await shared.outcome(run)).status is Status.EXECUTED
    assert shared.standing("last") == 1


async def test_a_cancellation_is_not_lost_in_a_drift(shared: Shared) -> None:
    name = a_key()
    run = await shared.propose(a_key(), odd("slow", hold="apply", target=name))
    await shared.approve(run)
    await shared.odd.reached.wait()
    shared.target(name, "changed")
    await run.handle.cancel()
    await _cancel_seen(run)
    shared.odd.go_on.set()
    assert (await shared.outcome(run)).status is Status.CANCELLED
    assert shared.standing("slow") == 0


# Runs that are killed, and asked for again.


async def test_terminated_while_taking_back_the_next_run_goes_on_taking_back(shared: Shared) -> None:
    key = a_key()
    body = (odd("t1", hold="undo"), odd("t2", fail="rejected"), odd("t3"))
    run = await shared.propose(key, *body)
    await shared.approve(run)
    await shared.odd.reached.wait()
    await run.handle.terminate()
    shared.odd.go_on.set()
    again = await shared.propose(key, *body)
    outcome = await shared.outcome(again)
    assert (outcome.status, outcome.receipts) == (Status.COMPENSATED, ())
    assert [shared.standing(text) for text in ("t1", "t2", "t3")] == [0, 0, 0]


async def test_terminated_while_cancelled_nothing_more_is_applied_by_the_next_run(shared: Shared) -> None:
    key = a_key()
    run = await shared.propose(key, odd("c1", hold="apply"), odd("c2"), note("c3"))
    await shared.approve(run)
    await shared.odd.reached.wait()
    await run.handle.cancel()
    await _cancel_seen(run)
    shared.odd.go_on.set()
    await shared.until(run, "compensation")
    await run.handle.terminate() if await _is_open(run) else None
    again = await shared.propose(key, odd("c1", hold="apply"), odd("c2"), note("c3"))
    assert (await again.handle.result()).status is Status.COMPENSATED
    assert [shared.standing(text) for text in ("c1", "c2", "c3")] == [0, 0, 0]


async def test_terminated_at_every_step_the_same_request_acts_once(shared: Shared) -> None:
    key = a_key()
    body = (odd("every", hold="apply"), note("step"))
    shared.odd.go_on.set()
    for kind in ("request", "proposal", "intent"):
        run = await shared.propose(key, *body)
        await shared.until(run, kind)
        await run.handle.terminate()
    shared.odd.go_on.clear()
    run = await shared.propose(key, *body)
    digest = await shared.digest(run)
    assert (await shared.answer(run, Kind.APPROVE, digest)).counted
    await shared.odd.reached.wait()
    await run.handle.terminate()
    shared.odd.go_on.set()
    run = await shared.propose(key, *body)
    outcome = await shared.outcome(run)
    assert (outcome.status, outcome.digest) == (Status.EXECUTED, digest)
    types = await shared.types(run)
    assert [types.count(kind) for kind in ("request", "proposal", "intent", "verdict", "outcome")] == [1] * 5
    assert (shared.standing("every"), shared.standing("step")) == (1, 1)


@pytest.mark.parametrize("before", ["verdict", "apply"])
async def test_reset_after_the_end_repeats_nothing(shared: Shared, before: str) -> None:
    text = f"reset {before}"
    run = await shared.propose(a_key(), odd(text))
    await shared.approve(run)
    first = await shared.outcome(run)
    history = await run.handle.fetch_history()
    done = [e.event_id for e in history.events if e.event_type == Temporal.EVENT_TYPE_WORKFLOW_TASK_COMPLETED]
    scheduled = [
        e.event_id for e in history.events if e.event_type == Temporal.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
    ]
    # Activities are the dry run and the apply; a task before the latter's.
    at = done[1] if before == "verdict" else max(task for task in done if task < scheduled[1])
    execution = WorkflowExecution(workflow_id=run.workflow_id, run_id=history.run_id or "")
    await shared.client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=shared.client.namespace,
            workflow_execution=execution,
            reason="a test",
            workflow_task_finish_event_id=at,
            request_id=a_key(),
        )
    )
    second = await shared.client.get_workflow_handle(run.workflow_id, result_type=type(first)).result()
    assert second == first
    assert shared.standing(text) == 1
    assert len(shared.odd.sends) == 1
    assert (await shared.types(run)).count("outcome") == 1


async def _cancel_seen(run: Started) -> None:
    """The workflow has been told; the step goes on."""
    while True:
        history = await run.handle.fetch_history()
        kinds = [event.event_type for event in history.events]
        if Temporal.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED in kinds:
            at = kinds.index(Temporal.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED)
            if Temporal.EVENT_TYPE_WORKFLOW_TASK_COMPLETED in kinds[at:]:
                return
        await asyncio.sleep(0.01)


async def _is_open(run: Started) -> bool:
    status = (await run.handle.describe()).status
    return status is not None and status.name == "RUNNING"


def _intent(link: Any, digest: str) -> Intent:
    from activities.services.content import get_blob

    return Intent.model_validate_json(get_blob(link, "default", digest))
