"""What is typed wrongly or cannot be written ends with a code and a text that names field and remedy."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner, Result

from models.errors import InvalidInput, UnknownName
from models.gate import Kind
from models.settings import Settings, TemporalSettings
from scripts.cli import app
from scripts.commands.answer import signed
from scripts.exits import SHOWN, Exit, code_of, text_of
from tests.conftest import free_port
from tests.databases import migrated
from workers import config

BYTES = "\udcff\udcfe"
"""What two bytes that are no UTF-8 are for Python."""


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    settings = Settings(data=tmp_path, embeddings=None)
    migrated(settings.database_url)
    config.snapshot(settings, tmp_path / "settings.json")
    return tmp_path / "settings.json"


def run(kept: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={config.SNAPSHOT: str(kept)})


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", BYTES),
        ("route", "explain", BYTES),
        ("memory", "search", BYTES),
        ("ledger", "tail", "--run", BYTES),
        ("memory", "forget", "--yes", "--as", "ann", "--subject", BYTES),
    ],
)
def test_what_is_no_utf_8_is_refused_before_anything_else(kept: Path, arguments: tuple[str, ...]) -> None:
    ran = run(kept, *arguments)
    assert ran.exit_code == Exit.REFUSED and "UTF-8" in ran.stderr, ran.output


def test_a_file_may_be_called_by_bytes_that_are_no_utf_8(kept: Path, tmp_path: Path) -> None:
    (tmp_path / f"brief-{BYTES}").write_text("no front matter")
    ran = run(kept, "start", "nobody", str(tmp_path / f"brief-{BYTES}"))
    assert ran.exit_code == Exit.REFUSED and "agent: 'nobody' is not known" in ran.stderr


@pytest.mark.parametrize("option", ["--agent", "--kind"])
def test_a_search_for_what_cannot_be_says_which_option_is_wrong(kept: Path, option: str) -> None:
    ran = run(kept, "memory", "search", "bread", option, "No Such", "--json")
    assert ran.exit_code == Exit.REFUSED and "'No Such' is not accepted" in ran.stderr and not ran.stdout


def test_forgetting_asks_nobody_who_cannot_answer(kept: Path) -> None:
    ran = run(kept, "memory", "forget", "--subject", "ann", "--as", "dpo", "--json")
    assert ran.exit_code == Exit.REFUSED and "--yes" in ran.stderr and not ran.stdout


@pytest.mark.parametrize("name", ["none", "."])
def test_an_export_that_cannot_be_read_is_missing_and_not_tampered_with(
    kept: Path, tmp_path: Path, name: str
) -> None:
    ran = run(kept, "ledger", "verify", "--export", str(tmp_path / name))
    assert ran.exit_code == 2 and "--export: " in ran.stderr
    (tmp_path / "note").write_bytes(b"\xff")
    assert run(kept, "ledger", "verify", "--checkpoint", str(tmp_path / "note")).exit_code == 2
    assert run(kept, "ledger", "export", "--out", str(tmp_path)).exit_code == Exit.REFUSED


def test_no_number_of_events_is_too_large_for_the_database(kept: Path) -> None:
    ran = run(kept, "ledger", "tail", "--limit", "9" * 30)
    assert ran.exit_code == Exit.REFUSED and "--limit" in ran.stderr


def test_a_log_without_events_has_no_checkpoint_and_says_so_to_programs(kept: Path) -> None:
    ran = run(kept, "ledger", "checkpoint", "--json")
    assert ran.exit_code == 0 and json.loads(ran.stdout) is None and "empty" in ran.stderr


def test_an_error_obeys_no_control_character_and_keeps_its_end_however_long() -> None:
    text = text_of(UnknownName(f"route: \x1b[31m\u202e{'x' * 100_000}; look at `countersign pending`"))
    assert "\x1b" not in text and "\u202e" not in text and len(text) < SHOWN + 10
    assert text.startswith("route: ") and text.endswith("look at `countersign pending`")


@pytest.mark.parametrize("key", ["", ".", "none", "/"])
async def test_what_is_no_key_signs_nothing(tmp_path: Path, key: str) -> None:
    message = {"digest": "0" * 64, "approver": "ann"}
    with pytest.raises(InvalidInput, match="--sign: "):
        await signed("default", Kind.APPROVE, message, tmp_path / key if key == "none" else Path(key))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("SQLITE_BUSY", "another process"), ("SQLITE_READONLY_DIRECTORY", "write it"), ("SQLITE_FULL", "room")],
)
def test_a_database_that_refuses_says_what_to_do_about_that(name: str, remedy: str) -> None:
    cause = sqlite3.OperationalError("no")
    cause.sqlite_errorname = name
    error = OperationalError("", {}, cause)
    assert code_of(error) == Exit.NOT_READY and remedy in text_of(error)


@pytest.mark.parametrize(
    ("state", "remedy"),
    [(None, "PostgreSQL runs"), ("25006", "primary"), ("53300", "connections"), ("42P01", "countersign up")],
)
def test_a_postgresql_that_refuses_says_what_to_do_about_that(state: str | None, remedy: str) -> None:
    class Refusal(Exception):
        sqlstate = state

    error = OperationalError("", {}, Refusal("no"))
    assert code_of(error) == Exit.NOT_READY and remedy in text_of(error)


@pytest.mark.parametrize("arguments", [("--help",), ("agents", "--json")])
def test_a_full_disk_behind_standard_output_is_an_error_and_no_traceback(
    kept: Path, arguments: tuple[str, ...]
) -> None:
    environment = {**os.environ, config.SNAPSHOT: str(kept)}
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "scripts.cli", *arguments]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True)
    assert ran.returncode == Exit.NOT_READY, ran.stderr
    assert "No space left on device" in ran.stderr and "Traceback" not in ran.stderr
    assert ran.stderr.count("No space") == 1


def test_what_the_doctor_found_is_not_cut_where_nobodys_terminal_sets_a_width(
    kept: Path, tmp_path: Path
) -> None:
    assert f"{tmp_path}/keys/ledger.pem is not there yet" in run(kept, "doctor").stdout


def test_with_threads_of_temporal_s_client_a_command_ends_before_the_interpreter_does(tmp_path: Path) -> None:
    temporal = TemporalSettings(address=f"127.0.0.1:{free_port()}")
    settings = Settings(data=tmp_path, embeddings=None, temporal=temporal)
    migrated(settings.database_url)
    config.snapshot(settings, tmp_path / "settings.json")
    # What the interpreter does at its end is where they would abort it, now and then.
    text = "import atexit, os; atexit.register(os._exit, 77); from scripts import cli; cli.main()"
    environment = {**os.environ, config.SNAPSHOT: str(tmp_path / "settings.json")}
    command = [sys.executable, "-c", text, "pending"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ran.returncode, "does not answer" in ran.stderr) == (Exit.NOT_READY, True), ran.stderr


def test_so_does_a_worker() -> None:
    ends = "import atexit, os, runpy; atexit.register(os._exit, 77)"
    text = f"{ends}; runpy.run_module('workers', {{}}, '__main__')"
    ran = subprocess.run([sys.executable, "-c", text, "nonsense"], capture_output=True, text=True)
    assert (ran.returncode, "use one of decide" in ran.stderr) == (Exit.REFUSED, True), ran.stderr
