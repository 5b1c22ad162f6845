from __future__ import annotations

import base64
import os
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from activities.services.identities import Identities
from activities.services.key_life import people_keys
from activities.services.signatures import BEGIN, END, check, fingerprint, on_device
from models.answers import Identity
from models.canonical import digest_of
from models.card import full_card
from models.gate import Answer, Kind, Refusal, Standing, Verdict, judge, standing
from models.ledger import EventType
from models.loop import Assurance, BreakGlass, GateRule, Intent, Status
from models.orders import Identification
from models.people import NAMESPACE, Key, People, Person
from models.policy import AgentPolicy, Policy, policy_digest
from models.settings import Settings, TemporalSettings
from models.visibility import Role
from scripts import verify_ledger
from scripts.commands.answer import signed
from tests.audits import audited
from tests.conftest import Stack, a_key, note, settings_for, stack_of
from tests.devices import ECDSA, ED25519, Device, agent, armoured, string
from tests.intents import START, a_verdict, an_intent
from tests.test_signatures import make_key
from workers.compose import role

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
MESSAGE = b'{"decision":"approve"}'
ALGORITHM = string(b"sha512")
RULE = GateRule(assurance="signed", hardware=True, remind_seconds=None)
BOTH = pytest.mark.parametrize("kind", [ED25519, ECDSA])
keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen looks at the signatures")


def person(device: Device, **more: Any) -> Person:
    return Person(name="ann", keys=(Key(public=device.line, **more),))


def inside(signature: str) -> bytes:
    return base64.b64decode("".join(signature.strip()[len(BEGIN) : -len(END)].split()))


# The signature.


@BOTH
def test_what_a_security_key_signed_counts(kind: str) -> None:
    device = Device(kind)
    found, reason = check(device.sign(MESSAGE), MESSAGE, person(device), NOW)
    assert found is not None and on_device(found)
    assert reason == ""


@BOTH
@keygen
def test_ssh_keygen_takes_the_signatures_of_these_tests_and_prints_the_same_fingerprint(
    kind: str, tmp_path: Path
) -> None:
    device = Device(kind)
    (tmp_path / "signers").write_text(f'ann namespaces="{NAMESPACE}" {device.line}\n')
    (tmp_path / "signature").write_text(device.sign(MESSAGE))
    command = ["ssh-keygen", "-Y", "verify", "-f", "signers", "-I", "ann", "-n", NAMESPACE, "-s", "signature"]
    for message, code in ((MESSAGE, 0), (MESSAGE + b" ", 255)):
        run = subprocess.run(command, input=message, cwd=tmp_path, capture_output=True, check=False)
        assert run.returncode == code, run.stderr
    (tmp_path / "key.pub").write_text(device.line)
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", "key.pub"], cwd=tmp_path, capture_output=True, check=True, text=True
    )
    assert fingerprint(device.line) in shown.stdout


@BOTH
@keygen
def test_what_ssh_keygen_makes_with_a_security_key_counts(kind: str, tmp_path: Path) -> None:
    device = Device(kind)
    (tmp_path / "key.pub").write_text(device.line)
    command = ["ssh-keygen", "-q", "-Y", "sign", "-n", NAMESPACE, "-f", "key.pub"]
    environment = os.environ | {"SSH_AUTH_SOCK": "agent"}
    with agent(tmp_path / "agent", device):
        made = subprocess.run(
            command, input=MESSAGE, cwd=tmp_path, env=environment, capture_output=True, check=True
        )
    assert check(made.stdout.decode(), MESSAGE, person(device), NOW)[0] is not None


@BOTH
def test_no_changed_byte_leaves_a_signature_that_counts(kind: str) -> None:
    device = Device(kind)
    blob, owner = inside(device.sign(MESSAGE)), person(device)
    assert check(armoured(blob), MESSAGE, owner, NOW)[0] is not None
    for place in range(len(blob)):
        for bit in (0x01, 0x80):
            changed = blob[:place] + bytes([blob[place] ^ bit]) + blob[place + 1 :]
            assert check(armoured(changed), MESSAGE, owner, NOW)[0] is None, place
    for changed in (blob + b"\0", blob[:-1], blob[:-5]):
        assert check(armoured(changed), MESSAGE, owner, NOW)[0] is None


@BOTH
@pytest.mark.parametrize(
    "lie", [{"flags": 0x05}, {"counter": 8}, {"application": b"ssh:other"}, {"application": b""}], ids=str
)
def test_what_the_device_says_is_part_of_what_it_signed(kind: str, lie: dict[str, Any]) -> None:
    device = Device(kind)
    liar = replace(device, **lie)
    honest, other = inside(device.sign(MESSAGE)), inside(liar.sign(MESSAGE))
    assert check(armoured(other), MESSAGE, person(liar), NOW)[0] is not None
    value = honest[honest.index(ALGORITHM) + len(ALGORITHM) + 4 : -5]
    said = struct.pack(">BI", liar.flags, liar.counter)
    forged = other[: other.index(ALGORITHM) + len(ALGORITHM)] + string(value + said)
    assert "does not fit" in check(armoured(forged), MESSAGE, person(liar), NOW)[1]


@BOTH
def test_an_untouched_key_counts_only_where_settings_say_that_it_need_not_be_touched(kind: str) -> None:
    device = Device(kind, flags=0)
    signature = device.sign(MESSAGE)
    assert "nobody touched" in check(signature, MESSAGE, person(device), NOW)[1]
    assert check(signature, MESSAGE, person(device, no_touch_required=True), NOW)[0] is not None
    known = Device(kind, flags=0x04)
    assert "nobody touched" in check(known.sign(MESSAGE), MESSAGE, person(known), NOW)[1]


@BOTH
def test_a_key_that_must_ask_for_a_pin_has_to_have_asked(kind: str) -> None:
    device = Device(kind)
    assert "no PIN" in check(device.sign(MESSAGE), MESSAGE, person(device, verify_required=True), NOW)[1]
    device.flags = 0x05
    assert check(device.sign(MESSAGE), MESSAGE, person(device, verify_required=True), NOW)[0] is not None


@BOTH
def test_dates_revocation_and_purpose_hold_for_security_keys_as_well(kind: str) -> None:
    device, day = Device(kind), timedelta(days=1)
    signature = device.sign(MESSAGE)
    assert "revoked" in check(signature, MESSAGE, person(device, revoked=True), NOW)[1]
    assert "yet" in check(signature, MESSAGE, person(device, valid_after=NOW + day), NOW)[1]
    assert "any more" in check(signature, MESSAGE, person(device, valid_before=NOW - day), NOW)[1]
    assert "purpose" in check(device.sign(MESSAGE, "git"), MESSAGE, person(device), NOW)[1]
    assert "not one of" in check(signature, MESSAGE, person(Device(kind)), NOW)[1]


def test_a_key_of_one_kind_does_not_take_a_signature_of_another() -> None:
    one, other = Device(ED25519), Device(ECDSA)
    blob = inside(one.sign(MESSAGE)).replace(string(one.blob), string(other.blob))
    assert "does not fit" in check(armoured(blob), MESSAGE, person(other), NOW)[1]


def test_an_ordinary_key_that_is_called_a_security_key_is_none() -> None:
    point = b"\1" * 32
    blob = base64.b64encode(string(b"ssh-ed25519") + string(point)).decode()
    assert not on_device(Key(public=f"{ED25519} {blob}"))
    assert not on_device(Key(public="ssh-ed25519 " + "A" * 68))


@pytest.mark.parametrize("option", ["no_touch_required", "verify_required"])
def test_an_ordinary_key_cannot_be_asked_for_touch(option: str) -> None:
    with pytest.raises(ValidationError, match="only a security key"):
        Key.model_validate({"public": "ssh-ed25519 " + "A" * 68, option: True})


def test_the_ledger_is_told_what_a_security_key_is_asked_for() -> None:
    [told] = people_keys([person(Device(), verify_required=True)]).values()
    assert (told["no_touch_required"], told["verify_required"]) == (False, True)
    [plain] = people_keys([Person(name="ann", keys=(Key(public="ssh-ed25519 " + "A" * 68),))]).values()
    assert "verify_required" not in plain


# The rule.


def judged(intent: Intent, identity: Identity, kind: Kind = Kind.APPROVE, **more: Any) -> Verdict | Refusal:
    answer = Answer(digest=digest_of(intent), approver="ann", **more)
    return judge(kind, answer, intent, digest_of(intent), (), intent.expires_at, START, identity)


SOFT = Identity(assurance=Assurance.SIGNED, roles=("break_glass",), key="SHA256:x")
HARD = SOFT.model_copy(update={"hardware": True})


def test_a_gate_that_wants_hardware_refuses_other_approvals_and_takes_rejections() -> None:
    intent = an_intent(RULE)
    ruling = judged(intent, SOFT)
    assert isinstance(ruling, Refusal)
    assert (ruling.field, "security key" in ruling.remedy) == ("signature", True)
    assert isinstance(judged(intent, SOFT, Kind.REJECT), Verdict)
    verdict = judged(intent, HARD)
    assert isinstance(verdict, Verdict) and verdict.hardware
    assert standing(intent, [verdict]) is Standing.PASSED
    assert standing(intent, [verdict.model_copy(update={"hardware": False})]) is Standing.WAITING


def test_breaking_the_glass_needs_the_hardware_too() -> None:
    glass = BreakGlass(classes=("reversible",), alarm=("boss",))
    intent = an_intent(RULE.model_copy(update={"break_glass": glass}))
    more = {"break_glass": True, "role": "break_glass", "comment": "now"}
    assert isinstance(judged(intent, SOFT, **more), Refusal)
    verdict = judged(intent, HARD, **more)
    assert isinstance(verdict, Verdict)
    assert standing(intent, [verdict]) is Standing.PASSED
    assert standing(intent, [verdict.model_copy(update={"hardware": False})]) is Standing.WAITING


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("assurance", list(Assurance))
@pytest.mark.parametrize("rule", [GateRule(), GateRule(assurance="signed"), RULE])
def test_the_one_file_verifier_asks_for_the_same_assurance(
    rule: GateRule, assurance: Assurance, hardware: bool
) -> None:
    intent = an_intent(rule)
    verdict = a_verdict(Kind.APPROVE, digest_of(intent), assurance=assurance, hardware=hardware)
    theirs = verify_ledger.passed(
        intent.model_dump(mode="json"), [(verdict.model_dump(mode="json"), START.isoformat())]
    )
    assert theirs == (standing(intent, [verdict]) is Standing.PASSED)


def test_the_card_says_so_and_only_where_it_is_so() -> None:
    texts = {plan.diff.digest: "diff" for plan in an_intent().plans}
    assert "signed by a security key" in full_card(an_intent(RULE), texts)
    assert "security key" not in full_card(an_intent(), texts)


def test_policies_that_do_not_ask_for_hardware_keep_their_names() -> None:
    # Written down before there was hardware to ask for: intents that wait must not be asked again.
    before = "0745c8ce3dc610ad5a45b12dcc0c3f1f21386cd2b582a17f1b7a0a5fe13a9295"
    assert policy_digest(AgentPolicy(connectors=("null",))) == before
    assert "hardware" not in an_intent().model_dump(mode="json")["gate"]
    assert "hardware" not in a_verdict(Kind.APPROVE, "0" * 64).model_dump(mode="json")
    policy = AgentPolicy(connectors=("null",), gate=RULE)
    assert AgentPolicy.model_validate_json(policy.model_dump_json()) == policy


def test_settings_refuse_a_wish_for_hardware_that_nobody_could_fulfil() -> None:
    with pytest.raises(ValidationError, match='set assurance = "signed"'):
        GateRule(hardware=True)
    policy = Policy(agents={"external": AgentPolicy(connectors=("null",), gate=RULE)})
    with pytest.raises(ValidationError, match="nobody has one"):
        Settings(policy=policy)
    Settings(policy=policy, people=(person(Device()),))


# Who it was, asked again.


def message_of(intent_digest: str, **more: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    times = {"issued_at": now.isoformat(), "expires_at": (now + timedelta(minutes=5)).isoformat()}
    return {"digest": intent_digest, "approver": "ann", "nonce": os.urandom(16).hex()} | times | more


async def test_who_acts_establishes_again_that_a_device_signed() -> None:
    soft, device = "ssh-ed25519 " + "A" * 68, Device()
    ann = Person(name="ann", keys=(Key(public=soft), Key(public=device.line)))
    identities = Identities(People(people=(ann,)), lambda: datetime.now(UTC))
    answer = Answer.model_validate(device.answers(Kind.APPROVE, message_of("0" * 64)))
    wanted = Identification(tenant="default", kind=Kind.APPROVE, answer=answer)
    identity = await identities.identify(wanted)
    assert (identity.assurance, identity.hardware) == (Assurance.SIGNED, True)
    fields = answer.model_dump(include={"nonce", "issued_at", "expires_at", "signature"})
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    verdict = a_verdict(
        Kind.APPROVE,
        "0" * 64,
        assurance=Assurance.SIGNED,
        key=identity.key,
        hardware=True,
        comment_sha256=empty,
        **fields,
    )
    assert identities.doubt("default", verdict) is None
    pin = ann.model_copy(update={"keys": (Key(public=device.line, verify_required=True),)})
    later = Identities(People(people=(pin,)), lambda: datetime.now(UTC))
    assert "no PIN" in (later.doubt("default", verdict) or "")


@keygen
async def test_a_record_that_calls_an_ordinary_key_a_device_is_not_believed(tmp_path: Path) -> None:
    path = make_key(tmp_path)
    ann = Person(name="ann", keys=(Key(public=path.with_suffix(".pub").read_text().strip()),))
    identities = Identities(People(people=(ann,)), lambda: datetime.now(UTC))
    message = await signed("default", Kind.APPROVE, {"digest": "0" * 64, "approver": "ann"}, path)
    answer = Answer.model_validate(message)
    identity = await identities.identify(Identification(tenant="default", kind=Kind.APPROVE, answer=answer))
    assert not identity.hardware
    intent = an_intent(GateRule(assurance="signed"))
    verdict = judge(Kind.APPROVE, answer, intent, answer.digest, (), intent.expires_at, START, identity)
    assert isinstance(verdict, Verdict)
    assert identities.doubt("default", verdict) is None
    forged = verdict.model_copy(update={"hardware": True})
    assert "not by a security key" in (identities.doubt("default", forged) or "")


# The loop.


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(ECDSA)


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("keys"))


def hardware_settings(
    temporal: TemporalSettings, data: Path, device: Device, soft: Path, **more: Any
) -> Settings:
    keys = (Key(public=device.line, **more), Key(public=soft.with_suffix(".pub").read_text().strip()))
    policy = Policy(agents={"external": AgentPolicy(connectors=("null",), gate=RULE)})
    return settings_for(temporal, data, policy=policy, people=(Person(name="ann", keys=keys),))


@pytest.fixture
async def stack(
    temporal: TemporalSettings, tmp_path: Path, device: Device, soft: Path
) -> AsyncIterator[Stack]:
    async with stack_of(hardware_settings(temporal, tmp_path, device, soft)) as made:
        yield made


@keygen
@pytest.mark.parametrize("by_signal", [False, True], ids=["update", "signal"])
async def test_only_the_device_gets_an_effect_past_a_gate_that_wants_it(
    stack: Stack, device: Device, soft: Path, by_signal: bool, tmp_path: Path
) -> None:
    run = await stack.propose(a_key(), note())
    digest = await stack.digest(run)
    ordinary = await signed("default", Kind.APPROVE, {"digest": digest, "approver": "ann"}, soft)
    judged = await stack.answer(run, Kind.APPROVE, **ordinary)
    assert (judged.counted, judged.field) == (False, "signature")
    untouched = replace(device, flags=0)
    judged = await stack.answer(run, Kind.APPROVE, **untouched.answers(Kind.APPROVE, message_of(digest)))
    assert (judged.counted, "nobody touched" in judged.remedy) == (False, True)
    assert stack.notes() == []
    good = device.answers(Kind.APPROVE, message_of(digest))
    if by_signal:
        await run.handle.signal("approve", good)
    else:
        assert (await stack.answer(run, Kind.APPROVE, **good)).counted
    assert (await run.handle.result()).status is Status.EXECUTED
    assert len(stack.notes()) == 1
    [verdict] = [e.body for e in await stack.events(run) if e.type is EventType.VERDICT]
    assert (verdict["assurance"], verdict["hardware"]) == ("signed", True)
    assert verdict["key"] == fingerprint(device.line)
    report = await audited(stack, tmp_path)
    assert (report["status"], report["signatures"]) == ("sound", 1)


@keygen
async def test_a_device_that_must_ask_for_a_pin_by_the_time_of_the_effect_leads_to_none(
    temporal: TemporalSettings, tmp_path: Path, device: Device, soft: Path
) -> None:
    settings = hardware_settings(temporal, tmp_path, device, soft)
    wait = (Role.DECIDE, Role.INFER, Role.REMEMBER)
    async with stack_of(settings, roles=(*wait, Role.ACT)) as stack:
        run = await stack.propose(a_key(), note())
        digest = await stack.digest(run)
    async with stack_of(settings, roles=wait) as stack:
        good = device.answers(Kind.APPROVE, message_of(digest))
        assert (await stack.answer(run, Kind.APPROVE, **good)).counted
        stricter = hardware_settings(temporal, tmp_path, device, soft, verify_required=True)
        async with role(stack.client, stricter, Role.ACT):
            outcome = await run.handle.result()
        assert outcome.status is Status.STALE
        assert "no PIN" in outcome.reason
        assert stack.notes() == []
