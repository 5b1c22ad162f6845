"""`countersign doctor`: what is installed, what is missing, and what will be used instead.

Looks only; starts, installs and repairs nothing. Exit codes: 0 `countersign up` can start, 3 it cannot.
"""

from __future__ import annotations

import asyncio
import json
import platform
import shutil
import sys
import tempfile
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.table import Table
from rich.text import Text
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from activities.services import weights
from activities.services.migrations import state
from models.errors import InvalidInput, Unavailable
from models.memory import EmbeddingSettings
from models.settings import Settings, TierSettings
from scripts import stack
from scripts.commands.findings import Finding, Health
from scripts.commands.keys import look_at_keys
from scripts.commands.policy import look_at_policy
from scripts.commands.session import console
from temporal import dev_server
from workers import config

FREE_BYTES = 500_000_000
"""Logs, a year of decisions and the converted weights fit."""
ANSWER_SECONDS = 3.0


Look = Callable[[Settings], Awaitable[list[Finding]]]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Look at everything `countersign up` needs."""
    findings = asyncio.run(examine())
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in findings], indent=2))
    else:
        console().print(table(findings))
    raise typer.Exit(0 if can_start(findings) else 3)


def can_start(findings: list[Finding]) -> bool:
    """Whether nothing stands in the way."""
    return all(each.health is not Health.FAILED for each in findings)


async def examine(environ: Mapping[str, str] | None = None, folder: Path | None = None) -> list[Finding]:
    """Look at everything; settings that cannot be read are a finding too."""
    try:
        chosen = config.chosen_file(environ, folder)
        settings = config.load(environ, folder)
    except InvalidInput as error:
        return [_python(), Finding("settings", Health.FAILED, error.message, "correct them")]
    first = [_python(), Finding("settings", Health.OK, str(chosen or "shipped defaults"))]
    looks: tuple[Look, ...] = (
        *(_programs, _temporal, _weights, _data, _database),
        *(look_at_keys, look_at_policy, _ports, _servers),
    )
    return first + [finding for look in looks for finding in await look(settings)]


def table(findings: list[Finding]) -> Table:
    """For people."""
    colours = {Health.OK: "green", Health.ABSENT: "yellow", Health.FAILED: "red"}
    shown = Table("what", "state", "found", "will use / do", box=None, pad_edge=False)
    for each in findings:
        state = Text(each.health, style=colours[each.health])
        shown.add_row(each.name, state, Text(each.found), Text(each.use))
    return shown


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding(
        "python",
        Health.OK if good else Health.FAILED,
        platform.python_version(),
        "" if good else "3.11 or later",
    )


async def _programs(settings: Settings) -> list[Finding]:
    git, hugo = shutil.which("git"), shutil.which("hugo")
    return [
        Finding("git", Health.OK, git) if git else Finding("git", Health.FAILED, "missing", "install git"),
        Finding("hugo", Health.OK, hugo)
        if hugo
        else Finding("hugo", Health.ABSENT, "missing", "the built-in builder of posts and an index"),
    ]


async def _temporal(settings: Settings) -> list[Finding]:
    if not settings.temporal.managed:
        there = await _in_time(dev_server.answers(settings.temporal))
        use = "" if there else "start it, or set temporal.managed to true"
        health = Health.OK if there else Health.FAILED
        return [Finding("temporal", health, f"{settings.temporal.address} {_word(there)}", use)]
    try:
        program = dev_server.binary()
        return [Finding("temporal", Health.OK, await dev_server.version(program), str(program))]
    except (Unavailable, OSError) as error:
        return [Finding("temporal", Health.FAILED, str(error), "run `make setup`")]


async def _weights(settings: Settings) -> list[Finding]:
    wanted: list[tuple[str, str, str]] = []
    if any(tier.managed for tier in settings.tiers):
        wanted.append(("chat weights", weights.CHAT_PACKAGE, weights.CHAT_FILE))
    if settings.embeddings and settings.embeddings.managed:
        wanted.append(("embedding weights", weights.EMBEDDING_PACKAGE, "model.safetensors"))
    return [await asyncio.to_thread(_weight, *each) for each in wanted]


def _weight(name: str, package: str, file: str) -> Finding:
    """Hash the file and compare with what its package, itself pinned by hash, says."""
    try:
        listed = next(each for each in metadata.files(package) or () if each.name == file)
        path = Path(str(listed.locate()))
        said = urlsafe_b64decode(listed.hash.value + "=").hex() if listed.hash else ""
        weights.checked(path, said)
    except (metadata.PackageNotFoundError, StopIteration, OSError):
        return Finding(name, Health.FAILED, f"{package}/{file} is missing", "run `make setup`")
    except InvalidInput as error:
        return Finding(name, Health.FAILED, error.message, "run `make clean setup`")
    return Finding(name, Health.OK, f"{file}, SHA-256 {said[:12]}… as published", str(path.parent))


async def _data(settings: Settings) -> list[Finding]:
    folder = settings.data.resolve()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free
    size = f"{folder}, {free / 1e9:.1f} GB free"
    if not _writable(there):
        return [Finding("data", Health.FAILED, size, "set data to a folder you can write")]
    if free < FREE_BYTES:
        return [Finding("data", Health.FAILED, size, f"make {FREE_BYTES // 1_000_000} MB free")]
    return [Finding("data", Health.OK, size)]


async def _database(settings: Settings) -> list[Finding]:
    url = make_url(settings.database_url)
    shown = url.render_as_string(hide_password=True)
    if url.drivername.startswith("sqlite") and not Path(url.database or "").exists():
        return [Finding("database", Health.ABSENT, f"{shown} is not there yet", "made by `countersign up`")]
    try:
        revision, head = await asyncio.to_thread(state, settings.database_url)
    except SQLAlchemyError as error:
        return [Finding("database", Health.FAILED, f"{shown}: {type(error).__name__}", "correct `database`")]
    use = "" if revision == head else f"brought to {head} by `countersign up`"
    return [Finding("database", Health.OK, f"{shown} at revision {revision or 'none'}", use)]


async def _ports(settings: Settings) -> list[Finding]:
    try:
        wanted = stack.ports(settings)
    except InvalidInput as error:
        return [Finding("ports", Health.FAILED, error.message)]
    if pid := stack.holder(settings):
        return [Finding("ports", Health.OK, f"used by `countersign up`, pid {pid}", "stop it before another")]
    return [_port_finding(port) for port in wanted if stack.is_taken(port)] or [
        Finding("ports", Health.OK, ", ".join(str(port.number) for port in wanted) + " free")
    ]


def _port_finding(port: stack.Port) -> Finding:
    use = f"stop what listens there, or set {port.setting} to a free port"
    return Finding("ports", Health.FAILED, f"{port.number} ({port.setting}) is taken", use)


async def _servers(settings: Settings) -> list[Finding]:
    named = [(f"tier {tier.name}", tier) for tier in settings.tiers]
    servers = [*named, *([("embeddings", settings.embeddings)] if settings.embeddings else [])]
    async with httpx.AsyncClient(timeout=ANSWER_SECONDS) as client:
        found = await asyncio.gather(*(_server(name, server, client) for name, server in servers))
    if not named:
        found.append(Finding("tiers", Health.ABSENT, "none in the settings", "agents wait for a model"))
    return found


async def _server(name: str, server: TierSettings | EmbeddingSettings, client: httpx.AsyncClient) -> Finding:
    there = await stack.healthy(server.url, client)
    found = f"{server.kind} at {server.url} {_word(there)}"
    if there:
        return Finding(name, Health.OK, found)
    use = "started by `countersign up`" if server.managed else "what is left without it, until it answers"
    return Finding(name, Health.ABSENT, found, use)


async def _in_time(question: Awaitable[bool]) -> bool:
    try:
        return await asyncio.wait_for(question, ANSWER_SECONDS)
    except TimeoutError:
        return False


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _word(there: bool) -> str:
    return "answers" if there else "does not answer"
