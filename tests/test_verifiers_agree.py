"""Logs that somebody who has the signing key made up: both verifiers say the same of each, event by event."""

from __future__ import annotations

import json
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from activities.services import merkle
from activities.services.key_life import handed_over
from activities.services.notes import NoteKey, Tree, checkpoint_text, sign
from activities.services.signers import read_signers
from activities.services.verifier import Verifier
from models.canonical import canonical, derived_id, sha256
from models.errors import InvalidInput
from models.ledger import EventType, act_stream, policy_stream
from models.loop import (
    Action,
    GateRule,
    Guarantee,
    Intent,
    Plan,
    Proposal,
    Ref,
    Reversibility,
    action_key,
)
from scripts import verify_ledger
from scripts.commands.ledger_proofs import _read
from tests.ledgers import NOW, TENANT, whole

ORIGIN = f"countersign/{TENANT}"
PRIVATE, NEXT = (Ed25519PrivateKey.from_private_bytes(bytes([one]) * 32) for one in (7, 8))
KEY = NoteKey(ORIGIN, PRIVATE.public_key().public_bytes_raw())
RUN = "run"
Plain = dict[str, Any]
Envelope = Plain | bytes


def intent_of(run: str = RUN, tenant: str = TENANT) -> bytes:
    what = Ref(digest="a" * 64, size=2, media_type="text/x-diff")
    plan = Plan(
        action=0,
        connector="null",
        operation="note",
        target="notes",
        target_version="0",
        diff=what,
        reversibility=Reversibility.REVERSIBLE,
        guarantee=Guarantee.KEYED,
        undo="delete it",
    )
    action = Action(connector="null", operation="note", arguments=what, title="Note")
    return canonical(
        Intent(
            tenant=tenant,
            workflow_id=run,
            request_key=run,
            number=1,
            proposer="external",
            proposal=Proposal(agent="external", title="Note", actions=(action,)),
            plans=(plan,),
            gate=GateRule(),
            policy_digest="0" * 64,
            card_digest="1" * 64,
            created_at=NOW,
            expires_at=NOW.replace(year=NOW.year + 1),
            nonce=run,
        )
    )


def event(kind: str, body: Plain, stream: str = RUN, run: str = RUN) -> Plain:
    return {
        "actor_kind": "agent",
        "actor_ref": "external",
        "body": body,
        "causation_id": None,
        "correlation_id": run,
        "log_id": TENANT,
        "recorded_at": NOW.isoformat(),
        "span_id": "",
        "stream": stream,
        "trace_id": "",
        "type": str(kind),
    }


def story(intent: bytes) -> list[Plain]:
    """What a run that one person approves leaves."""
    digest, told = sha256(intent), list[Plain]()
    for kind, body in whole(digest, RUN):
        effect = kind in (EventType.APPLY, EventType.RECEIPT)
        key = {"key": action_key(digest, 0), "digest": digest, "action": 0} if effect else {}
        told.append(event(kind, key | body, act_stream(RUN) if effect else RUN))
    return told


def placed(events: Iterable[Envelope]) -> list[Envelope]:
    """The same with sequence numbers, versions and ids that fit."""
    made, versions = list[Envelope](), dict[str, int]()
    for seq, one in enumerate(events, start=1):
        if isinstance(one, dict):
            version = versions[one["stream"]] = versions.get(one["stream"], 0) + 1
            one = one | {"event_id": derived_id("made up", seq), "seq": seq, "version": version}
        made.append(one)
    return made


def written(plain: object) -> str:
    return json.dumps(plain, separators=(",", ":"), sort_keys=True)


def export(
    events: Iterable[Envelope], intent: bytes = b"", before: EventType = EventType.INTENT
) -> tuple[list[str], str]:
    """An export whose hashes and checkpoint are right, and the checkpoint."""
    lines, peaks, size = list[str](), list[bytes](), 0
    for one in events:
        data = one if isinstance(one, bytes) else canonical(one)
        leaf, plain = merkle.leaf_hash(data), json.loads(data)
        peaks, _ = merkle.extend(size, peaks, [leaf])
        size += 1
        if intent and plain["type"] == before:
            lines.append(written({"intent": sha256(intent), "data_base64": b64encode(intent).decode()}))
            intent = b""
        names = {"id": "event_id", "subject": "stream", "time": "recorded_at", "sequence": "seq"}
        names |= {"streamversion": "version", "correlationid": "correlation_id"}
        beside = {name: plain.get(its) for name, its in names.items()}
        beside |= {"specversion": "1.0", "source": f"countersign/{TENANT}", "leafhash": leaf.hex()}
        beside |= {"datacontenttype": "application/json", "type": f"countersign.{plain['type']}"}
        lines.append(written(beside | {"data_base64": b64encode(data).decode()}))
    root = merkle.root_of(peaks)
    note = sign(checkpoint_text(Tree(ORIGIN, size, root)), KEY, PRIVATE)
    first = {"format": "countersign-ledger/1", "origin": ORIGIN, "tenant": TENANT, "size": size}
    first |= {"root": b64encode(root).decode()}
    return [written(first), *lines, written({"checkpoint": note})], note


class Both:
    """What both say of an export."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._folder, self._capsys = folder, capsys

    def say(
        self, lines: Iterable[str], note: str | None = None, key: NoteKey = KEY, signers: bytes | None = None
    ) -> tuple[int, int | None, str]:
        """Exit code, first bad event, and what ours found first or lacks first."""
        file, kept = self._folder / "export", self._folder / "note"
        file.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))
        kept.write_text(note or "")
        allowed = self._folder / "signers"
        allowed.write_bytes(signers or b"")
        given = ["--checkpoint", str(kept)] if note else []
        given += ["--signers", str(allowed)] if signers is not None else []
        code = verify_ledger.main(["export", str(file), "--key", str(key), *given])
        said = json.loads(self._capsys.readouterr().out)
        try:
            known = read_signers(signers) if signers is not None else None
        except InvalidInput as error:
            assert (code, list(said)) == (2, ["status", "gaps"]), (said, error)
            return code, None, error.message
        report = Verifier([key], [note] if note else [], signers=known).check(_read(file))
        report.model_dump_json()
        first = report.findings[0].seq if report.findings else None
        assert (code, said.get("first_bad_event")) == (report.exit_code, first), (said, report)
        for name in ("signatures", "unchecked"):
            assert said[name] == getattr(report, name), (name, said, report)
        gaps = [[gap[:9] for gap in gaps if gap.startswith("event")] for gaps in (said["gaps"], report.gaps)]
        assert gaps[0] == gaps[1], (said, report)
        return code, first, report.findings[0].what if report.findings else "".join(report.gaps[:1])


@pytest.fixture
def both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Both:
    return Both(tmp_path, capsys)


INTENT = intent_of()
DIGEST = sha256(INTENT)
GOOD = story(INTENT)
REQUEST, ASKED, DELIVERY, VERDICT, APPLY, RECEIPT, OUTCOME = GOOD


def test_a_log_that_is_in_order_is_sound(both: Both) -> None:
    lines, note = export(placed(GOOD), INTENT)
    assert both.say(lines, note) == (0, None, "")


def test_a_cut_anywhere_is_found_at_the_same_event(both: Both) -> None:
    lines, note = export(placed(GOOD), INTENT)
    for end in range(len(lines) - 1):
        assert both.say(lines[:end], note)[0] == 1
        for part in (1, len(lines[end]) // 2, len(lines[end]) - 1):
            assert both.say([*lines[:end], lines[end][:part]], note)[0] == 1


def _other_spelling(line: str) -> str:
    """The same bytes in a Base64 whose last letter has bits that nobody reads."""
    plain = json.loads(line)
    text = plain["data_base64"]
    place = len(text.rstrip("=")) - 1
    other = text[:place] + chr(ord(text[place]) + 1) + text[place + 1 :]
    assert b64decode(other) == b64decode(text) and other != text
    return written(plain | {"data_base64": other})


CASES: dict[str, Callable[[str], str]] = {
    "one field more": lambda line: written(json.loads(line) | {"x": 1}),
    "an empty field more": lambda line: written(json.loads(line) | {"x": None}),
    "a field less": lambda line: written(dict(list(json.loads(line).items())[1:])),
    "a number is a fraction": lambda line: line.replace('"size":7', '"size":7.0').replace(
        'sion":1,', 'sion":1.0,'
    ),
    "a number is true": lambda line: line.replace('"sequence":1,', '"sequence":true,'),
    "half a character": lambda line: line.replace("countersign", "\\ud800"),
    "half a character as it is": lambda line: line.replace("countersign", "\ud800"),
    "not a text": lambda line: written(dict.fromkeys(json.loads(line), 5)),
    "lists": lambda line: written(dict.fromkeys(json.loads(line), [])),
    "names alone": lambda line: written(list(json.loads(line))),
    "no end of brackets": lambda line: "[" * 100_000,
    "beyond all numbers": lambda line: line.replace('"size":7', '"size":1e999'),
    "with a carriage return": lambda line: f"{line}\r",
}


@pytest.mark.parametrize("name", CASES)
def test_a_line_that_no_export_has_is_found_by_both(both: Both, name: str) -> None:
    lines, note = export(placed(GOOD), INTENT)
    for place, line in enumerate(lines):
        changed = CASES[name](line)
        if changed != line:
            assert both.say([*lines[:place], changed, *lines[place + 1 :]], note)[0] == 1, changed


def test_bytes_of_an_intent_in_another_spelling_are_found_by_both(both: Both) -> None:
    for nonce in ("run", "run1", "run12"):
        intent = INTENT.replace(b'"nonce":"run"', f'"nonce":"{nonce}"'.encode())
        lines, note = export(placed(story(intent)), intent)
        if json.loads(lines[2])["data_base64"].endswith("="):
            assert both.say([*lines[:2], _other_spelling(lines[2]), *lines[3:]], note)[0] == 1


@pytest.mark.parametrize("gone", [{"key": []}, {"key": {}}, {"gone": []}, {"at": "2026-05-01"}, {"at": 5}])
def test_what_is_said_to_be_gone_has_a_form(both: Both, gone: Plain) -> None:
    lines, note = export(placed(GOOD), INTENT)
    line = written({"gone": "x", "key": None, "at": None} | gone)
    assert both.say([lines[0], line, *lines[1:]], note)[:2] == (1, 1)


def _spelled(change: Callable[[str], str]) -> list[Envelope]:
    first, *others = placed(GOOD)
    return [change(canonical(first).decode()).encode(), *others]  # pyright: ignore[reportArgumentType]


SPELLINGS: dict[str, Callable[[str], str]] = {
    "a blank": lambda text: text.replace(":", ": ", 1),
    "an escape": lambda text: text.replace("external", "\\u0065xternal", 1),
    "a name twice": lambda text: text.replace("{", '{"actor_kind":"person",', 1),
    "another order": lambda text: "{" + ",".join(reversed(text[1:-1].split(","))) + "}",
    "a name more": lambda text: text.replace("{", '{"a":1,', 1),
    "a name less": lambda text: text.replace('"span_id":"",', ""),
    "a number as text": lambda text: text.replace('"seq":1', '"seq":"1"'),
    "a fraction": lambda text: text.replace('"seq":1', '"seq":1.0'),
    "no zone": lambda text: text.replace("+00:00", ""),
    "zulu": lambda text: text.replace("+00:00", "Z"),
    "no text": lambda text: text.replace('"trace_id":""', '"trace_id":null'),
    "another order within": lambda text: text.replace('{"agent":', '{"b":1,"agent":', 1),
    "a fraction within": lambda text: text.replace('"agent":"external"', '"agent":1.5', 1),
    "no number within": lambda text: text.replace('"agent":"external"', '"agent":NaN', 1),
    "no name of who": lambda text: text.replace('"actor_ref":"external"', '"actor_ref":5'),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_event_is_written_in_one_way(both: Both, name: str) -> None:
    lines, note = export(_spelled(SPELLINGS[name]), INTENT)
    assert both.say(lines, note)[:2] == (1, 1)


@pytest.mark.parametrize("text", ["\x7f\x1f\\u007f", "\u2028\U0001f600", '","data_base64":"', "\r\n\x85"])
def test_characters_that_others_write_otherwise_change_nothing(both: Both, text: str) -> None:
    said = event("belief", {"text": text, text: 1}, stream=text, run=text)
    lines, note = export(placed([*GOOD, said]), INTENT)
    assert both.say(lines, note) == (0, None, "")


@pytest.mark.parametrize("spoilt", [None, 1, 7, 15])
def test_an_export_read_in_parts_is_judged_in_its_order(tmp_path: Path, spoilt: int | None) -> None:
    long = [event("belief", {"text": "x" * 700_000}, "long", "long")] * 12
    lines, note = export(placed([*GOOD[:3], *long, *GOOD[3:]]), INTENT)
    if spoilt is not None:
        place = next(n for n, line in enumerate(lines) if f'"sequence":{spoilt},' in line)
        lines[place] = lines[place].replace('"sequence":', '"sequence": ')
    file, kept = tmp_path / "export", tmp_path / "note"
    file.write_text("".join(f"{line}\n" for line in lines))
    kept.write_text(note)
    assert file.stat().st_size > 2 * verify_ledger.PART
    script = [sys.executable, "-I", verify_ledger.__file__, "export", str(file)]
    ended = subprocess.run(
        [*script, "--key", str(KEY), "--checkpoint", str(kept)], capture_output=True, text=True, check=False
    )
    report = json.loads(ended.stdout)
    assert (ended.returncode, report["first_bad_event"]) == (int(spoilt is not None), spoilt), report
    assert (report["events"], report["witnessed"]) == (19, 19)


def _undone(kind: EventType, **body: Any) -> list[Plain]:
    key = {"key": f"{action_key(DIGEST, 0)}.undo", "digest": DIGEST, "action": 0}
    taken_back = event(EventType.COMPENSATION, key, act_stream(RUN))
    return [*GOOD[:6], event(kind, {"digest": DIGEST, "actions": [0]} | body), taken_back]


CHANGED = {"agent": "external", "key": action_key(DIGEST, 0), "digest": DIGEST}
ALONE = policy_stream("external")
FORGED: dict[str, list[Plain]] = {
    "effects of a run that nobody asked": [one | {"correlation_id": "x"} for one in (APPLY, RECEIPT)],
    "effects among the decisions": [one | {"stream": RUN} for one in (APPLY, RECEIPT)],
    "effects in a stream of their own": [one | {"stream": "x"} for one in (APPLY, RECEIPT)],
    "effects in a run of their own": [
        one | {"stream": "x", "correlation_id": "x"} for one in (APPLY, RECEIPT)
    ],
    "a policy in a run of its own": [event(EventType.POLICY_CHANGED, CHANGED, ALONE, ALONE)],
    "a policy among the decisions": [event(EventType.POLICY_CHANGED, CHANGED)],
    "a policy among the effects": [event(EventType.POLICY_CHANGED, CHANGED, act_stream(RUN))],
    "a doubt that is told elsewhere": [
        *GOOD[:5],
        APPLY | {"type": "in_doubt", "stream": f"{RUN}/route"},
        OUTCOME,
        RECEIPT,
    ],
    "taken back after a drift": _undone(EventType.DRIFT),
    "taken back after it expired": _undone(EventType.GATE, standing="expired"),
}


@pytest.mark.parametrize(("status", "code"), [("compensation_failed", 0), ("compensated", 1), ("failed", 1)])
def test_an_answer_to_an_undo_may_come_late_where_the_run_ended_without_one(
    both: Both, status: str, code: int
) -> None:
    begun = _undone(EventType.COMPENSATION, reason="x")
    ended = event(EventType.OUTCOME, {"status": status})
    answer = event(EventType.RECEIPT, begun[-1]["body"], act_stream(RUN))
    lines, note = export(placed([*begun, ended, answer]), INTENT)
    assert both.say(lines, note)[0] == code
    late = event(EventType.RECEIPT, RECEIPT["body"], act_stream(RUN))
    lines, note = export(placed([*begun[:5], *begun[6:], ended, late]), INTENT)
    assert both.say(lines, note)[0] == 1


@pytest.mark.parametrize("name", FORGED)
def test_what_nobody_allowed_is_found_wherever_it_stands(both: Both, name: str) -> None:
    lines, note = export(placed(FORGED[name]), INTENT)
    code, first, _ = both.say(lines, note)
    bad = {"a doubt that is told elsewhere": 8}.get(name, 8 if name.startswith("taken back") else 1)
    assert (code, first) == (1, bad)


def test_a_closed_action_is_closed_by_who_acts_alone(both: Both) -> None:
    elsewhere = APPLY | {"type": "absent", "stream": f"{RUN}/route"}
    lines, note = export(placed([*GOOD[:4], elsewhere, *GOOD[4:]]), INTENT)
    assert both.say(lines, note)[0] == 0


@pytest.mark.parametrize("before", [EventType.INTENT, EventType.APPLY])
@pytest.mark.parametrize("intent", [intent_of(run="other"), intent_of(tenant="other")])
def test_an_intent_of_another_run_or_tenant_allows_nothing(
    both: Both, intent: bytes, before: EventType
) -> None:
    lines, note = export(placed(story(intent)), intent, before)
    code, _, what = both.say(lines, note)
    assert code == 1 and "another run" in what or "bound" in what


def test_a_note_by_the_key_that_follows_counts_for_who_has_the_old_one(both: Both) -> None:
    body = handed_over(PRIVATE, NEXT, ORIGIN)
    new = NoteKey.parse(body["new"])
    rotated = event(EventType.KEY_ROTATED, body, "keys/ledger", "keys/ledger")
    lines, note = export(placed([*GOOD, rotated]), INTENT)
    text = note.partition("\n\n")[0] + "\n"
    newer = sign(text, new, NEXT)
    assert both.say(lines, newer)[:2] == (0, None)
    unknown = sign(text, NoteKey(ORIGIN, PRIVATE.public_key().public_bytes_raw()), NEXT)
    code, _, lacks = both.say(lines, unknown)
    assert code == 2 and "signed by none of the keys given" in lacks


def test_a_key_vouches_for_the_log_that_it_is_named_after_alone(both: Both) -> None:
    lines, _ = export(placed(GOOD), INTENT)
    other = NoteKey("countersign/other", KEY.public)
    # A signature is over the text of a note and not over who signs: the line of one log's key fits another's.
    text = json.loads(lines[-1])["checkpoint"].partition("\n\n")[0] + "\n"
    lines[-1] = written({"checkpoint": sign(text, other, PRIVATE)})
    assert both.say(lines, key=other)[0] == 1
