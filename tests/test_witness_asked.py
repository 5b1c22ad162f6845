"""A log that asks co-signers, and what is checked of their answers afterwards."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError
from typer.testing import CliRunner

from activities.services.checkpoints import Checkpoints, last_note, proof_of
from activities.services.cosignatures import WitnessKey, body_of, cosign, cosigned_at, cosigners
from activities.services.cosigner import Cosigner
from activities.services.cosigner_server import CosignerServer
from activities.services.cosigning import AlertKind, RemoteCosigner, cosignatures
from activities.services.database import Database
from activities.services.ledger_export import of_database, of_lines, to_lines
from activities.services.notes import NoteKey, read_checkpoint
from activities.services.verifier import Report, Verifier, check_database
from activities.services.witness_state import STATE_FILE, State
from models.cosigners import CosignerSettings
from models.errors import ConnectorUnavailable, InvalidInput
from models.settings import LedgerSettings, Settings
from scripts import verify_ledger
from scripts.cli import app
from tests.databases import migrated
from tests.ledgers import LOG, TENANT, fill, wipe
from workers import config

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ORIGIN = f"countersign/{TENANT}"
KEY = NoteKey(ORIGIN, PRIVATE.public_key().public_bytes_raw())
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(2, 34)))


def clock() -> datetime:
    return datetime.now(UTC)


class House:
    """A co-signer that can be stopped and started again, at one address or another."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.asked = 0

    async def open(self) -> None:
        self._state = State(self.folder, self.name)
        self.cosigner = Cosigner(self._state, [KEY], clock)
        self._server = CosignerServer(self.cosigner)
        await self._server.start()

    async def close(self) -> None:
        await self._server.close()
        self._state.close()

    @property
    def settings(self) -> CosignerSettings:
        url = f"http://127.0.0.1:{self._server.port}"
        return CosignerSettings(url=url, key=str(self.cosigner.key), timeout_seconds=60)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    made = House(tmp_path / "w1", "w1")
    await made.open()
    yield made
    await made.close()


def asking(
    database: Database,
    *settings: CosignerSettings,
    needed: int | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Checkpoints:
    asked = [RemoteCosigner(one, clock, transport) for one in settings]
    return Checkpoints(database, PRIVATE, "countersign", (), asked, needed)


async def export(database: Database) -> list[str]:
    return await database.read(lambda link: list(to_lines(of_database(link, TENANT, ORIGIN))))


def checked(
    lines: list[str], tmp_path: Path, *keys: WitnessKey, needed: int | None = None
) -> tuple[Report, dict[str, Any]]:
    """By both verifiers, which have to agree."""
    ours = Verifier([KEY], (), keys, needed).check(of_lines(lines))
    path = tmp_path / "export.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    others = [verify_ledger.Key(str(key), b"\x04") for key in keys]
    many = len({key.public for key in keys}) if needed is None else needed
    code, said = verify_ledger.check_export(str(path), [verify_ledger.Key(str(KEY))], [], (others, many))
    assert code == ours.exit_code, (said, ours)
    assert (said["cosigned"], said["signed"]) == (ours.cosigned, ours.signed)
    return ours, said


def dead() -> CosignerSettings:
    key = WitnessKey("dead", OTHER.public_key().public_bytes_raw())
    return CosignerSettings(url="http://127.0.0.1:9", key=str(key), timeout_seconds=5)


async def test_each_checkpoint_is_cosigned_once_and_kept_with_it(
    database: Database, house: House, tmp_path: Path
) -> None:
    checkpoints = asking(database, house.settings)
    sizes = list[int]()
    for runs in range(3):
        await fill(database, 1, first=runs)
        for _ in range(2):
            written = await checkpoints.write(TENANT)
            assert written is not None
            assert (written.cosigned_by, written.alerts) == (("cosigner:w1",), ())
            assert cosigners(written.note, [house.cosigner.key]) == {house.cosigner.key.public}
        sizes.append(written.size)
    kept = await database.read(lambda link: cosignatures(link, TENANT))
    assert {size: len(lines) for size, lines in kept.items()} == dict.fromkeys(sizes, 1)
    report, _ = checked(await export(database), tmp_path, house.cosigner.key)
    assert (report.status, report.cosigned) == ("sound", 21)
    stored = await database.read(
        lambda link: check_database(link, TENANT, ORIGIN, [KEY], [], [house.cosigner.key])
    )
    assert (stored.status, stored.cosigned) == ("sound", 21)


async def test_a_log_without_co_signers_asks_nobody_and_is_as_sound_as_before(
    database: Database, tmp_path: Path
) -> None:
    await fill(database, 1)
    written = await asking(database).write(TENANT)
    assert written is not None
    assert (written.cosigned_by, written.alerts) == ((), ())
    assert written.note == await database.read(lambda link: last_note(link, TENANT))
    assert checked(await export(database), tmp_path)[0].status == "sound"


async def test_a_co_signer_that_is_down_is_an_alert_and_stops_nothing(
    database: Database, house: House, tmp_path: Path
) -> None:
    checkpoints = asking(database, house.settings, dead())
    await fill(database, 1)
    written = await checkpoints.write(TENANT)
    assert written is not None
    assert written.cosigned_by == ("cosigner:w1",)
    assert [(one.kind, one.witness) for one in written.alerts] == [(AlertKind.UNREACHABLE, "cosigner:dead")]
    await fill(database, 1, first=1)
    assert (await checkpoints.write(TENANT)) is not None
    both = (house.cosigner.key, WitnessKey.parse(dead().key))
    lines = await export(database)
    assert checked(lines, tmp_path, *both)[0].status == "incomplete"
    assert checked(lines, tmp_path, *both, needed=1)[0].status == "sound"


async def test_what_cannot_be_taken_back_waits_for_as_many_as_settings_ask_for(
    database: Database, house: House
) -> None:
    await fill(database, 1)
    with pytest.raises(
        ConnectorUnavailable, match="2 have to cosign first; witness_unreachable: cosigner:dead"
    ):
        await asking(database, house.settings, dead()).before_effect(TENANT)
    await asking(database, house.settings, dead(), needed=1).before_effect(TENANT)
    await asking(database, dead(), needed=0).before_effect(TENANT)


async def test_a_co_signer_that_was_away_gets_the_rest_of_the_log_when_it_is_back(
    database: Database, house: House
) -> None:
    await fill(database, 1)
    await asking(database, house.settings).write(TENANT)
    gone = house.settings
    await house.close()
    await fill(database, 1, first=1)
    written = await asking(database, gone).write(TENANT)
    assert written is not None
    assert [one.kind for one in written.alerts] == [AlertKind.UNREACHABLE]
    await house.open()
    written = await asking(database, house.settings).write(TENANT)
    assert written is not None
    assert (written.size, written.cosigned_by, written.alerts) == (14, ("cosigner:w1",), ())


# Forks.


GUARDED = (*LOG, "cosignature")


@pytest.mark.parametrize("tables", [GUARDED, LOG], ids=["cosignatures too", "cosignatures left"])
@pytest.mark.parametrize(
    ("runs", "first", "why"),
    [(2, 1, "rewritten"), (3, 1, "no continuation"), (1, 0, "cut")],
    ids=["same size", "grown otherwise", "cut"],
)
async def test_a_fork_is_refused_by_the_co_signer_and_is_an_alert(
    database: Database, house: House, tables: tuple[str, ...], runs: int, first: int, why: str
) -> None:
    checkpoints = asking(database, house.settings)
    await fill(database, 2)
    assert (await checkpoints.write(TENANT)) is not None
    await database.write(lambda link: wipe(link, *tables))
    await fill(database, runs, first=first)
    written = await checkpoints.write(TENANT)
    assert written is not None
    [alert] = written.alerts
    assert (alert.kind, written.cosigned_by) == (AlertKind.FORKED, ())
    assert why in alert.text
    assert house.cosigner.key.key_id not in written.note
    with pytest.raises(ConnectorUnavailable, match="log_forked"):
        await checkpoints.before_effect(TENANT)
    plain = json.loads((house.folder / STATE_FILE).read_text())
    assert plain["logs"][ORIGIN]["size"] == 14


async def test_a_fork_is_logged_as_an_error(
    database: Database, house: House, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = asking(database, house.settings)
    await fill(database, 2)
    await checkpoints.write(TENANT)
    await database.write(lambda link: wipe(link, *GUARDED))
    await fill(database, 2, first=1)
    caplog.clear()
    await checkpoints.write(TENANT)
    told = [one.levelname for one in caplog.records if "log_forked: cosigner:w1" in one.getMessage()]
    assert told == ["ERROR"]


async def test_a_co_signer_that_has_forgotten_is_an_alert_even_if_it_catches_up(
    database: Database, house: House
) -> None:
    await fill(database, 1)
    await asking(database, house.settings).write(TENANT)
    before = (house.folder / STATE_FILE).read_text()
    await fill(database, 1, first=1)
    await asking(database, house.settings).write(TENANT)
    await house.close()
    (house.folder / STATE_FILE).write_text(before)
    await house.open()
    await fill(database, 1, first=2)
    kinds = list[list[AlertKind]]()
    for _ in range(2):
        written = await asking(database, house.settings).write(TENANT)
        assert written is not None
        kinds.append([one.kind for one in written.alerts])
    assert kinds == [[AlertKind.BEHIND], []]


# Lies.


Answer = Callable[[str], httpx.Response]
WITNESS = WitnessKey("w", OTHER.public_key().public_bytes_raw())


def line(body: str, at: timedelta = timedelta(), key: WitnessKey = WITNESS) -> httpx.Response:
    return httpx.Response(200, text=f"{cosign(body, key, OTHER, clock() + at)}\n")


LIES: dict[str, tuple[Answer, AlertKind]] = {
    "other bytes": (lambda body: line(body.replace("7", "8")), AlertKind.LIED),
    "under another name": (lambda body: line(body, key=WitnessKey("x", WITNESS.public)), AlertKind.LIED),
    "in the future": (lambda body: line(body, timedelta(days=1)), AlertKind.LIED),
    "in the past": (lambda body: line(body, timedelta(days=-1)), AlertKind.LIED),
    "yes and nothing": (lambda body: httpx.Response(200, text=""), AlertKind.LIED),
    "packed": (
        lambda body: httpx.Response(
            200,
            headers={"Content-Encoding": "gzip"},
            stream=httpx.ByteStream(gzip.compress(b"x" * 10_000_000)),
        ),
        AlertKind.LIED,
    ),
    "not text": (lambda body: httpx.Response(200, content=b"\xff\xfe\0"), AlertKind.LIED),
    "too much": (lambda body: httpx.Response(200, content=b"x" * 100_000), AlertKind.REFUSED),
    "somewhere else": (
        lambda body: httpx.Response(302, headers={"Location": "http://x/"}),
        AlertKind.REFUSED,
    ),
    "unknown log": (lambda body: httpx.Response(404), AlertKind.REFUSED),
    "unknown key": (lambda body: httpx.Response(403), AlertKind.REFUSED),
    "a conflict that is none": (lambda body: httpx.Response(409, text="-7\n"), AlertKind.REFUSED),
    "always elsewhere": (lambda body: httpx.Response(409, text="3\n"), AlertKind.REFUSED),
    "further than we are": (lambda body: httpx.Response(409, text="999999\n"), AlertKind.FORKED),
    "no continuation": (lambda body: httpx.Response(422), AlertKind.FORKED),
    "broken": (lambda body: httpx.Response(500), AlertKind.UNREACHABLE),
    "busy": (lambda body: httpx.Response(429), AlertKind.UNREACHABLE),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_co_signer_that_lies_gets_an_alert_and_nothing_of_it_is_kept(
    database: Database, lie: str
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        note = request.content.decode().partition("\n\n")[2]
        return LIES[lie][0](body_of(note))

    settings = CosignerSettings(url="http://w.example.com/", key=str(WITNESS))
    await fill(database, 1)
    written = await asking(database, settings, transport=httpx.MockTransport(answer)).write(TENANT)
    assert written is not None
    assert [one.kind for one in written.alerts] == [LIES[lie][1]]
    assert written.cosigned_by == ()
    assert await database.read(lambda link: cosignatures(link, TENANT)) == {}


async def test_lines_of_strangers_beside_the_right_one_are_passed_over(database: Database) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        body = body_of(request.content.decode().partition("\n\n")[2])
        stranger = cosign(body, WitnessKey("x", WITNESS.public), OTHER, clock())
        return httpx.Response(200, text=f"{stranger}\n{line(body).text}")

    settings = CosignerSettings(url="http://w.example.com", key=str(WITNESS))
    await fill(database, 1)
    written = await asking(database, settings, transport=httpx.MockTransport(answer)).write(TENANT)
    assert written is not None
    assert written.alerts == ()
    assert len(cosigners(written.note, [WITNESS])) == 1


async def test_a_cosignature_that_was_lost_on_its_way_is_asked_for_again(
    database: Database, house: House
) -> None:
    class Lossy(httpx.AsyncHTTPTransport):
        lost = 0

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            response = await super().handle_async_request(request)
            if self.lost == 0:
                self.lost += 1
                await response.aread()
                raise httpx.ReadError("gone")
            return response

    transport = Lossy()
    await fill(database, 1)
    first = await asking(database, house.settings, transport=transport).write(TENANT)
    second = await asking(database, house.settings).write(TENANT)
    assert first is not None and second is not None
    assert [one.kind for one in first.alerts] == [AlertKind.UNREACHABLE]
    assert (second.alerts, second.cosigned_by) == ((), ("cosigner:w1",))


async def test_a_checkpoint_that_another_process_overtook_is_signed_anew(
    database: Database, house: House
) -> None:
    class Late(httpx.AsyncHTTPTransport):
        overtaken = False

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if not self.overtaken:
                self.overtaken = True
                await fill(database, 1, first=1)
                other = await asking(database, house.settings).write(TENANT)
                assert other is not None and other.alerts == ()
            return await super().handle_async_request(request)

    await fill(database, 1)
    written = await asking(database, house.settings, transport=Late()).write(TENANT)
    assert written is not None
    assert (written.alerts, written.cosigned_by) == ((), ("cosigner:w1",))
    kept = await database.read(lambda link: cosignatures(link, TENANT))
    assert list(kept) == [14]


async def test_writers_that_run_at_once_leave_no_alert(database: Database, house: House) -> None:
    await fill(database, 1)
    crowd = [asking(database, house.settings) for _ in range(6)]

    async def grow() -> None:
        for number in range(1, 4):
            await fill(database, 1, first=number)

    written = await asyncio.gather(*(one.write(TENANT) for one in crowd), grow())
    assert [one.alerts for one in written if one is not None] == [()] * 6
    last = await asking(database, house.settings).write(TENANT)
    assert last is not None
    assert (last.size, last.alerts) == (28, ())


# Checking.


Change = Callable[[list[str]], list[str]]


def with_note(lines: list[str], change: Callable[[str], str]) -> list[str]:
    return [
        json.dumps({"checkpoint": change(json.loads(one)["checkpoint"])}, separators=(",", ":"))
        if one.startswith('{"checkpoint"')
        else one
        for one in lines
    ]


async def test_both_verifiers_want_the_cosignatures_of_k_of_n(
    database: Database, house: House, tmp_path: Path
) -> None:
    second = House(tmp_path / "w2", "w2")
    await second.open()
    await fill(database, 1)
    await asking(database, house.settings, second.settings).write(TENANT)
    keys = house.cosigner.key, second.cosigner.key
    stranger = WitnessKey("stranger", OTHER.public_key().public_bytes_raw())
    lines = await export(database)
    await second.close()
    assert checked(lines, tmp_path, *keys)[0].cosigned == 7
    assert checked(lines, tmp_path, *keys, stranger, needed=2)[0].status == "sound"
    report, _ = checked(lines, tmp_path, *keys, stranger)
    assert (report.status, report.gaps) == (
        "incomplete",
        ("no checkpoint has cosignatures by 3 of the 3 co-signers given",),
    )
    gone = with_note(lines, lambda note: "\n".join(note.split("\n")[:-2]) + "\n")
    assert checked(gone, tmp_path, *keys)[0].status == "incomplete"
    assert checked(gone, tmp_path, *keys, needed=1)[0].status == "sound"
    # The same key under another name is not a second witness.
    twin = WitnessKey("twin", keys[0].public)
    twice = with_note(
        lines, lambda note: f"{note}{cosign(body_of(note), twin, house.cosigner._state.private, clock())}\n"
    )
    assert checked(twice, tmp_path, keys[0], twin, stranger, needed=2)[0].status == "incomplete"


async def test_a_cosignature_that_was_changed_or_moved_is_tampering(
    database: Database, house: House, tmp_path: Path
) -> None:
    await fill(database, 1)
    await asking(database, house.settings).write(TENANT)
    lines = await export(database)
    [note] = [json.loads(one)["checkpoint"] for one in lines if one.startswith('{"checkpoint"')]
    key, cosigned = house.cosigner.key, note.rstrip("\n").split("\n")[-1]
    assert checked(lines, tmp_path, key)[0].status == "sound"
    at = len(f"— {key.name} ") + 8
    for place in range(at, len(cosigned) - 2, 7):
        other = "A" if cosigned[place] != "A" else "B"
        forged = cosigned[:place] + other + cosigned[place + 1 :]
        changed = with_note(lines, lambda text, forged=forged: text.replace(cosigned, forged))
        report, said = checked(changed, tmp_path, key)
        assert report.status == "tampered", place
        assert said["findings"] == [
            "event 7: w1 did not make the cosignature under the checkpoint of 7 events"
        ]
        # Whoever does not know the key passes over the line.
        assert checked(changed, tmp_path)[0].status == "sound"


async def test_a_note_kept_outside_vouches_with_its_cosignatures(
    database: Database, house: House, tmp_path: Path
) -> None:
    await fill(database, 1)
    written = await asking(database, house.settings).write(TENANT)
    assert written is not None
    wipe_cosignatures = with_note(
        await export(database), lambda note: "\n".join(note.split("\n")[:-2]) + "\n"
    )
    report = Verifier([KEY], [written.note], [house.cosigner.key]).check(of_lines(wipe_cosignatures))
    assert (report.status, report.cosigned, report.witnessed) == ("sound", 7, 7)
    path = tmp_path / "export.jsonl"
    path.write_text("".join(f"{one}\n" for one in wipe_cosignatures))
    others = [verify_ledger.Key(str(house.cosigner.key), b"\x04")]
    code, said = verify_ledger.check_export(
        str(path), [verify_ledger.Key(str(KEY))], [written.note], (others, 1)
    )
    assert (code, said["cosigned"]) == (0, 7)


async def test_a_proof_carries_the_cosignatures(database: Database, house: House, tmp_path: Path) -> None:
    await fill(database, 1)
    written = await asking(database, house.settings).write(TENANT)
    assert written is not None
    line = next(one for one in await export(database) if "specversion" in one)
    event = json.loads(line)["id"]
    proof = await database.read(lambda link: proof_of(link, TENANT, event, written.note, KEY))
    path = tmp_path / "proof.json"
    path.write_text(json.dumps(proof))
    keys, others = [verify_ledger.Key(str(KEY))], [verify_ledger.Key(str(house.cosigner.key), b"\x04")]
    assert verify_ledger.check_proof(str(path), keys, (others, 1))[0] == 0
    assert verify_ledger.check_proof(str(path), keys)[0] == 0
    stranger = [verify_ledger.Key(str(WITNESS), b"\x04")]
    assert verify_ledger.check_proof(str(path), keys, (stranger, 1))[0] == 2
    path.write_text(json.dumps(proof | {"checkpoint_note": proof["checkpoint_note"].replace("w1 ", "w2 ")}))
    assert verify_ledger.check_proof(str(path), keys, (others, 1))[0] == 2


def test_more_witnesses_than_there_are_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="1 keys are given"):
        Verifier([KEY], (), [WITNESS, WitnessKey("twin", WITNESS.public)], 2)
    path = tmp_path / "export.jsonl"
    path.write_text("")
    common = ["export", str(path), "--key", str(KEY), "--witness-key", str(WITNESS)]
    assert verify_ledger.main([*common, "--witnesses", "2"]) == 2
    assert verify_ledger.main([*common[:4], "--witness-key", str(KEY)]) == 2
    assert verify_ledger.main([*common[:3], str(WITNESS)]) == 2


def test_settings_name_co_signers_by_address_and_key() -> None:
    one = CosignerSettings(url="https://w.example.com", key=str(WITNESS))
    assert LedgerSettings(cosigners=(one,), cosigners_needed=1).cosigners == (one,)
    with pytest.raises(ValidationError, match="there are not that many"):
        LedgerSettings(cosigners=(one,), cosigners_needed=2)
    for wrong in ({"url": "file:///etc/passwd"}, {"key": "w+00+AAAA"}, {"timeout_seconds": 0}):
        with pytest.raises(ValidationError):
            CosignerSettings.model_validate({"url": one.url, "key": one.key} | wrong)
    false = CosignerSettings(url=one.url, key=str(WITNESS).replace("w+", "v+"))
    with pytest.raises(InvalidInput, match="witness key"):
        RemoteCosigner(false, clock)
    with pytest.raises(InvalidInput, match="ledger.cosigners"):
        RemoteCosigner(CosignerSettings(url="http://[::1", key=one.key), clock)


# The command line.


class Serving:
    """`countersign witness serve`, a process of its own."""

    def __init__(self, folder: Path, *logs: NoteKey) -> None:
        command = [sys.executable, "-m", "scripts.cli", "witness", "serve", "--name", "w1", "--port", "0"]
        options = ["--state", str(folder), *(part for log in logs for part in ("--log", str(log)))]
        self.process = subprocess.Popen(
            [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        self.url, self.key = words[2], words[4]

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def run(settings: Settings, *arguments: str) -> Any:
    kept = settings.data / "settings.json"
    config.snapshot(settings, kept)
    return CliRunner().invoke(app, list(arguments), env={config.SNAPSHOT: str(kept)})


async def fill_at(settings: Settings, first: int) -> None:
    database = Database(settings.database_url)
    await fill(database, 1, first=first)
    database.close()


def test_the_commands_serve_cosign_verify_and_remember_through_a_kill(tmp_path: Path) -> None:
    plain = Settings(data=tmp_path / "data", embeddings=None)
    plain.data.mkdir()
    migrated(plain.database_url)
    asyncio.run(fill_at(plain, 0))
    log = NoteKey.parse(run(plain, "ledger", "key").stdout)
    folder = tmp_path / "witness"

    def settings_of(serving: Serving) -> Settings:
        one = CosignerSettings(url=serving.url, key=serving.key, timeout_seconds=60)
        return plain.model_copy(update={"ledger": LedgerSettings(cosigners=(one,))})

    serving = Serving(folder, log)
    try:
        made = run(settings_of(serving), "ledger", "checkpoint", "--json")
        assert made.exit_code == 0, made.output
        assert json.loads(made.stdout)["cosigned_by"] == ["cosigner:w1"]
    finally:
        serving.end(signal.SIGKILL)
    missing = run(settings_of(serving), "ledger", "verify", "--json")
    assert json.loads(missing.stdout)["cosigned"] == 7
    asyncio.run(fill_at(plain, 1))
    away = run(settings_of(serving), "ledger", "checkpoint", "--json")
    assert (away.exit_code, json.loads(away.stdout)["alerts"][0]["kind"]) == (3, "witness_unreachable")
    assert run(plain, "witness", "key", "--state", str(folder)).stdout.strip() == serving.key
    serving = Serving(folder, log)
    try:
        made = run(settings_of(serving), "ledger", "checkpoint")
        assert made.exit_code == 0, made.output
        note = made.stdout
        key = WitnessKey.parse(serving.key)
        assert cosigned_at(body_of(note), note.rstrip("\n").split("\n")[-1], key) is not None
        assert read_checkpoint(note).size == 14
    finally:
        assert serving.end(signal.SIGTERM) == 0
    file, verify = tmp_path / "export.jsonl", ("ledger", "verify", "--key", str(log))
    assert run(plain, "ledger", "export", "--out", str(file)).exit_code == 0
    sound = run(plain, *verify, "--export", str(file), "--witness-key", serving.key, "--witnesses", "1")
    assert (sound.exit_code, "cosigned up to 14" in sound.output) == (0, True)
    assert run(plain, *verify, "--export", str(file), "--witness-key", str(WITNESS)).exit_code == 2
    assert run(plain, *verify, "--export", str(file), "--witnesses", "1").exit_code == 2


def test_a_port_that_is_taken_and_a_state_that_is_held_are_said_plainly(tmp_path: Path) -> None:
    state = State(tmp_path, "w1")
    arguments = ["witness", "serve", "--name", "w1", "--state", str(tmp_path), "--log", str(KEY)]
    held = CliRunner().invoke(app, arguments)
    assert (held.exit_code, "another process" in held.output) == (2, True)
    state.close()
    assert CliRunner().invoke(app, ["witness", "key", "--state", str(tmp_path / "none")]).exit_code == 2
    assert CliRunner().invoke(app, [*arguments[:-1], "rubbish"]).exit_code == 2
    assert os.path.exists(tmp_path / STATE_FILE)
