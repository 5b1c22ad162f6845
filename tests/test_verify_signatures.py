"""Answers that call themselves signed, held against the signers an auditor brings, by both verifiers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activities.services.attested import Attested
from activities.services.identities import statement_of
from activities.services.signatures import fingerprint
from activities.services.signers import read_signers
from models.answers import Answer, Identity, Kind, recorded
from models.canonical import canonical
from models.ledger import Event, EventType
from models.loop import Assurance
from models.people import NAMESPACE
from scripts import verify_ledger
from tests.devices import ECDSA, ED25519, Device, armoured, string
from tests.ledgers import NOW
from tests.test_people import public
from tests.test_signatures import blob, make_key
from tests.test_signatures import sign as keygen
from tests.test_verifiers_agree import (
    DIGEST,
    GOOD,
    INTENT,
    KEY,
    TENANT,
    Both,
    Plain,
    both,
    event,
    export,
    placed,
)

__all__ = ["both"]

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen makes the signatures")
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
AT = 4
"""Where the first answer stands in a story."""
Signer = Path | Device


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: make_key(folder, name) for name in ("ann", "bob")}


def line_of(key: Signer) -> str:
    return " ".join((key.line if isinstance(key, Device) else public(key)).split()[:2])


def sign(key: Signer, message: bytes, namespace: str = NAMESPACE) -> str:
    return key.sign(message, namespace) if isinstance(key, Device) else keygen(key, message, namespace)


def answer(
    key: Signer, kind: Kind = Kind.APPROVE, tenant: str = TENANT, namespace: str = NAMESPACE, **more: Any
) -> Plain:
    """The body of an event that records what was signed."""
    message: Plain = {"digest": DIGEST, "approver": "ann", "role": "editor", "comment": "fine"}
    message |= {"nonce": "a" * 32, "issued_at": NOW - MINUTE, "expires_at": NOW + 9 * MINUTE} | more
    said = Answer.model_validate(message)
    statement = statement_of(tenant, kind, said)
    assert statement is not None
    said = said.model_copy(update={"signature": sign(key, statement.bytes(), namespace)})
    hardware = isinstance(key, Device)
    known = Identity(assurance=Assurance.SIGNED, key=fingerprint(line_of(key)), hardware=hardware)
    return recorded(kind, said, known).model_dump(mode="json")


@pytest.fixture(scope="module")
def anns(keys: dict[str, Path]) -> Plain:
    """Signed once; ssh-keygen takes its time."""
    return answer(keys["ann"])


def file_of(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def signers(keys: dict[str, Path], options: str = "", words: str = "roles=editor,owner") -> bytes:
    """A file that names both."""
    ann, bob = (line_of(keys[name]) for name in ("ann", "bob"))
    given = f'namespaces="{NAMESPACE}"{options}'
    return file_of("# of tests", f"ann {given} {ann} {words}", f"bob {bob} bob's laptop roles=editor")


def told(*bodies: Plain, at: datetime = NOW, kind: EventType = EventType.VERDICT) -> tuple[list[str], str]:
    """A run in which these answers were given before the effect."""
    answers = [event(kind, body) | {"recorded_at": at.isoformat()} for body in bodies]
    return export(placed([*GOOD[:3], *answers, *GOOD[4:]]), INTENT)


@pytest.fixture
def said(both: Both, keys: dict[str, Path]) -> Callable[..., tuple[int, int | None, str]]:
    """What both say of a run with these answers."""

    def say(
        *bodies: Plain,
        file: bytes | None = None,
        at: datetime = NOW,
        kind: EventType = EventType.VERDICT,
    ) -> tuple[int, int | None, str]:
        lines, note = told(*bodies, at=at, kind=kind)
        return both.say(lines, note, signers=signers(keys) if file is None else file)

    return say


Say = Callable[..., tuple[int, int | None, str]]


# What was signed.


def test_what_people_signed_is_sound(said: Say, keys: dict[str, Path]) -> None:
    assert said(answer(keys["ann"])) == (0, None, "")
    assert said(answer(keys["ann"], role=None, comment="")) == (0, None, "")
    handed = answer(keys["ann"], Kind.DELEGATE, to="bob", until=NOW + DAY, nonce="b" * 16)
    assert said(handed, answer(keys["bob"], approver="bob")) == (0, None, "")


@pytest.mark.parametrize("kind", [Kind.REJECT, Kind.REVISE])
def test_every_kind_of_answer_is_looked_at(both: Both, keys: dict[str, Path], kind: Kind) -> None:
    body = answer(keys["ann"], kind)
    for changed, code in (({}, 0), ({"comment_sha256": "0" * 64}, 1)):
        lines, note = export(placed([*GOOD[:3], event(EventType.VERDICT, body | changed)]), INTENT)
        assert both.say(lines, note, signers=signers(keys))[0] == code


def test_a_review_is_looked_at_and_may_have_the_nonce_of_a_verdict(both: Both, keys: dict[str, Path]) -> None:
    verdict, review = answer(keys["ann"]), answer(keys["bob"], approver="bob", review=True)
    for changed, code, first in (({}, 0, None), ({"review": False}, 1, 8)):
        after = event(EventType.REVIEW, review | changed)
        lines, note = export(placed([*GOOD[:3], event(EventType.VERDICT, verdict), *GOOD[4:], after]), INTENT)
        assert both.say(lines, note, signers=signers(keys))[:2] == (code, first)


@pytest.mark.parametrize("kind", [ED25519, ECDSA])
def test_security_keys_must_have_been_touched_and_have_asked_as_their_line_says(said: Say, kind: str) -> None:
    for flags, words, code in (
        (0x01, "", 0),
        (0x00, "", 1),
        (0x04, "", 1),
        (0x00, "no-touch-required", 0),
        (0x01, "verify-required", 1),
        (0x05, "roles=editor verify-required", 0),
        (0x04, "verify-required no-touch-required", 0),
    ):
        device = Device(kind, flags=flags)
        file = file_of(f"ann {line_of(device)} {words}")
        assert said(answer(device), file=file)[:2] == (code, AT if code else None), (flags, words)


def test_no_changed_byte_of_a_signature_leaves_one_that_either_takes(
    keys: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "signers"
    for key in (keys["ann"], Device(ED25519), Device(ECDSA)):
        file.write_text(f"ann {line_of(key)}\n")
        [stands] = placed([event(EventType.VERDICT, answer(key))])
        assert isinstance(stands, dict)
        good = blob(stands["body"]["signature"])
        made = good[good.rindex(b"sha512") + 10 :]
        longer = good[: -len(made) - 4] + string(made + b"\1\0\0\0\1")
        flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(len(good))]
        for changed in (good, good + b"\0", good[:-1], longer, *flipped):
            one = stands | {"body": stands["body"] | {"signature": armoured(changed)}}
            followed = Attested(read_signers(file.read_bytes()))
            found = list(followed.take(Event.model_validate(one | {"leaf_hash": "0" * 64})))
            why = verify_ledger.doubted(one, verify_ledger.read_signers(str(file)))[0]
            assert (found == [], why == "") == (changed == good, changed == good), changed


def test_an_ordinary_key_that_is_called_a_device_is_a_lie(said: Say, keys: dict[str, Path]) -> None:
    assert said(answer(keys["ann"]) | {"hardware": True})[:2] == (1, AT)
    assert said(answer(keys["ann"]) | {"hardware": False})[0] == 0
    device = Device()
    body = {name: value for name, value in answer(device).items() if name != "hardware"}
    assert said(body, file=file_of(f"ann {line_of(device)}"))[0] == 0


def test_without_signers_answers_that_call_themselves_signed_are_counted_and_believed(both: Both) -> None:
    lines, note = told({"kind": "approve", "digest": DIGEST, "approver": "ann", "assurance": "signed"})
    assert both.say(lines, note) == (0, None, "")
    assert both.say(lines, note, signers=b"")[:2] == (1, AT)


def test_what_is_only_claimed_is_not_looked_at(both: Both) -> None:
    lines, note = told({"kind": "approve", "digest": DIGEST, "approver": "ann", "assurance": "claimed"})
    assert both.say(lines, note, signers=b"") == (0, None, "")


CHANGED: dict[str, Plain] = {
    "another approver": {"approver": "bob"},
    "nobody": {"approver": None},
    "a stranger": {"approver": "eve"},
    "another role": {"role": "owner"},
    "no role": {"role": None},
    "an empty role": {"role": ""},
    "another decision": {"kind": "reject"},
    "no decision": {"kind": "agree"},
    "another comment": {"comment_sha256": "0" * 64},
    "no comment": {"comment_sha256": None},
    "another nonce": {"nonce": "b" * 32},
    "no nonce": {"nonce": None},
    "handed on": {"to": "bob"},
    "handed to nobody": {"to": ""},
    "for a time": {"until": "2026-05-02T12:00:00Z"},
    "for no time": {"until": ""},
    "for a number": {"until": 0},
    "made at another time": {"issued_at": "2026-05-01T12:00:00Z"},
    "in other words": {"issued_at": "2026-05-01T11:59:00+00:00"},
    "in a number": {"issued_at": 1777636740},
    "with fractions": {"issued_at": "2026-05-01T11:59:00.000000Z"},
    "without a zone": {"issued_at": "2026-05-01T11:59:00"},
    "ends at another time": {"expires_at": "2026-05-02T11:00:00Z"},
    "never ends": {"expires_at": None},
    "breaks the glass": {"break_glass": True},
    "a number for no": {"break_glass": 0},
    "nothing for no": {"review": None},
    "a text for no": {"review": "false"},
    "a review": {"review": True},
    "another key": {"key": "SHA256:" + "A" * 43},
    "no key": {"key": None},
    "hardware in a word": {"hardware": "true"},
    "hardware in a number": {"hardware": 1},
    "hardware in none": {"hardware": None},
    "no signature": {"signature": None},
    "an empty signature": {"signature": ""},
    "a number for a signature": {"signature": 5},
    "a long signature": {"signature": "-----BEGIN SSH SIGNATURE-----" + "A" * 100_000},
    "half a signature": {"signature": "-----BEGIN SSH SIGNATURE-----\nU1NI\n-----END SSH SIGNATURE-----"},
    "a list": {"approver": ["ann"]},
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_answer_is_found_where_it_stands(said: Say, keys: dict[str, Path], name: str) -> None:
    assert said(answer(keys["ann"]) | CHANGED[name])[:2] == (1, AT)


@pytest.mark.parametrize(
    "name", sorted({"kind", "digest", "approver", "nonce", "issued_at", "signature", "key"})
)
def test_an_answer_without_one_of_its_parts_is_found(said: Say, keys: dict[str, Path], name: str) -> None:
    body = answer(keys["ann"])
    del body[name]
    assert said(body)[:2] == (1, AT)


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"issued_at": "2026-05-01T11:59:00+00:00"},
        {"expires_at": "2026-05-01T12:09:00.000000Z"},
        {"until": "2026-05-01"},
        {"nonce": "abc"},
        {"nonce": "A" * 32},
        {"comment_sha256": "fine"},
        {"role": "Editor"},
        {"to": "b b"},
    ],
    ids=str,
)
def test_a_statement_has_one_form_even_where_somebody_signed_another(
    said: Say, keys: dict[str, Path], odd: Plain
) -> None:
    body = answer(keys["ann"]) | odd
    names = ("digest", "approver", "role", "to", "comment_sha256", "nonce", "issued_at", "expires_at", *odd)
    stated = {"schema_version": 1, "tenant": TENANT, "decision": "approve"}
    stated |= {name: body[name] for name in names}
    file = file_of(f"ann {line_of(keys['ann'])}")
    code, first, _ = said(body | {"signature": sign(keys["ann"], canonical(stated))}, file=file)
    assert (code, first) == ((1, AT) if odd else (0, None))


def test_what_was_delegated_is_part_of_what_was_signed(said: Say, keys: dict[str, Path]) -> None:
    handed = answer(keys["ann"], Kind.DELEGATE, to="bob", until=NOW + DAY, nonce="b" * 16)
    then = answer(keys["bob"], approver="bob")
    for changed in ({"to": "ann"}, {"until": None}, {"until": "2026-05-09T12:00:00Z"}):
        assert said(handed | changed, then)[:2] == (1, AT)


def test_a_signature_by_another_key_for_another_purpose_or_tenant_is_found(
    said: Say, keys: dict[str, Path]
) -> None:
    bobs = answer(keys["bob"])
    anns = fingerprint(line_of(keys["ann"]))
    for body in (
        bobs,
        bobs | {"key": anns},
        answer(keys["ann"], namespace="git"),
        answer(keys["ann"], tenant="other"),
        answer(keys["ann"], digest="b" * 64) | {"digest": DIGEST},
        answer(keys["ann"]) | {"signature": bobs["signature"]},
    ):
        assert said(body)[:2] == (1, AT)


def test_what_was_signed_for_the_tenant_of_a_log_counts_there(keys: dict[str, Path], tmp_path: Path) -> None:
    plain = event(EventType.VERDICT, answer(keys["ann"], tenant="other")) | {"log_id": "other"}
    [stands] = placed([plain])
    assert isinstance(stands, dict)
    file = tmp_path / "signers"
    file.write_bytes(signers(keys))
    for tenant, good in (("other", True), (TENANT, False)):
        one = stands | {"log_id": tenant}
        followed = Attested(read_signers(file.read_bytes()))
        found = list(followed.take(Event.model_validate(one | {"leaf_hash": "0" * 64})))
        assert (found == []) == good
        assert (verify_ledger.doubted(one, verify_ledger.read_signers(str(file)))[0] == "") == good


def test_a_signed_answer_of_somebody_whom_nobody_named_is_found(said: Say, keys: dict[str, Path]) -> None:
    only_bob = file_of(f"bob {line_of(keys['bob'])}")
    assert said(answer(keys["ann"]), file=only_bob)[:2] == (1, AT)
    other_use = file_of(f'ann namespaces="git" {line_of(keys["ann"])}')
    assert said(answer(keys["ann"]), file=other_use)[:2] == (1, AT)
    other_name = file_of(f"Ann {line_of(keys['ann'])}")
    assert said(answer(keys["ann"]), file=other_name)[:2] == (1, AT)


@pytest.mark.parametrize(
    ("words", "code"), [("", 0), ("roles=editor", 0), ("roles=owner", 1), ("roles=", 1), ("an editor", 0)]
)
def test_a_role_is_one_that_the_file_gives(said: Say, keys: dict[str, Path], words: str, code: int) -> None:
    assert said(answer(keys["ann"]), file=signers(keys, words=words))[0] == code
    assert said(answer(keys["ann"], role=None), file=signers(keys, words=words))[0] == 0


def test_an_answer_counts_once_within_an_intent(said: Say, keys: dict[str, Path]) -> None:
    one, other = answer(keys["ann"]), answer(keys["ann"], nonce="b" * 32)
    assert said(one, one)[:2] == (1, AT + 1)
    assert said(one, other)[0] == 0
    assert said(one, answer(keys["bob"], approver="bob"))[:2] == (1, AT + 1)


def test_two_names_of_one_key_are_not_two_people(said: Say, keys: dict[str, Path]) -> None:
    file = file_of(f"ann,ann@example.com {line_of(keys['ann'])}")
    one, other = answer(keys["ann"]), answer(keys["ann"], approver="ann@example.com", nonce="b" * 32)
    assert said(one, file=file)[0] == said(other, file=file)[0] == 0
    assert said(one, other, file=file)[:2] == (1, AT + 1)


@pytest.mark.parametrize("spoilt", [False, True])
def test_signatures_that_other_processes_look_at_are_judged_in_their_order(
    keys: dict[str, Path], tmp_path: Path, spoilt: bool
) -> None:
    long = [event("belief", {"text": "x" * 700_000}, "long", "long")] * 12
    good = answer(keys["ann"])
    bodies = [good, good | {"role": "owner"} if spoilt else answer(keys["ann"], nonce="b" * 16)]
    first, second = (event(EventType.VERDICT, body) for body in bodies)
    lines, note = export(placed([*GOOD[:3], first, *long, second, *GOOD[4:]]), INTENT)
    file, kept, allowed = tmp_path / "export", tmp_path / "note", tmp_path / "signers"
    file.write_text("".join(f"{line}\n" for line in lines))
    kept.write_text(note)
    allowed.write_bytes(signers(keys))
    assert file.stat().st_size > 2 * verify_ledger.PART
    command = [sys.executable, "-I", verify_ledger.__file__, "export", str(file), "--key", str(KEY)]
    command += ["--checkpoint", str(kept), "--signers", str(allowed)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(ended.stdout)
    found = ended.returncode, report["first_bad_event"], report["signatures"]
    assert found == (int(spoilt), 17 if spoilt else None, 2), report


# When it was signed.


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (',valid-after="20260501"', 0),
        (',valid-after="20260501Z"', 0),
        (',valid-after="202605011200"', 0),
        (',valid-after="20260501120000Z"', 0),
        (',valid-after="20260501120001Z"', 1),
        (',Valid-After="20260502"', 1),
        (',valid-before="20260501"', 1),
        (',valid-before="20260501120000Z"', 1),
        (',valid-before="20260501120001"', 0),
        (',valid-after="20260430",valid-before="202605011201Z"', 0),
    ],
)
def test_a_key_counts_within_its_dates(said: Say, keys: dict[str, Path], options: str, code: int) -> None:
    first = AT if code else None
    assert said(answer(keys["ann"]), file=signers(keys, options))[:2] == (code, first)


@pytest.mark.parametrize(
    ("issued", "expires", "code"),
    [
        (5 * MINUTE, DAY, 0),
        (5 * MINUTE + timedelta(microseconds=1), DAY, 1),
        (-MINUTE, DAY - MINUTE, 0),
        (-MINUTE, DAY, 1),
        (-MINUTE, timedelta(microseconds=1), 0),
        # An honest worker comes to it when it was away between looking at an answer and recording it.
        (-MINUTE, timedelta(0), 2),
        (-DAY, -MINUTE, 2),
    ],
)
def test_an_answer_counts_while_it_says_so(
    said: Say, keys: dict[str, Path], issued: timedelta, expires: timedelta, code: int
) -> None:
    body = answer(keys["ann"], issued_at=NOW + issued, expires_at=NOW + expires)
    assert said(body)[:2] == (code, AT if code == 1 else None)


def test_nothing_can_be_told_of_an_answer_that_was_moved_to_before_what_stands_before_it(
    said: Say, keys: dict[str, Path]
) -> None:
    file = signers(keys, ',valid-before="20260501115800Z"')
    for at, code in ((NOW - 5 * MINUTE, 0), (NOW - 6 * MINUTE, 2)):
        body = answer(keys["ann"], issued_at=at, expires_at=at + MINUTE)
        assert said(body, at=at, file=file)[0] == code


def test_of_a_revoked_key_nothing_can_be_told_but_what_was_never_signed(
    said: Say, keys: dict[str, Path]
) -> None:
    file = signers(keys, words="revoked roles=editor")
    code, first, what = said(answer(keys["ann"]), file=file)
    assert (code, first) == (2, None) and what.startswith("event 4: the key of ann was revoked")
    assert said(answer(keys["ann"]) | {"nonce": "b" * 32}, file=file)[:2] == (1, AT)
    assert said(answer(keys["bob"], approver="bob"), file=file)[0] == 0
    late = signers(keys, ',valid-before="20260501"', "revoked")
    assert said(answer(keys["ann"]), file=late)[:2] == (1, AT)


# The file.


def with_key(keys: dict[str, Path], *lines: str) -> bytes:
    """Lines in which KEY, BOB and DEVICE stand for keys."""
    texts = {"KEY": line_of(keys["ann"]), "BOB": line_of(keys["bob"]), "DEVICE": line_of(Device())}
    texts["BLOB"] = texts["KEY"].split()[1]
    made = list[str]()
    for line in lines:
        for word, text in texts.items():
            line = line.replace(word, text)
        made.append(line)
    return file_of(*made)


GOOD_FILES: dict[str, tuple[str, ...]] = {
    "blanks and remarks": ("", "  \t", "# one", "\t# two", "ann \t  KEY   roles=editor  "),
    "ends of lines from elsewhere": ("ann KEY\r", "\r"),
    "many names": ("eve,ann,rené@example.com KEY",),
    "a name beyond ASCII": ("rené BOB", "ann KEY é\u00a0ü"),
    "other purposes": ('*@example.com namespaces="git" BOB', 'ann namespaces="git,file" KEY', "ann KEY"),
    "several purposes": (f'ann namespaces="git,{NAMESPACE}" KEY',),
    "options in capitals": (f'ann NAMESPACES="{NAMESPACE}",VALID-AFTER="20260101" KEY',),
    "two keys of one": ("ann BOB", "ann KEY", "ann DEVICE no-touch-required"),
    "words of a comment": ("ann KEY ann's own role, not revoke-able, roles are owner",),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_a_file_that_openssh_would_read_is_read(said: Say, keys: dict[str, Path], name: str) -> None:
    assert said(answer(keys["ann"]), file=with_key(keys, *GOOD_FILES[name])) == (0, None, "")


BAD_FILES: dict[str, tuple[str, ...]] = {
    "no key": ("ann",),
    "half a key": ("ann ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAA",),
    "a key of a kind that does not count": ("ann ssh-rsa " + "A" * 68,),
    "a key that is called another": ("ann sk-KEY",),
    "a key that is called a device": ("ann sk-ssh-ed25519@openssh.com BLOB",),
    "a pattern": ("*@example.com KEY",),
    "a question mark": ("an? KEY",),
    "all but one": ("!bob,ann KEY",),
    "quotes": ('"ann" KEY',),
    "an empty name": ("ann,,bob KEY",),
    "a name with a blank of another kind": ("an\u00a0n KEY",),
    "a long name": ("a" * 201 + " KEY",),
    "one name twice": ("ann,ann KEY",),
    "one name in two spellings": ("ann KEY", "Ann BOB"),
    "one key twice": ("ann KEY", "ann KEY again"),
    "one key of two": ("ann KEY", "bob KEY"),
    "an authority": ("ann cert-authority KEY",),
    "an authority among others": (f'ann namespaces="{NAMESPACE}",CERT-AUTHORITY KEY',),
    "an unknown option": ('ann from="10.0.0.0/8" KEY',),
    "an option without a value": ("ann namespaces KEY",),
    "an option without quotes": ("ann valid-after=20260101 KEY",),
    "an empty option": ('ann valid-after="" KEY',),
    "an option twice": ('ann valid-after="20260101",valid-after="20260102" KEY',),
    "a comma at the end": ('ann valid-after="20260101", KEY',),
    "no comma": ('ann valid-after="20260101"valid-before="20270101" KEY',),
    "an open quote": ('ann valid-after="20260101 KEY',),
    "a pattern of purposes": ('ann namespaces="countersign-*" KEY',),
    "a month too many": ('ann valid-after="20261301" KEY',),
    "a day too many": ('ann valid-after="20260230" KEY',),
    "a second too many": ('ann valid-after="20260101120060" KEY',),
    "an hour alone": ('ann valid-after="2026010112" KEY',),
    "another zone": ('ann valid-after="20260101+01:00" KEY',),
    "digits of others": ('ann valid-after="２０２６０１０１" KEY',),
    "year zero": ('ann valid-after="00000101" KEY',),
    "an end before the beginning": ('ann valid-after="20260102",valid-before="20260101" KEY',),
    "role for roles": ("ann KEY role=editor",),
    "Roles for roles": ("ann KEY Roles=editor",),
    "roles twice": ("ann KEY roles=editor roles=owner",),
    "a role that is none": ("ann KEY roles=editor,,owner",),
    "a role in capitals": ("ann KEY roles=Editor",),
    "a word as settings write it": ("ann DEVICE verify_required",),
    "a word with a value": ("ann KEY revoked=yes",),
    "a word in capitals": ("ann KEY REVOKED",),
    "a word twice": ("ann KEY revoked revoked",),
    "touch of an ordinary key": ("ann KEY no-touch-required",),
    "a PIN of an ordinary key": ("ann KEY verify-required",),
    "an invisible beginning": ("\ufeffann KEY",),
    "a zero": ("ann KEY \0",),
    "an escape": ("ann KEY \x1b[2J",),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_could_be_misread_is_refused_by_line(said: Say, keys: dict[str, Path], name: str) -> None:
    lines = BAD_FILES[name]
    code, first, why = said(answer(keys["ann"]), file=with_key(keys, "# first", *lines))
    assert (code, first) == (2, None)
    assert f"line {1 + len(lines)} of --signers" in why and "is not accepted" in why


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe\x00",
        bytes(range(256)),
        b"ann ssh-ed25519 \x80",
        b"a" * 10_000_000,
        b"#" * 10_000_000,
        b"ann " + b'"x' * 400_000,
        b"ann " + b'""' * 400_000 + b" ssh-ed25519 " + b"A" * 68,
        b"ann ssh-ed25519 " + b"A" * 1_000_000,
        b"\n" * 1_000_000 + b"ann",
    ],
    ids=lambda data: f"{len(data)} bytes, {data[:4]!r}",
)
def test_what_is_no_such_file_is_refused_and_not_fallen_over(both: Both, data: bytes) -> None:
    lines, note = export(placed(GOOD), INTENT)
    assert both.say(lines, note, signers=data)[:2] == (2, None)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_read_a_changed_file_alike(
    said: Say, keys: dict[str, Path], anns: Plain, data: st.DataObject
) -> None:
    line = f'ann,eve namespaces="{NAMESPACE}",valid-after="20260401Z" KEY roles=editor revoked'
    file = with_key(keys, line, "bob BOB x").decode()
    at = data.draw(st.integers(0, len(file) - 1))
    put = data.draw(st.sampled_from([*' \t\n\r",=*!?#AZaz09-@_.\\\0é\u00a0', "", file[at] * 2]))
    said(anns, file=(file[:at] + put + file[at + 1 :]).encode())


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_character_of_an_answer_leaves_it_sound(
    said: Say, anns: Plain, data: st.DataObject
) -> None:
    good = dict(anns)
    name = data.draw(st.sampled_from([name for name in good if isinstance(good[name], str)]))
    text = good[name]
    at = data.draw(st.integers(0, len(text) - 1))
    put = data.draw(st.sampled_from(sorted(set("azAZ09+/=-: \nTé") - {text[at]})))
    changed = text[:at] + put + text[at + 1 :]
    code, first, _ = said(good | {name: changed})
    # Blanks in a signature say nothing, nor do the last bits of its last letter.
    unread = name == "assurance" or (name == "signature" and blob(changed) == blob(text))
    assert (code, first) == (1, AT) or unread, (name, changed)


def test_ssh_keygen_reads_the_file_and_says_the_same(
    said: Say, keys: dict[str, Path], tmp_path: Path
) -> None:
    file, body = signers(keys, ',valid-before="20260502Z"'), answer(keys["ann"])
    (tmp_path / "signers").write_bytes(file)
    (tmp_path / "signature").write_text(body["signature"])
    statement = statement_of(TENANT, Kind.APPROVE, Answer.model_validate(_message(body)))
    assert statement is not None
    for name, at, good in (
        ("ann", "20260501Z", True),
        ("ann", "20260503Z", False),
        ("bob", "20260501Z", False),
    ):
        command = ["ssh-keygen", "-Y", "verify", "-f", "signers", "-I", name, "-n", NAMESPACE]
        command += ["-s", "signature", f"-Overify-time={at}"]
        ran = subprocess.run(command, input=statement.bytes(), cwd=tmp_path, capture_output=True, check=False)
        assert (ran.returncode == 0) == good, (name, at, ran.stderr)
    assert said(body, file=file)[0] == 0
    assert said(body, file=file, at=NOW + 2 * DAY)[0] == 1


def _message(body: Plain) -> Plain:
    names = ("digest", "approver", "role", "nonce", "issued_at", "expires_at", "signature")
    return {name: body[name] for name in names} | {"comment": "fine"}
