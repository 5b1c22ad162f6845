from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from activities.services.signatures import BEGIN, END
from models.gate import Kind
from models.ledger import EventType
from models.loop import GateRule, Status
from models.people import Key, Person
from models.policy import AgentPolicy, Policy
from models.settings import Settings, TemporalSettings
from models.visibility import Role
from scripts.commands.answer import signed
from tests.conftest import Stack, a_key, note, settings_for, stack_of
from tests.test_signatures import make_key, sign
from workers.compose import role


def signed_policy() -> Policy:
    rule = GateRule(assurance="signed", roles=("editor",), remind_seconds=None)
    return Policy(agents={"external": AgentPolicy(connectors=("null",), gate=rule)})


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: make_key(folder, name) for name in ("ann", "eve", "old")}


def public(key: Path) -> str:
    return key.with_suffix(".pub").read_text().strip()


def people(keys: dict[str, Path], **ann: Any) -> tuple[Person, ...]:
    old = Key(public=public(keys["old"]), revoked=True)
    return (
        Person(name="ann", roles=("editor",), keys=(Key(public=public(keys["ann"]), **ann), old)),
        Person(name="bob", roles=("reader",), keys=(Key(public=public(keys["eve"])),)),
    )


@pytest.fixture
async def stack(temporal: TemporalSettings, tmp_path: Path, keys: dict[str, Path]) -> AsyncIterator[Stack]:
    settings = settings_for(temporal, tmp_path, policy=signed_policy(), people=people(keys))
    async with stack_of(settings) as made:
        yield made


async def answer(stack: Stack, run: Any, key: Path | None, kind: Kind = Kind.APPROVE, **more: Any) -> Any:
    message = {"digest": await stack.digest(run), "approver": "ann", "role": "editor"}
    changes = more.pop("changes", {})
    if key is not None:
        message = await signed("default", kind, message | more, key)
    return await stack.answer(run, kind, **(message | changes))


async def test_a_signed_answer_counts_and_stands_in_the_ledger(stack: Stack, keys: dict[str, Path]) -> None:
    run = await stack.propose(a_key(), note())
    assert (await answer(stack, run, keys["ann"], comment="fine")).counted
    assert (await run.handle.result()).status is Status.EXECUTED
    verdict = next(e for e in await stack.events(run) if e.type is EventType.VERDICT)
    assert verdict.body["assurance"] == "signed"
    assert verdict.body["key"].startswith("SHA256:")


async def test_every_answer_that_is_not_what_ann_signed_is_refused_and_the_run_waits_on(
    stack: Stack, keys: dict[str, Path]
) -> None:
    run = await stack.propose(a_key(), note())
    message = {"digest": await stack.digest(run), "approver": "ann", "role": "editor"}
    good = await signed("default", Kind.APPROVE, message, keys["ann"])
    now = datetime.now(UTC)
    past = {
        "issued_at": (now - timedelta(hours=2)).isoformat(),
        "expires_at": (now - timedelta(hours=1)).isoformat(),
    }
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("signature", message),
        ("signature", good | {"comment": "and more"}),
        ("signature", good | {"nonce": "0" * 32}),
        ("signature", good | {"signature": sign(keys["ann"], b"other bytes")}),
        ("signature", good | {"signature": sign(keys["ann"], b"", "git")}),
        ("signature", await signed("default", Kind.APPROVE, message, keys["eve"])),
        ("signature", await signed("default", Kind.APPROVE, message, keys["old"])),
        ("signature", await signed("default", Kind.REJECT, message, keys["ann"])),
        ("signature", await signed("elsewhere", Kind.APPROVE, message, keys["ann"])),
        ("expires_at", good | past),
        ("expires_at", good | {"expires_at": (now + timedelta(days=9)).isoformat()}),
        ("expires_at", good | {"issued_at": "0001-01-01T00:00:00Z"}),
        ("signature", good | {"signature": f"{BEGIN}é{END}"}),
        ("approver", good | {"approver": "mallory"}),
        ("signature", good | {"role": "reader"}),
        ("role", await signed("default", Kind.APPROVE, message | {"role": "owner"}, keys["ann"])),
    ]
    for field, sent in wrong:
        judged = await stack.answer(run, Kind.APPROVE, **sent)
        assert not judged.counted, sent
        assert judged.field == field, (judged, sent)
    refusals = [e for e in await stack.events(run) if e.type is EventType.REFUSAL]
    assert len(refusals) == len(wrong)
    assert stack.notes() == []
    assert (await stack.answer(run, Kind.APPROVE, **good)).counted
    assert (await run.handle.result()).status is Status.EXECUTED
    assert len(stack.notes()) == 1


async def test_a_question_is_handed_to_nobody_whom_settings_do_not_name(
    stack: Stack, keys: dict[str, Path]
) -> None:
    run = await stack.propose(a_key(), note())
    judged = await answer(stack, run, keys["ann"], Kind.DELEGATE, to="bbo")
    assert (judged.counted, judged.field) == (False, "to")
    assert (await answer(stack, run, keys["ann"], Kind.DELEGATE, to="bob")).counted


@pytest.mark.parametrize("names", [("ann", "Ann"), ("rené", "rene\u0301"), ("ann", "\uff41nn")])
def test_one_person_is_not_two_by_another_spelling_of_their_name(names: tuple[str, str]) -> None:
    with pytest.raises(ValidationError, match="are one name"):
        Settings(people=tuple(Person(name=name) for name in names))


def test_one_person_is_not_two_by_the_key_of_another(keys: dict[str, Path]) -> None:
    ann, bob = people(keys)
    spelled = Key(public=f"{public(keys['ann']).rsplit(' ', 1)[0]} of bob", valid_before=datetime.now(UTC))
    for twice in (
        (ann, Person(name="eve", keys=(spelled,))),
        (Person(name="ann", keys=(*ann.keys, spelled)),),
    ):
        with pytest.raises(ValidationError, match="a key of ann stands there again"):
            Settings(people=(bob, *twice))


async def test_a_key_that_was_revoked_after_the_answer_leads_to_no_effect(
    temporal: TemporalSettings, tmp_path: Path, keys: dict[str, Path]
) -> None:
    settings = settings_for(temporal, tmp_path, policy=signed_policy(), people=people(keys))
    wait = (Role.DECIDE, Role.INFER, Role.REMEMBER)
    async with stack_of(settings, roles=(*wait, Role.ACT)) as stack:
        run = await stack.propose(a_key(), note())
        digest = await stack.digest(run)
    async with stack_of(settings, roles=wait) as stack:
        message = {"digest": digest, "approver": "ann", "role": "editor"}
        assert (
            await stack.answer(
                run, Kind.APPROVE, **await signed("default", Kind.APPROVE, message, keys["ann"])
            )
        ).counted
        revoked = settings.model_copy(update={"people": people(keys, revoked=True)})
        async with role(stack.client, revoked, Role.ACT):
            outcome = await run.handle.result()
        assert outcome.status is Status.STALE
        assert "revoked" in outcome.reason
        assert stack.notes() == []
