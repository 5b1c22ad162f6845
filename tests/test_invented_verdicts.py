"""A signed approval that nobody gave, put into the ledger by who may write there, and who notices."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from typer.testing import Result

from activities.services.checkpoints import Checkpoints, load_key
from activities.services.database import Database
from activities.services.identities import Identities
from activities.services.migrations import migrate
from activities.services.signers import read_signers
from models.answers import Kind, Verdict
from models.canonical import digest_of
from models.ledger import EventType
from models.loop import GateRule, Reversibility
from models.people import Key, People, Person
from models.settings import Settings
from scripts import verify_ledger
from tests.devices import Device
from tests.ledgers import NOW, TENANT, Step, intent_of, record, whole
from tests.test_cli import offline, run
from tests.test_people import public
from tests.test_signatures import make_key
from tests.test_verifiers_agree import Plain
from tests.test_verify_signatures import answer

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen makes the signatures")
RULE = GateRule(assurance="signed", roles=("editor",))


@dataclass
class Place:
    """An installation whose ledger holds one run that ann approved with her key."""

    folder: Path
    settings: Settings
    database: Database
    honest: Plain

    def tell(self, run_: str, verdict: Plain) -> str:
        """A whole run with this verdict, by the ledger's own store; the digest of its intent."""

        def work(link: Connection) -> str:
            _, digest = intent_of(link, run_, RULE, Reversibility.REVERSIBLE)
            steps: list[Step] = [
                (kind, verdict | {"digest": digest} if kind is EventType.VERDICT else body)
                for kind, body in whole(digest, run_)
            ]
            record(link, run_, digest, steps)
            return digest

        return asyncio.run(self.database.write(work))

    def sign(self) -> None:
        """The next checkpoint, by the desk, which sees nothing wrong."""
        checkpoints = Checkpoints(self.database, load_key(self.settings.data), "countersign")
        assert asyncio.run(checkpoints.write(TENANT)) is not None

    def verify(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        ran = run(self.settings, "ledger", "verify", "--json", *arguments)
        return ran.exit_code, json.loads(ran.stdout)

    def said(self, *arguments: str) -> list[tuple[int, int | None, int]]:
        """Exit code, first bad event and signatures looked at: in the database, in an export, in one file."""
        export = self.folder / "export"
        assert run(self.settings, "ledger", "export", "--out", str(export)).exit_code == 0
        key = run(self.settings, "ledger", "key").stdout.strip()
        found = list[tuple[int, int | None, int]]()
        for more in ((), ("--export", str(export), "--key", key)):
            code, report = self.verify(*more, *arguments)
            first = report["findings"][0]["seq"] if report["findings"] else None
            found.append((code, first, report["signatures"]))
        signers = verify_ledger.read_signers(arguments[1]) if arguments else None
        code, report = verify_ledger.check_export(str(export), [verify_ledger.Key(key)], [], ([], 0), signers)
        return [*found, (code, report["first_bad_event"], report["signatures"])]


@pytest.fixture
def ann(tmp_path: Path) -> Path:
    return make_key(tmp_path, "ann")


@pytest.fixture
def place(tmp_path: Path, ann: Path) -> Iterator[Place]:
    people = (Person(name="ann", roles=("editor",), keys=(Key(public=public(ann)),)),)
    settings = offline(tmp_path / "data", people=people)
    settings.data.mkdir()
    migrate(settings.database_url)
    database = Database(settings.database_url)
    with database.engine.begin() as link:
        intent, _ = intent_of(link, "honest", RULE, Reversibility.REVERSIBLE)
    made = Place(tmp_path, settings, database, answer(ann, digest=digest_of(intent)))
    made.tell("honest", made.honest)
    yield made
    database.close()


@pytest.fixture
def file(place: Place, tmp_path: Path) -> str:
    """What an auditor was given while all was well."""
    shown = run(place.settings, "people", "--signers")
    assert shown.exit_code == 0
    (tmp_path / "signers").write_text(shown.stdout)
    return str(tmp_path / "signers")


INVENTED: dict[str, dict[str, Any]] = {
    "with nothing to show for it": {"signature": None, "nonce": None},
    "with the signature of another answer": {},
    "with a nonce of its own": {"nonce": "b" * 32},
    "in another name": {"approver": "eve"},
}


@pytest.mark.parametrize("name", INVENTED)
def test_an_approval_that_nobody_signed_is_sound_until_signatures_are_looked_at(
    place: Place, file: str, name: str
) -> None:
    place.sign()
    assert place.said("--signers", file) == [(0, None, 1)] * 3
    invented = place.honest | INVENTED[name]
    digest = place.tell("invented", invented)
    # Who acts would not have: it looks at the signature itself, and the effect was never its own.
    doubt = Identities(People(people=place.settings.people), lambda: NOW).doubt
    assert doubt(TENANT, Verdict.model_validate(invented | {"digest": digest})) is not None
    place.sign()
    assert place.said() == [(0, None, 0)] * 3
    assert place.said("--signers", file) == [(1, 11, 2)] * 3


def test_without_signers_the_report_says_what_it_did_not_look_at(place: Place, file: str) -> None:
    place.sign()
    code, report = place.verify()
    assert (code, report["unchecked"], report["gaps"]) == (0, 1, [])
    told = run(place.settings, "ledger", "verify").output
    assert "1 answers call themselves signed; --signers FILE" in told
    told = run(place.settings, "ledger", "verify", "--signers", file).output
    assert "1 answers that call themselves signed were held against the signers given" in told


def test_a_name_that_somebody_made_up_does_nothing_to_a_terminal(place: Place, file: str) -> None:
    place.tell("invented", place.honest | {"approver": "e\x1b[2Jve"})
    place.sign()
    ran = run(place.settings, "ledger", "verify", "--signers", file)
    assert ran.exit_code == 1 and "event 11: e" in ran.output and "\x1b" not in ran.output


def test_a_file_that_is_missing_or_not_understood_is_refused(place: Place, tmp_path: Path) -> None:
    place.sign()
    (tmp_path / "bad").write_text("*@example.com cert-authority ssh-ed25519 AAAA\n")
    for name, what in (("nothing", "name a file that can be read"), ("bad", "line 1 of --signers")):
        ran: Result = run(place.settings, "ledger", "verify", "--signers", str(tmp_path / name))
        assert ran.exit_code == 2 and what in ran.output, ran.output


def test_a_proof_takes_no_signers(place: Place, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_ledger.main(["proof", "nothing", "--signers", file]) == 2
    assert "--signers: give it with an export" in capsys.readouterr().out


# What is printed for auditors.


def settings_of(folder: Path, *people: Person) -> Settings:
    return offline(folder / "data", people=people)


def test_the_file_says_what_settings_say_and_ssh_keygen_reads_it(tmp_path: Path) -> None:
    one, other = make_key(tmp_path, "one"), make_key(tmp_path, "other")
    after, before = NOW + timedelta(microseconds=1), NOW + timedelta(days=1, microseconds=1)
    keys = (
        Key(public=f"{public(one)} revoked roles=owner", valid_after=after, valid_before=before),
        Key(public=public(other), revoked=True),
        Key(public=Device().line, no_touch_required=True, verify_required=True),
    )
    ann, bob = Person(name="ann", roles=("editor", "legal"), keys=keys), Person(name="bob")
    settings = settings_of(tmp_path, bob, ann)
    text = run(settings, "people", "--signers").stdout
    first, second, third = [line for line in text.splitlines() if not line.startswith("#")]
    assert 'valid-after="20260501120000Z",valid-before="20260502120001Z"' in first
    assert first.endswith(" roles=editor,legal")
    assert second.endswith(" roles=editor,legal revoked")
    assert third.endswith(" roles=editor,legal no-touch-required verify-required")
    known = read_signers(text.encode())
    person = known.of("ann")
    assert person is not None and known.of("bob") is None
    assert [known.line(key).revoked for key in person.keys] == [False, True, False]
    shown = json.loads(run(settings, "people", "--signers", "--json").output)
    assert [one["line"] for one in shown] == [first, second, third]
    assert all(one["person"] == "ann" and one["fingerprint"].startswith("SHA256:") for one in shown)
    (tmp_path / "signers").write_text(text)
    signature = answer(one, Kind.APPROVE)["signature"]
    (tmp_path / "signature").write_text(signature)
    command = ["ssh-keygen", "-Y", "find-principals", "-f", "signers", "-s", "signature"]
    command += ["-Overify-time=20260501130000Z"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "ann\n"), ran.stderr


@pytest.mark.parametrize("name", ["ann,bob", "an*", "an?", "!ann", '"ann"', "#ann"])
def test_a_name_that_such_a_file_would_read_as_another_is_refused(tmp_path: Path, name: str) -> None:
    person = Person(name=name, keys=(Key(public=Device().line),))
    ran = run(settings_of(tmp_path, person), "people", "--signers")
    assert ran.exit_code == 2 and "people" in ran.output and "is not accepted" in ran.output


def test_a_key_that_is_none_is_refused_by_whose_it_is(tmp_path: Path) -> None:
    person = Person(name="ann", keys=(Key(public="ssh-ed25519 " + "A" * 68),))
    ran = run(settings_of(tmp_path, person), "people", "--signers")
    assert ran.exit_code == 2 and "'ann'" in ran.output


def test_printing_changes_nothing(tmp_path: Path) -> None:
    ran = run(settings_of(tmp_path), "people", "--signers", "--record", "--as", "ann")
    assert ran.exit_code == 2 and "give one of them" in ran.output
    assert [line[0] for line in run(settings_of(tmp_path), "people", "--signers").stdout.splitlines()] == [
        "#",
        "#",
    ]
