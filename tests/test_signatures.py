from __future__ import annotations

import base64
import contextlib
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.services.identities import Identities
from activities.services.signatures import BEGIN, END, check, fingerprint
from models.gate import Answer, Kind
from models.orders import Identification
from models.people import NAMESPACE, Key, People, Person

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
MESSAGE = b'{"decision":"approve"}'

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen makes the signatures")


def make_key(folder: Path, name: str = "key", kind: str = "ed25519") -> Path:
    path = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)], check=True)
    return path


def sign(key: Path, message: bytes = MESSAGE, namespace: str = NAMESPACE) -> str:
    command = ["ssh-keygen", "-q", "-Y", "sign", "-n", namespace, "-f", str(key)]
    return subprocess.run(command, input=message, capture_output=True, check=True).stdout.decode()


def blob(armoured: str) -> bytes:
    """What is inside; spaces and the unused bits of the last character say nothing."""
    with contextlib.suppress(ValueError):
        inner = armoured.strip()[len(BEGIN) : -len(END)]
        return base64.b64decode("".join(inner.split()), validate=True)
    return b""


def person(key: Path, **more: object) -> Person:
    return Person.model_validate(
        {"name": "ann", "keys": [{"public": key.with_suffix(".pub").read_text().strip()} | more]}
    )


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signature(key: Path) -> str:
    return sign(key)


def test_a_signature_of_ssh_keygen_counts(key: Path, signature: str) -> None:
    found, reason = check(signature, MESSAGE, person(key), NOW)
    assert found is not None
    assert reason == ""


def test_the_fingerprint_is_the_one_ssh_keygen_prints(key: Path) -> None:
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(key)], capture_output=True, check=True, text=True
    ).stdout
    assert fingerprint(key.with_suffix(".pub").read_text()) in shown


def test_another_message_purpose_or_person_does_not_count(key: Path, signature: str, tmp_path: Path) -> None:
    other = make_key(tmp_path)
    assert check(signature, MESSAGE + b" ", person(key), NOW)[0] is None
    assert "purpose" in check(sign(key, namespace="git"), MESSAGE, person(key), NOW)[1]
    assert "not one of" in check(signature, MESSAGE, person(other), NOW)[1]


def test_revoked_and_outdated_keys_do_not_count(key: Path, signature: str) -> None:
    later, earlier = NOW + timedelta(days=1), NOW - timedelta(days=1)
    assert "revoked" in check(signature, MESSAGE, person(key, revoked=True), NOW)[1]
    assert "yet" in check(signature, MESSAGE, person(key, valid_after=later), NOW)[1]
    assert "any more" in check(signature, MESSAGE, person(key, valid_before=earlier), NOW)[1]


def test_a_key_of_another_kind_is_refused(tmp_path: Path, key: Path) -> None:
    assert check(sign(make_key(tmp_path, kind="ecdsa")), MESSAGE, person(key), NOW)[0] is None


@given(data=st.data())
def test_no_change_of_one_character_leaves_a_signature_that_counts(
    key: Path, signature: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(signature.strip()) - 1))
    put = data.draw(st.characters(codec="ascii"))
    changed = signature[:at] + put + signature[at + 1 :]
    same_armour = changed.strip().startswith(BEGIN) and changed.strip().endswith(END)
    if not same_armour or blob(changed) != blob(signature):
        assert check(changed, MESSAGE, person(key), NOW)[0] is None


@given(st.text() | st.text().map(lambda inner: f"{BEGIN}{inner}{END}"))
def test_rubbish_is_a_reason_and_never_an_exception(text: str) -> None:
    nobody = Person(name="ann", keys=(Key(public="ssh-ed25519 " + "A" * 68),))
    assert check(text, MESSAGE, nobody, NOW)[0] is None


MOMENTS = st.datetimes(timezones=st.just(UTC)) | st.sampled_from(
    [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]
)


@given(MOMENTS, MOMENTS)
async def test_an_answer_with_any_dates_is_one_that_can_be_refused(
    issued: datetime, expires: datetime
) -> None:
    nobody = Person(name="ann", keys=(Key(public="ssh-ed25519 " + "A" * 68),))
    answer = Answer(
        digest="a" * 64,
        approver="ann",
        nonce="0" * 16,
        issued_at=issued,
        expires_at=expires,
        signature=f"{BEGIN}é{END}",
    )
    wanted = Identification(tenant="default", kind=Kind.APPROVE, answer=answer)
    found = await Identities(People(people=(nobody,)), lambda: NOW).identify(wanted)
    assert found.field in ("signature", "expires_at")
