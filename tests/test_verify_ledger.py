from __future__ import annotations

import ast
import asyncio
import json
import random
import subprocess
import sys
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from activities.services.checkpoints import Checkpoints, load_key, proof_of
from activities.services.database import Database
from activities.services.ledger_export import of_database, of_lines, to_lines
from activities.services.merkle import extend, leaf_hash, pack
from activities.services.notes import NoteKey
from activities.services.verifier import Report, Verifier, check_database
from models.errors import LedgerBroken
from models.ledger import EventType
from models.loop import GateRule, Outcome, Reversibility, Status
from scripts import verify_ledger
from tests.databases import migrated
from tests.ledgers import TENANT, Step, fill, intent_of, receipt_of, record, unguard, whole

ORIGIN = f"countersign/{TENANT}"


class Log:
    """A signed log, and the note of it that is kept outside; no dataclass, whose repr would be all of it."""

    def __init__(
        self, lines: Sequence[str], note: str, key: NoteKey, file: Path, proofs: Sequence[dict[str, Any]]
    ) -> None:
        self.lines, self.note, self.key, self.file, self.proofs = lines, note, key, file, proofs


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    folder = tmp_path_factory.mktemp("log")
    url = migrated(f"sqlite:///{folder / 'ledger.db'}")
    database = Database(url)
    checkpoints = Checkpoints(database, load_key(folder), "countersign")

    async def made() -> str:
        await fill(database, 2)
        await checkpoints.write(TENANT)
        await fill(database, 1, first=2)
        written = await checkpoints.write(TENANT)
        assert written is not None
        return written.note

    note = asyncio.run(made())
    with database.engine.connect() as link:
        lines = tuple(to_lines(of_database(link, TENANT, ORIGIN)))
        proofs = tuple(
            proof_of(link, TENANT, json.loads(line)["id"], note, checkpoints.key(TENANT))
            for line in lines
            if "specversion" in line
        )
    database.close()
    return Log(lines, note, checkpoints.key(TENANT), folder / "ledger.db", proofs)


@pytest.fixture(scope="module")
def opened(log: Log) -> Iterator[Database]:
    """The log's database, for changes that are taken back."""
    database = Database(f"sqlite:///{log.file}")
    yield database
    database.close()


def ours(lines: Sequence[str], log: Log, old: bool = True) -> Report:
    return Verifier([log.key], [log.note] if old else []).check(of_lines(lines))


def theirs(lines: Sequence[str], log: Log, old: bool = True) -> tuple[int, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export"
        path.write_text(
            "".join(f"{line}\n" for line in lines), "utf-8", errors="surrogateescape", newline="\n"
        )
        return verify_ledger.check_export(
            str(path), [verify_ledger.Key(str(log.key))], [log.note] if old else []
        )


def test_a_log_that_nobody_touched_is_sound(log: Log) -> None:
    report = ours(log.lines, log)
    code, said = theirs(log.lines, log)
    assert (report.status, report.size, report.signed, report.witnessed) == ("sound", 21, 21, 21)
    assert (code, said["events"], said["signed"], said["witnessed"]) == (0, 21, 21, 21)
    assert said["root"] == report.root


def test_the_verifier_imports_nothing_of_ours_and_is_short() -> None:
    source = Path(verify_ledger.__file__).read_text()
    names = {
        name.split(".")[0]
        for one in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in one.names]
            if isinstance(one, ast.Import)
            else [one.module or ""]
            if isinstance(one, ast.ImportFrom)
            else []
        )
    }
    assert names - set(sys.stdlib_module_names) == {"cryptography"}
    assert len(source.splitlines()) < 850


def test_the_verifier_runs_alone(log: Log, tmp_path: Path) -> None:
    script = tmp_path / "verify_ledger.py"
    script.write_text(Path(verify_ledger.__file__).read_text())
    (tmp_path / "export").write_text("".join(f"{line}\n" for line in log.lines))
    (tmp_path / "note").write_text(log.note)
    (tmp_path / "proof").write_text(json.dumps(log.proofs[4]))
    for arguments, code in (
        (["export", "export", "--key", str(log.key), "--checkpoint", "note"], 0),
        (["export", "export"], 2),
        (["proof", "proof", "--key", str(log.key)], 0),
        (["proof", "nothing", "--key", str(log.key)], 2),
    ):
        argv = [sys.executable, "-I", str(script), *arguments]
        ended = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == code, ended.stdout + ended.stderr


@pytest.mark.parametrize("text", ["KEY", "a+b", "a+b+", ""])
def test_what_is_no_key_is_called_that_and_its_form_named(text: str) -> None:
    with pytest.raises(ValueError, match="in the form NAME"):
        verify_ledger.Key(text)


def test_every_event_has_a_proof_that_holds_for_it_alone(log: Log, tmp_path: Path) -> None:
    path, keys = tmp_path / "proof", [verify_ledger.Key(str(log.key))]
    for proof, other in zip(log.proofs, (*log.proofs[1:], log.proofs[0]), strict=True):
        for changes, code in (
            ({}, 0),
            ({"envelope_b64": other["envelope_b64"]}, 1),
            ({"leaf_index": other["leaf_index"]}, 1),
            ({"path": proof["path"][:-1]}, 1),
            ({"path": other["path"]}, 1 if other["path"] != proof["path"] else 0),
            ({"tree_size": proof["tree_size"] - 1}, 1),
        ):
            path.write_text(json.dumps(proof | changes))
            assert verify_ledger.check_proof(str(path), keys)[0] == code, changes


def _edit(lines: list[str], chance: random.Random) -> None:
    place = chance.randrange(len(lines))
    line = lines[place]
    at = chance.randrange(len(line))
    lines[place] = line[:at] + chance.choice(sorted(set('aZ09"{}:,=/+ \\u') - {line[at]})) + line[at + 1 :]


def _edit_inside(lines: list[str], chance: random.Random) -> None:
    """Change a byte of an event and make everything beside it fit again."""
    places = [n for n, line in enumerate(lines) if "specversion" in line]
    place = chance.choice(places)
    plain = json.loads(lines[place])
    data = bytearray(b64decode(plain["data_base64"]))
    at = chance.randrange(len(data))
    data[at] = chance.choice([b for b in range(32, 127) if b != data[at]])
    plain |= {"data_base64": b64encode(data).decode(), "leafhash": leaf_hash(bytes(data)).hex()}
    lines[place] = json.dumps(plain, separators=(",", ":"), sort_keys=True)


def _delete(lines: list[str], chance: random.Random) -> None:
    del lines[chance.randrange(len(lines))]


def _insert(lines: list[str], chance: random.Random) -> None:
    # A checkpoint that stands there already says nothing new when it stands there twice.
    others = [
        line for line in lines if not line.startswith(('{"checkpoint', '{"data_base64"')) or "spec" in line
    ]
    lines.insert(chance.randrange(len(lines) + 1), chance.choice(others))


def _swap(lines: list[str], chance: random.Random) -> None:
    one, other = chance.sample([n for n, line in enumerate(lines) if "specversion" in line], 2)
    lines[one], lines[other] = lines[other], lines[one]


def _cut(lines: list[str], chance: random.Random) -> None:
    del lines[chance.randrange(1, len(lines)) :]


CHANGES: list[Callable[[list[str], random.Random], None]] = [
    _edit,
    _edit_inside,
    _delete,
    _insert,
    _swap,
    _cut,
]


@given(st.integers(0, 2**32), st.sampled_from(CHANGES))
@settings(max_examples=400, deadline=None)
def test_any_single_change_to_an_export_is_found_by_both(
    log: Log, seed: int, change: Callable[[list[str], random.Random], None]
) -> None:
    lines = list(log.lines)
    change(lines, random.Random(seed))
    if lines == list(log.lines) or _only_lost_last_note(lines, log):
        return
    assert ours(lines, log).status != "sound"
    assert theirs(lines, log)[0] != 0


@pytest.mark.parametrize("name", ["format", "origin", "size", "root"])
def test_a_beginning_without_one_of_its_fields_is_found_by_both(log: Log, name: str) -> None:
    first = json.loads(log.lines[0])
    del first[name]
    lines = [json.dumps(first), *log.lines[1:]]
    assert ours(lines, log).status != "sound"
    assert theirs(lines, log)[0] != 0


def _only_lost_last_note(lines: list[str], log: Log) -> bool:
    """A checkpoint less takes nothing away from what the note kept outside says."""
    return [line for line in log.lines if line not in lines and line.startswith('{"checkpoint')] != [] and [
        line for line in log.lines if not line.startswith('{"checkpoint')
    ] == [line for line in lines if not line.startswith('{"checkpoint')]


def _rows(link: Connection, table: str) -> list[Any]:
    return list(link.execute(text(f"SELECT rowid, * FROM {table} ORDER BY rowid")).mappings())


def _other(value: Any, chance: random.Random) -> Any:
    if isinstance(value, int):
        return value + chance.choice([-1, 1, 1000])
    at = chance.randrange(len(value)) if len(value) else 0
    if isinstance(value, bytes):
        return value[:at] + bytes([value[at] ^ 1 << chance.randrange(8)]) + value[at + 1 :]
    return value[:at] + chance.choice(sorted(set("aZ09") - {value[at]})) + value[at + 1 :]


def _change_database(link: Connection, chance: random.Random) -> None:
    table = chance.choice(["event", "event", "merkle_node", "log_head"])
    rows = _rows(link, table)
    row = chance.choice(rows)
    match chance.choice(["edit", "edit", "delete", "swap", "insert"]):
        case "edit":
            name = chance.choice([name for name in row if name not in ("rowid", "log_id")])
            changed = {"value": _other(row[name], chance), "row": row["rowid"]}
            link.execute(text(f"UPDATE OR REPLACE {table} SET {name} = :value WHERE rowid = :row"), changed)
        case "swap" if table == "event":
            one, other = chance.sample([row["seq"] for row in rows], 2)
            for old, new in ((one, -1), (other, one), (-1, other)):
                link.execute(text(f"UPDATE event SET seq = {new} WHERE seq = {old}"))
        case "insert" if table == "event":
            link.execute(
                text(
                    "INSERT INTO event SELECT log_id, seq + 100, event_id || 'x', stream || 'x', version, "
                    "type, correlation_id, recorded_at, envelope, leaf_hash FROM event WHERE rowid = :row"
                ),
                {"row": row["rowid"]},
            )
        case _:
            link.execute(text(f"DELETE FROM {table} WHERE rowid = :row"), {"row": row["rowid"]})


@given(st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_any_single_change_to_the_database_is_found(log: Log, opened: Database, seed: int) -> None:
    with opened.engine.connect() as link:
        unguard(link)
        _change_database(link, random.Random(seed))
        report = check_database(link, TENANT, ORIGIN, [log.key], [log.note])
        link.rollback()
        assert report.status == "tampered"
        assert report.findings[0].seq >= 0


@pytest.mark.parametrize("value", ["'text'", "x'ff'", "1.5", "9223372036854775807", "10000000000000", "-1"])
def test_what_belongs_into_no_column_is_found_and_not_fallen_over(
    log: Log, opened: Database, value: str
) -> None:
    with opened.engine.connect() as link:
        tables = ("event", "merkle_node", "log_head", "checkpoint", "blob")
        unguard(link)
        for table in tables:
            columns = [row[1] for row in link.execute(text(f"PRAGMA table_info({table})"))]
            for column in (one for one in columns if one != "sealed_by"):
                changed = link.begin_nested()
                last = f"rowid = (SELECT max(rowid) FROM {table})"
                link.execute(text(f"UPDATE OR IGNORE {table} SET {column} = {value} WHERE {last}"))
                report = check_database(link, TENANT, ORIGIN, [log.key], [log.note])
                assert report.status in ("tampered", "sound"), (table, column)
                changed.rollback()
        link.execute(text("UPDATE event SET envelope = 'text' WHERE seq = 1"))
        report = check_database(link, TENANT, ORIGIN, [log.key], [log.note])
        assert [one.what for one in report.findings][:1] == [
            "event.envelope holds what does not belong there"
        ]
        with pytest.raises(LedgerBroken, match="event.envelope"):
            list(of_database(link, TENANT, ORIGIN))
        link.rollback()


def test_a_tail_cut_with_everything_made_to_fit_is_found_by_the_note_outside(
    log: Log, opened: Database
) -> None:
    with opened.engine.connect() as link:
        unguard(link)
        for table, column in (("event", "seq"), ("checkpoint", "size")):
            link.execute(text(f"DELETE FROM {table} WHERE {column} > 14"))
        leaves = link.execute(text("SELECT leaf_hash FROM event ORDER BY seq")).scalars()
        peaks, nodes = extend(0, [], [bytes.fromhex(leaf) for leaf in leaves])
        link.execute(text("DELETE FROM merkle_node"))
        for node in nodes:
            row = {"level": node.level, "idx": node.index, "hash": node.hash}
            link.execute(text("INSERT INTO merkle_node VALUES ('default', :level, :idx, :hash)"), row)
        link.execute(text("UPDATE log_head SET size = 14, peaks = :peaks"), {"peaks": pack(peaks)})
        report = check_database(link, TENANT, ORIGIN, [log.key], [log.note])
        assert report.status == "tampered"
        assert report.findings[0].what == "the log ends at 14, the note given covers 21: it was cut"
        link.rollback()


def test_the_first_bad_event_is_named(log: Log) -> None:
    lines = [line.replace("ann", "eve") for line in log.lines]
    place = next(n for n, line in enumerate(lines) if '"sequence":10,' in line)
    plain = json.loads(lines[place])
    data = b64decode(plain["data_base64"]).replace(b"external", b"internal")
    plain |= {"data_base64": b64encode(data).decode(), "leafhash": leaf_hash(data).hex()}
    lines[place] = json.dumps(plain, separators=(",", ":"), sort_keys=True)
    report = ours(lines, log)
    assert report.findings[0].seq == 1
    assert "the checkpoint of 14 events has another root" in report.findings[0].what
    del plain["leafhash"]
    lines[place] = json.dumps(plain, separators=(",", ":"), sort_keys=True)
    assert 10 in [finding.seq for finding in ours(lines, log).findings]


def test_another_key_does_not_vouch(log: Log) -> None:
    other = NoteKey(ORIGIN, Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    report = Verifier([other]).check(of_lines(log.lines))
    assert report.status == "tampered"
    assert "signed by none of the keys given" in report.findings[0].what
    assert Verifier([]).check(of_lines(log.lines)).status == "incomplete"


def test_without_an_intent_the_gate_cannot_be_checked(log: Log) -> None:
    lines = [line for line in log.lines if '"intent":' not in line or "specversion" in line]
    report = ours(lines, log)
    assert report.status == "incomplete"
    assert "so its gate was not checked" in report.gaps[0]
    assert theirs(lines, log)[0] == 2


VERDICT, APPLY, RECEIPT = EventType.VERDICT, EventType.APPLY, EventType.RECEIPT
Story = Callable[[str, str], list[Step]]


def _without(*kinds: EventType) -> Story:
    return lambda digest, run: [step for step in whole(digest, run) if step[0] not in kinds]


def _with(kind: EventType, body: dict[str, Any], before: EventType) -> Story:
    def told(digest: str, run: str) -> list[Step]:
        steps = whole(digest, run)
        place = next(n for n, step in enumerate(steps) if step[0] is before)
        return [*steps[:place], (kind, {"digest": digest} | body), *steps[place:]]

    return told


def _after(kind: EventType, body: dict[str, Any], status: Status = Status.EXECUTED) -> Story:
    def told(digest: str, run: str) -> list[Step]:
        steps = whole(digest, run)[:-1] if kind is not RECEIPT else whole(digest, run)[:-2]
        ended = Outcome(status=status, workflow_id=run).model_dump(mode="json")
        return [*steps, (EventType.OUTCOME, ended), (kind, {"digest": digest} | body)]

    return told


UNDOING = {"actions": [0], "reason": "a later action failed"}
WRONG: dict[str, tuple[Story, str]] = {
    "no verdict": (_without(VERDICT), "was not allowed"),
    "never attempted": (_without(APPLY), "never attempted"),
    "no intent": (_without(EventType.INTENT), "was not allowed|not stand before"),
    "a rejection": (_with(VERDICT, {"kind": "reject", "approver": "bob"}, VERDICT), "was not allowed"),
    "replaced": (_with(EventType.INTENT, {"digest": "a" * 64, "number": 2}, APPLY), "later intent"),
    "expired": (_with(EventType.GATE, {"standing": "expired"}, APPLY), "expired"),
    "drifted": (_with(EventType.DRIFT, {"kept": []}, APPLY), "drifted"),
    "closed": (_with(EventType.ABSENT, {"reason": ""}, APPLY), "closed before"),
    "twice": (_with(RECEIPT, {}, EventType.OUTCOME), "second receipt|done already"),
    "tried again": (_with(APPLY, {"attempt": 2}, EventType.OUTCOME), "done already"),
    "after the end": (_after(APPLY, {"key": "b" * 64 + ".0", "digest": "b" * 64}), "run has ended"),
    "late receipt": (_after(RECEIPT, {}), "after the run had ended"),
    "another action": (_with(APPLY, {"action": 1}, APPLY), "is not that of action 1|does not fit"),
    "undone unasked": (
        lambda digest, run: [
            *whole(digest, run)[:-1],
            (EventType.COMPENSATION, {"key": f"{digest}.0.undo"}),
            whole(digest, run)[-1],
        ],
        "has not decided to take it back|nobody decided",
    ),
    "verdict on nothing": (
        _with(VERDICT, {"digest": "c" * 64, "kind": "approve", "approver": "x"}, APPLY),
        "does not stand",
    ),
}
RIGHT: dict[str, Story] = {
    "as it should be": _without(),
    "tried twice": _with(APPLY, {"attempt": 2}, RECEIPT),
    "delegated": _with(VERDICT, {"kind": "delegate", "approver": "bob", "to": "ann"}, VERDICT),
    "nothing happened": _without(APPLY, RECEIPT),
    "doubt that was resolved": lambda digest, run: [
        *whole(digest, run)[:-2],
        (EventType.IN_DOUBT, {"reason": "no answer"}),
        (EventType.OUTCOME, Outcome(status=Status.IN_DOUBT, workflow_id=run).model_dump(mode="json")),
        (RECEIPT, receipt_of(digest)),
    ],
    "taken back": lambda digest, run: [
        *whole(digest, run)[:-1],
        (EventType.COMPENSATION, {"digest": digest, **UNDOING}),
        (EventType.COMPENSATION, {"key": f"{digest}.0.undo"}),
        (RECEIPT, receipt_of(digest) | {"key": f"{digest}.0.undo"}),
        (EventType.OUTCOME, Outcome(status=Status.COMPENSATED, workflow_id=run).model_dump(mode="json")),
    ],
}


async def told(database: Database, folder: Path, story: Story, gate: GateRule, kind: Reversibility) -> Log:
    def work(link: Connection) -> None:
        _, digest = intent_of(link, "run", gate, kind)
        record(link, "run", digest, story(digest, "run"))

    await database.write(work)
    checkpoints = Checkpoints(database, load_key(folder), "countersign")
    written = await checkpoints.write(TENANT)
    assert written is not None
    lines = await database.read(lambda link: tuple(to_lines(of_database(link, TENANT, ORIGIN))))
    return Log(lines, written.note, checkpoints.key(TENANT), folder, ())


@pytest.mark.parametrize("name", WRONG)
async def test_a_well_signed_log_of_something_not_allowed_is_found(
    database: Database, tmp_path: Path, name: str
) -> None:
    story, what = WRONG[name]
    log = await told(database, tmp_path, story, GateRule(), Reversibility.REVERSIBLE)
    report = ours(log.lines, log)
    code, said = theirs(log.lines, log)
    assert (report.status, code) == ("tampered", 1)
    assert said["first_bad_event"] == report.findings[0].seq
    for found in ([one.what for one in report.findings], said["findings"]):
        assert any(one in text for one in what.split("|") for text in found), found


@pytest.mark.parametrize("name", RIGHT)
async def test_what_may_happen_is_sound(database: Database, tmp_path: Path, name: str) -> None:
    log = await told(database, tmp_path, RIGHT[name], GateRule(), Reversibility.REVERSIBLE)
    assert ours(log.lines, log).findings == ()
    assert theirs(log.lines, log)[0] == 0


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_both_verifiers_agree_with_the_gate_on_any_verdicts(data: st.DataObject) -> None:
    people = st.sampled_from(["ann", "Ann", "bob", "cy"])
    verdict = st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["approve"] * 4 + ["reject", "revise", "delegate"]),
            "approver": people,
            "role": st.sampled_from([None, "finance", "legal"]),
            "to": people,
        }
    )
    verdicts = data.draw(st.lists(verdict, max_size=4))
    gate = GateRule(
        automatic=data.draw(st.booleans()),
        approvals=data.draw(st.integers(1, 3)),
        roles=data.draw(st.sampled_from([(), ("finance",), ("finance", "legal")])),
        absolute_seconds=data.draw(st.sampled_from([3, 1000])),
    )
    kind = data.draw(st.sampled_from(list(Reversibility)))

    def story(digest: str, run: str) -> list[Step]:
        steps = _without(VERDICT)(digest, run)
        given: list[Step] = [(VERDICT, {"digest": digest, **one}) for one in verdicts]
        return [*steps[:3], *given, *steps[3:]]

    async def run(folder: Path) -> tuple[Report, int]:
        url = migrated(f"sqlite:///{folder / 'ledger.db'}")
        database = Database(url)
        log = await told(database, folder, story, gate, kind)
        database.close()
        return ours(log.lines, log), theirs(log.lines, log)[0]

    with tempfile.TemporaryDirectory() as folder:
        report, code = asyncio.run(run(Path(folder)))
    assert report.exit_code == code, report.findings
