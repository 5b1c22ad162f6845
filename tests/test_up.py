from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from io import StringIO
from pathlib import Path

import typer
from rich.console import Console
from typer.testing import CliRunner

from models.settings import Settings, TemporalSettings
from scripts import stack
from scripts.commands.doctor import Finding, Health, can_start, doctor, examine, table
from scripts.commands.up import serve, up


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bare(data: Path) -> dict[str, str]:
    """Variables for a stack of nothing but a dev server."""
    return {
        "COUNTERSIGN_DATA": str(data),
        "COUNTERSIGN_TEMPORAL__ADDRESS": f"127.0.0.1:{free_port()}",
        "COUNTERSIGN_TEMPORAL__UI_PORT": str(free_port()),
        "COUNTERSIGN_EMBEDDINGS": "null",
        "COUNTERSIGN_TIERS": "[]",
        "COUNTERSIGN_ROLES": "[]",
    }


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


async def test_a_terminate_signal_stops_everything_and_counts_as_success(tmp_path: Path) -> None:
    out = StringIO()
    temporal = TemporalSettings(address=f"127.0.0.1:{free_port()}", ui_port=free_port())
    settings = Settings(data=tmp_path, temporal=temporal, embeddings=None, roles=())
    work = asyncio.create_task(serve(settings, Console(file=out), lambda settings: None))
    async with asyncio.timeout(60):
        while "Ctrl-C" not in out.getvalue() and not work.done():
            await asyncio.sleep(0.01)
    assert not work.done(), (work.result(), out.getvalue())
    os.kill(os.getpid(), signal.SIGTERM)
    assert await work == 0
    assert "/namespaces/default/workflows" in out.getvalue()
    assert out.getvalue().splitlines()[-1] == "stopped"
    assert not stack.is_taken(stack.ports(settings)[0])


async def test_a_terminate_signal_before_all_is_ready_stops_what_was_started(tmp_path: Path) -> None:
    out = StringIO()
    temporal = TemporalSettings(address=f"127.0.0.1:{free_port()}", ui_port=free_port())
    settings = Settings(data=tmp_path, temporal=temporal, embeddings=None, roles=())

    def interrupted(settings: Settings) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert await serve(settings, Console(file=out), interrupted) == 0
    assert "Ctrl-C" not in out.getvalue()
    assert stack.holder(settings) is None


def invoke(command: object, *arguments: str, **environ: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command)  # type: ignore[type-var]
    result = CliRunner().invoke(app, list(arguments), env=environ)
    return result.exit_code, result.output


def test_a_wrong_setting_ends_up_with_code_2_and_the_remedy() -> None:
    code, said = invoke(up, COUNTERSIGN_CONFIG="nowhere.toml")
    assert code == 2
    assert "COUNTERSIGN_CONFIG: 'nowhere.toml'" in said


def test_a_data_folder_in_use_ends_up_with_code_2(tmp_path: Path) -> None:
    with stack.locked(Settings(data=tmp_path)):
        code, said = invoke(up, "--data", str(tmp_path), **bare(tmp_path))
    assert code == 2
    assert "already runs on it" in said


async def test_the_doctor_finds_nothing_in_the_way_of_a_small_stack(tmp_path: Path) -> None:
    findings = await examine(bare(tmp_path), tmp_path)
    assert can_start(findings), findings
    assert named(findings)["settings"].found == "shipped defaults"
    assert named(findings)["database"].health is Health.ABSENT


async def test_the_doctor_says_which_revision_the_database_is_at(tmp_path: Path) -> None:
    await asyncio.to_thread(stack.migrate_database, Settings(data=tmp_path))
    database = named(await examine(bare(tmp_path), tmp_path))["database"]
    assert database.health is Health.OK
    assert database.use == ""


async def test_the_doctor_names_a_taken_port_and_its_setting(tmp_path: Path) -> None:
    environ = bare(tmp_path)
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", int(environ["COUNTERSIGN_TEMPORAL__UI_PORT"])))
        squatter.listen()
        findings = await examine(environ, tmp_path)
    assert not can_start(findings)
    assert "temporal.ui_port" in named(findings)["ports"].found


async def test_the_doctor_does_not_mind_the_ports_of_a_running_stack(tmp_path: Path) -> None:
    with stack.locked(Settings(data=tmp_path)):
        findings = await examine(bare(tmp_path), tmp_path)
    assert f"pid {os.getpid()}" in named(findings)["ports"].found


async def test_the_doctor_reports_settings_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "countersign.toml").write_text("colour = 1\n")
    findings = await examine({}, tmp_path)
    assert "colour" in named(findings)["settings"].found
    assert not can_start(findings)


def test_the_doctor_answers_programs_in_json_with_code_3_when_it_cannot_start(tmp_path: Path) -> None:
    code, said = invoke(doctor, "--json", COUNTERSIGN_CONFIG=str(tmp_path / "gone.toml"))
    assert code == 3
    assert {finding["health"] for finding in json.loads(said)} == {"ok", "failed"}


def test_the_table_shows_brackets_as_they_are() -> None:
    out = StringIO()
    Console(file=out, width=200).print(table([Finding("x", Health.OK, "[red]", "[a]")]))
    assert "[red]" in out.getvalue()
