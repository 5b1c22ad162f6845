from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("models", "activities", "workflows", "temporal", "workers", "scripts", "tests")
"""Each may import itself and those before it."""
SOURCE = ROOMS[:-1]
LINES = 450
LONGER = {
    "models/routing.py": 520,
    "activities/tiers/wire.py": 500,
    # One file is its promise: whoever checks with it needs nothing else of ours.
    "scripts/verify_ledger.py": 849,
}
"""Outgrew it already; may only shrink."""
ENGINES = ("httpx", "sqlalchemy", "sqlmodel", "numpy", "weaviate", "alembic", "huggingface_hub", "xllamacpp")
TEMPORAL_IN_MODELS = {"temporalio.exceptions", "temporalio.common"}


def files(*rooms: str) -> list[Path]:
    found = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    assert found
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


@cache
def imports(path: Path) -> tuple[tuple[int, str], ...]:
    """Every module a file imports, wherever in it: in functions and under TYPE_CHECKING too."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            # `from activities import ledger` names a module as well.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def where(path: Path, line: int, name: str) -> str:
    return f"{path.relative_to(ROOT)}:{line} {name}"


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_imports_go_one_way_only() -> None:
    wrong = [
        where(path, line, name)
        for at, room in enumerate(ROOMS)
        for path in files(room)
        for line, name in imports(path)
        if under(name, *ROOMS[at + 1 :])
    ]
    assert wrong == []


def test_models_know_nothing_of_temporal_but_its_errors_and_common_types() -> None:
    wrong = [
        where(path, line, name)
        for path in files("models")
        for line, name in imports(path)
        if under(name, "temporalio") and not under(name, *TEMPORAL_IN_MODELS)
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ["activities/services", "activities/tiers", "activities/connectors"])
def test_engines_know_nothing_of_temporal(room: str) -> None:
    wrong = [
        where(path, line, name)
        for path in files(room)
        for line, name in imports(path)
        if under(name, "temporalio", "activities.heartbeat")
    ]
    assert wrong == []


def test_workflows_see_the_surface_of_activities_and_no_engine() -> None:
    hidden = ("activities.services", "activities.connectors", "activities.tiers", *ENGINES)
    wrong = [
        where(path, line, name)
        for path in files("workflows")
        for line, name in imports(path)
        if under(name, *hidden)
    ]
    assert wrong == []


def test_the_surface_of_activities_takes_its_collaborators_as_arguments() -> None:
    inside = ("activities.services", "activities.connectors", "activities.tiers", *ENGINES)
    wrong = [
        where(path, line, name)
        for path in sorted((ROOT / "activities").glob("*.py"))
        for line, name in imports(path)
        if under(name, *inside)
    ]
    assert wrong == []


def test_only_activities_know_the_tables() -> None:
    rooms = [room for room in SOURCE if room != "activities"]
    wrong = [
        where(path, line, name)
        for path in files(*rooms)
        for line, name in imports(path)
        if under(name, "models.tables")
    ]
    assert wrong == []


def test_only_the_configuration_reads_the_environment() -> None:
    wrong = []
    for path in files("models", "activities", "workflows", "temporal", "workers"):
        if path == ROOT / "workers" / "config.py":
            continue
        wrong += [
            where(path, node.lineno, node.attr)
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute) and node.attr in ("getenv", "getenvb")
        ]
        wrong += [where(path, line, "environ") for line in _reads_of_environ(tree(path))]
    assert wrong == []


def _reads_of_environ(tree: ast.AST) -> Iterator[int]:
    """Uses of `environ` but for setting a variable, which says nothing about this machine."""
    written = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "environ" and id(node) not in written:
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in ("environ", "getenv"))


def test_packages_hold_a_docstring_only() -> None:
    wrong = []
    for path in files(*SOURCE):
        if path.name == "__init__.py" and "migrations" not in path.parts:
            body = tree(path).body
            if len(body) != 1 or not isinstance(body[0], ast.Expr):
                wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


def test_no_file_outgrows_a_reader() -> None:
    long = [
        f"{path.relative_to(ROOT)} has {count} lines"
        for path in files(*SOURCE)
        if (count := len(path.read_text().splitlines())) > LONGER.get(str(path.relative_to(ROOT)), LINES)
    ]
    assert long == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in files(*SOURCE)
        if "versions" not in path.parts and not ast.get_docstring(tree(path))
    ]
    assert silent == []


def test_importing_the_workflows_loads_no_engine() -> None:
    agents = sorted(
        path.stem for path in (ROOT / "workflows" / "agents").glob("*.py") if path.stem != "__init__"
    )
    assert {"content", "external"} <= set(agents)
    names = ", ".join(f"workflows.agents.{name}" for name in agents)
    code = f"import sys, {names}\nprint(*(name for name in {ENGINES!r} if name in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (run.returncode, run.stdout.split()) == (0, []), run.stderr


def test_there_is_a_room_for_everything_and_nothing_else() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= set(ROOMS)
