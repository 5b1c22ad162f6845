from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest
import pytest_asyncio
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType as Temporal
from temporalio.client import WorkflowUpdateFailedError
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from models.gate import ANYBODY, Answer, Judged, Kind, recorded
from models.ledger import EventType
from models.loop import Ref, Status
from models.settings import TemporalSettings
from temporal.client import Started
from tests.conftest import a_key, note
from tests.shared import Shared, odd, shared_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANN, BOB, CARL = "ann@example.test", "bob@example.test", "carl@example.test"
WRONG = "0" * 64


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(
    temporal: TemporalSettings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared]:
    async with shared_stack(temporal, tmp_path_factory.mktemp("messages")) as made:
        yield made


ELSEWHERE = {"encoding": b"json/plain", "__temporal_external_storage_reference": b"true"}


def raw(data: bytes, encoding: bytes | None) -> RawValue:
    return RawValue(Payload(metadata={} if encoding is None else {"encoding": encoding}, data=data))


def malformed(digest: str) -> dict[str, list[Any]]:
    """Messages that are none, by what is wrong with them."""
    good = {"digest": digest, "approver": ANN}
    return {
        "nothing": [],
        "null": [None],
        "string": ["yes, go on"],
        "number": [1],
        "list": [[good]],
        "empty": [{}],
        "two payloads": [good, good],
        "two kinds": [digest, ANN],
        "no digest": [{"approver": ANN}],
        "no approver": [{"digest": digest}],
        "blank approver": [good | {"approver": " "}],
        "short digest": [good | {"digest": digest[:10]}],
        "upper digest": [good | {"digest": digest.upper()}],
        "surplus field": [good | {"x" * 5000: 1}],
        "float": [good | {"comment": 1.5}],
        "long comment": [good | {"comment": "x" * 4001}],
        "wrong role": [good | {"role": "../"}],
        "bytes": [b"\x00\xff"],
        "unknown encoding": [raw(b"\x00\xff\xfe", b"binary/rubbish")],
        "no encoding": [raw(b"yes", None)],
        "stored elsewhere": [raw(b"{}", b"json/external-storage-reference")],
        "marked as stored elsewhere": [RawValue(Payload(metadata=ELSEWHERE, data=b"{}"))],
        "broken json": [raw(b'{"digest": ', b"json/plain")],
        "lone surrogate": [raw(b'{"digest": "x", "approver": "\\ud800"}', b"json/plain")],
        "not utf-8": [raw(b'{"digest": "\xff"}', b"json/plain")],
        "nested for ever": [raw(b"[" * 100_000, b"json/plain")],
        "protobuf": [raw(b"\x08\x01", b"binary/protobuf")],
    }


@pytest.mark.parametrize("kind", list(Kind))
async def test_every_malformed_signal_is_recorded_and_the_next_good_verdict_counts(
    shared: Shared, kind: Kind
) -> None:
    run = await shared.propose(a_key(), note())
    digest = await shared.digest(run)
    wrong = malformed(digest)
    for payloads in wrong.values():
        await run.handle.signal(kind.value, args=payloads)
    await run.handle.signal(kind.value, {"digest": WRONG, "approver": ANN, "comment": "why", "to": BOB})
    refused = await shared.until(run, "refusal", len(wrong) + 1)
    assert [event.body["kind"] for event in refused] == [kind.value] * (len(wrong) + 1)
    assert all(event.body["field"] and event.body["remedy"] for event in refused)
    assert all(len(str(event.body)) < 600 for event in refused)
    assert digest in refused[-1].body["remedy"]
    judged = await shared.answer(run, Kind.APPROVE, digest)
    assert judged.counted
    assert (await shared.outcome(run)).status is Status.EXECUTED


@pytest.mark.parametrize("kind", list(Kind))
async def test_an_update_of_the_wrong_shape_is_refused_without_a_trace_in_the_history(
    shared: Shared, kind: Kind
) -> None:
    run = await shared.propose(a_key(), note())
    digest = await shared.digest(run)
    for payloads in malformed(digest).values():
        with pytest.raises(WorkflowUpdateFailedError) as caught:
            await run.handle.execute_update(f"decide_{kind.value}", args=payloads)
        assert isinstance(caught.value.cause, ApplicationError)
        assert caught.value.cause.type == "InvalidInput"
    assert (await shared.answer(run, Kind.REJECT, digest)).counted
    assert (await shared.outcome(run)).status is Status.REJECTED
    history = await run.handle.fetch_history()
    accepted = Temporal.EVENT_TYPE_WORKFLOW_EXECUTION_UPDATE_ACCEPTED
    assert sum(event.event_type == accepted for event in history.events) == 1


async def test_a_wrong_digest_is_judged_recorded_and_returned_as_a_value(shared: Shared) -> None:
    run = await shared.propose(a_key(), note())
    digest = await shared.digest(run)
    judged = await shared.answer(run, Kind.APPROVE, WRONG)
    assert (judged.counted, judged.field, judged.digest) == (False, "digest", digest)
    assert digest in judged.remedy
    assert [event.body["approver"] for event in await shared.until(run, "refusal")] == [ANN]
    await shared.approve(run)
    await shared.outcome(run)


async def in_time(answer: Awaitable[Judged]) -> Judged:
    """What became of an answer; the run may end on another one before this one reaches it."""
    try:
        return await answer
    except RPCError as error:
        assert error.status is RPCStatusCode.NOT_FOUND
        return Judged(counted=False, state="closed", field="ID", remedy=str(error))


async def test_the_second_of_two_opposite_verdicts_does_not_count(shared: Shared) -> None:
    run = await shared.propose(a_key(), note("once"))
    digest = await shared.digest(run)
    answers = await asyncio.gather(
        in_time(shared.answer(run, Kind.APPROVE, digest)),
        in_time(shared.answer(run, Kind.REJECT, digest, approver=BOB)),
    )
    # One that ended the run may come back as "the run has ended", when its task was lost to the other one.
    (verdict,) = [event for event in await shared.events(run) if event.type.value == "verdict"]
    said = [
        kind.value
        for kind, judged in zip((Kind.APPROVE, Kind.REJECT), answers, strict=True)
        if judged.counted
    ]
    assert said in ([], [verdict.body["kind"]])
    approved = verdict.body["kind"] == Kind.APPROVE.value
    outcome = await shared.outcome(run)
    assert outcome.status is (Status.EXECUTED if approved else Status.REJECTED)
    types = await shared.types(run)
    heard = sum(judged.state != "closed" for judged in answers)
    assert types.count("refusal") == heard - len(said)
    assert types.count("receipt") == (1 if approved else 0)


async def test_two_people_who_approve_at_once_carry_it_out_once(shared: Shared) -> None:
    run = await shared.propose(a_key(), note("together"))
    digest = await shared.digest(run)
    answers = await asyncio.gather(
        in_time(shared.answer(run, Kind.APPROVE, digest)),
        in_time(shared.answer(run, Kind.APPROVE, digest, approver=BOB)),
    )
    assert sorted(judged.counted for judged in answers) == [False, True]
    assert (await shared.outcome(run)).status is Status.EXECUTED
    assert shared.standing("together") == 1


async def test_two_distinct_people_at_once_pass_a_gate_for_two(shared: Shared) -> None:
    run = await shared.propose(a_key(), note("pair"), agent="pair")
    digest = await shared.digest(run)
    answers = await asyncio.gather(
        shared.answer(run, Kind.APPROVE, digest), shared.answer(run, Kind.APPROVE, digest, approver=BOB)
    )
    assert [judged.counted for judged in answers] == [True, True]
    assert (await shared.outcome(run)).status is Status.EXECUTED
    assert shared.standing("pair") == 1


async def test_one_person_twice_is_not_two_people(shared: Shared) -> None:
    run = await shared.propose(a_key(), note(), agent="pair")
    digest = await shared.digest(run)
    assert (await shared.answer(run, Kind.APPROVE, digest)).counted
    for name in (ANN, ANN.upper()):
        judged = await shared.answer(run, Kind.APPROVE, digest, approver=name)
        assert (judged.counted, judged.field, judged.state) == (False, "approver", "waiting")
    assert (await shared.answer(run, Kind.APPROVE, digest, approver=BOB)).counted
    assert (await shared.outcome(run)).status is Status.EXECUTED


async def test_each_required_role_needs_a_person_of_its_own(shared: Shared) -> None:
    run = await shared.propose(a_key(), note(), agent="roles")
    digest = await shared.digest(run)

    async def approve(name: str, role: str | None) -> Judged:
        return await shared.answer(run, Kind.APPROVE, digest, approver=name, role=role)

    assert (await approve(ANN, None)).field == "role"
    assert (await approve(ANN, "intern")).field == "role"
    assert (await approve(ANN, "editor")).counted
    assert (await approve(ANN, "lawyer")).field == "approver"
    judged = await approve(BOB, "editor")
    assert (judged.counted, judged.state) == (True, "waiting")
    assert (await approve(CARL, "lawyer")).state == "passed"
    assert (await shared.outcome(run)).status is Status.EXECUTED


async def test_after_a_delegation_only_the_delegate_counts(shared: Shared) -> None:
    run = await shared.propose(a_key(), note())
    digest = await shared.digest(run)
    assert (await shared.answer(run, Kind.DELEGATE, digest, to=BOB)).counted
    for kind in (Kind.APPROVE, Kind.REJECT, Kind.REVISE, Kind.DELEGATE):
        judged = await shared.answer(run, kind, digest, approver=CARL, comment="now", to=CARL)
        assert (judged.counted, judged.field) == (False, "approver")
        assert BOB in judged.remedy
    assert (await shared.answer(run, Kind.APPROVE, digest, approver=BOB)).counted
    assert (await shared.outcome(run)).status is Status.EXECUTED


async def test_two_approvals_can_still_be_had_after_a_delegation(shared: Shared) -> None:
    run = await shared.propose(a_key(), note(), agent="pair")
    digest = await shared.digest(run)
    assert (await shared.answer(run, Kind.DELEGATE, digest, to=BOB)).counted
    assert (await shared.answer(run, Kind.APPROVE, digest, approver=BOB)).state == "waiting"
    assert (await shared.answer(run, Kind.APPROVE, digest)).counted
    assert (await shared.outcome(run)).status is Status.EXECUTED


async def test_revised_twice_then_approved_acts_on_the_third_intent_only(shared: Shared) -> None:
    run = await shared.propose(a_key(), note("thrice"))
    digests: list[str] = []
    for number in (1, 2):
        digests.append(await shared.digest(run, number))
        judged = await shared.answer(run, Kind.REVISE, digests[-1], comment=f"again {number}")
        assert judged.counted
    digests.append(await shared.digest(run, 3))
    assert len(set(digests)) == 3
    for old in digests[:2]:
        assert (await shared.answer(run, Kind.APPROVE, old)).field == "digest"
    assert (await shared.answer(run, Kind.APPROVE, digests[2])).counted
    outcome = await shared.outcome(run)
    assert (outcome.status, outcome.digest) == (Status.EXECUTED, digests[2])
    assert shared.standing("thrice") == 1
    texts = [event.body["comment"] for event in await shared.events(run) if event.body.get("comment")]
    kept = [await shared.content.text("default", Ref.model_validate(text)) for text in texts]
    assert kept == ["again 1", "again 2"]


async def test_revisions_end_where_policy_says(shared: Shared) -> None:
    run = await shared.propose(a_key(), note(), agent="short")
    for number in range(1, 5):
        digest = await shared.digest(run, number)
        assert (await shared.answer(run, Kind.REVISE, digest, comment="more")).counted
    digest = await shared.digest(run, 5)
    judged = await shared.answer(run, Kind.REVISE, digest, comment="more")
    assert (judged.counted, judged.state) == (False, "waiting")
    assert "4 times" in judged.remedy
    assert (await shared.answer(run, Kind.REJECT, digest)).counted
    assert (await shared.outcome(run)).status is Status.REJECTED


async def test_a_run_that_continued_as_new_keeps_its_feedback_and_refuses_old_digests(shared: Shared) -> None:
    run = await shared.propose(a_key(), note("long"), agent="short")
    first = (await run.handle.describe()).run_id
    old = [await shared.digest(run, 1)]
    await shared.answer(run, Kind.REVISE, old[0], comment="one")
    old.append(await shared.digest(run, 2))
    # These arrive while the run is about to continue: none may be lost, and only the first counts.
    await asyncio.gather(
        run.handle.signal("approve", "rubbish"),
        run.handle.signal("revise", {"digest": old[1], "approver": ANN, "comment": "two"}),
        run.handle.signal("approve", {"digest": old[1], "approver": BOB}),
    )
    digest = await shared.digest(run, 3) if await _revised(shared, run) else old[1]
    if digest is not old[1]:
        assert (await run.handle.describe()).run_id != first
        assert (await shared.answer(run, Kind.APPROVE, old[0])).field == "digest"
        assert (await shared.answer(run, Kind.APPROVE, old[1])).field == "digest"
        assert (await shared.answer(run, Kind.APPROVE, digest)).counted
    outcome = await shared.outcome(run)
    assert (outcome.status, outcome.digest) == (Status.EXECUTED, digest)
    assert shared.standing("long") == 1
    types = await shared.types(run)
    assert types.count("refusal") == 2 + (2 if digest is not old[1] else 0)
    requests = [event for event in await shared.events(run) if event.type.value == "request"]
    assert len(requests) == 1


async def test_an_answer_that_was_logged_by_a_task_that_was_lost_counts_once_and_is_told_so(
    shared: Shared,
) -> None:
    run = await shared.propose(a_key(), note("heard"))
    digest = await shared.digest(run)
    given = recorded(Kind.APPROVE, Answer(digest=digest, approver=ANN), ANYBODY)
    await shared.lose(run, (EventType.VERDICT, given.model_dump(mode="json")))
    assert (await shared.answer(run, Kind.APPROVE, digest)).counted
    assert (await shared.outcome(run)).status is Status.EXECUTED
    types = await shared.types(run)
    assert (types.count("verdict"), types.count("refusal"), shared.standing("heard")) == (1, 0, 1)


async def test_refusals_that_were_logged_by_a_task_that_was_lost_are_not_logged_again(shared: Shared) -> None:
    run = await shared.propose(a_key(), note("refused"))
    digest = await shared.digest(run)
    judged = await shared.answer(run, Kind.APPROVE, WRONG)
    (refused,) = await shared.until(run, "refusal")
    await shared.lose(run, *[(EventType.REFUSAL, refused.body)] * 2)
    for logged in (3, 3, 4):
        assert await shared.answer(run, Kind.APPROVE, WRONG) == judged
        assert (await shared.types(run)).count("refusal") == logged
    assert (await shared.answer(run, Kind.APPROVE, digest)).counted
    assert (await shared.outcome(run)).status is Status.EXECUTED


async def test_an_answer_is_judged_though_a_lost_task_had_refused_another_one_of_the_same_person(
    shared: Shared,
) -> None:
    run = await shared.propose(a_key(), note("other"))
    digest = await shared.digest(run)
    await shared.answer(run, Kind.APPROVE, WRONG)
    (refused,) = await shared.until(run, "refusal")
    await shared.lose(run, *[(EventType.REFUSAL, refused.body)] * 2)
    assert (await shared.answer(run, Kind.APPROVE, digest)).counted
    assert (await shared.outcome(run)).status is Status.EXECUTED
    assert (await shared.types(run)).count("refusal") == 3


async def test_messages_before_the_first_intent_are_refused_and_do_not_count_later(shared: Shared) -> None:
    shared.odd.reset()
    run = await shared.propose(a_key(), odd("early", hold="plan"))
    await shared.odd.planning.wait()
    await run.handle.signal("approve", {"digest": WRONG, "approver": ANN})
    await run.handle.signal("reject")
    refused = await shared.until(run, "refusal", 2)
    assert "next card" in refused[0].body["remedy"]
    shared.odd.go_on.set()
    await shared.approve(run)
    assert (await shared.outcome(run)).status is Status.EXECUTED


async def _revised(shared: Shared, run: Started) -> bool:
    return (await shared.until(run, "verdict", 2))[1].body["kind"] == "revise"
