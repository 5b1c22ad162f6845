"""What memory promises over SQLite holds over PostgreSQL: the same tests, each in a database of its own."""

from __future__ import annotations

import inspect
import itertools
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import create_engine, make_url, text

from activities.services.database import Database
from activities.services.migrations import migrate
from activities.services.vectors import ExactVectors
from tests import test_erasure, test_memory, test_vectors, test_words
from tests.test_memory import Place
from tests.test_vectors import Stand

pytest.importorskip("psycopg")
pytestmark = pytest.mark.real
SCRIPT = Path(__file__).parents[2] / "scripts" / "targets" / "postgres.sh"
FIXTURES = {"place", "database", "stand"}
OWN_DATABASE = {
    "test_an_erasure_that_was_stopped_after_all_was_gone_is_ended_by_trying_again",
    "test_another_process_writing_and_forgetting_is_seen_by_the_next_search",
    "test_nothing_of_an_erased_subject_is_left_in_any_store_or_file",
    "test_the_command_line_searches_counts_tells_and_forgets",
}
"""They name or read files."""


def _same(module: ModuleType) -> dict[str, object]:
    """The tests of a module that take a database from a fixture."""
    return {
        name: test
        for name, test in vars(module).items()
        if name.startswith("test_") and name not in OWN_DATABASE
        if FIXTURES & set(inspect.signature(test).parameters)
    }


ERASING = _same(test_erasure)
globals().update(ERASING | _same(test_memory) | _same(test_words) | _same(test_vectors))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server with a migrated database that others are copied from."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # Its owner may be another account, which reads nothing below a test's own folder.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        argv = [str(SCRIPT), "start", folder, port]
        started = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
        try:
            main = started.stdout.strip()
            run(main, "CREATE DATABASE model")
            migrate(named(main, "model"))
            yield main
        finally:
            subprocess.run([str(SCRIPT), "stop", folder], check=True)


def run(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as link:
        link.execute(text(statement))
    engine.dispose()


def named(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


NUMBERS = itertools.count(1)


@pytest.fixture
def fresh(server: str) -> str:
    name = f"copy_{next(NUMBERS)}"
    run(server, f"CREATE DATABASE {name} TEMPLATE model")
    return named(server, name)


@pytest.fixture
async def place(
    fresh: str, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Place | test_erasure.Place]:
    if request.function.__name__ in ERASING:
        made = test_erasure.Place(tmp_path, fresh)
        await made.fill()
    else:
        made = Place(fresh)
    yield made
    made.database.close()


@pytest.fixture
def database(fresh: str) -> Iterator[Database]:
    opened = Database(fresh)
    yield opened
    opened.close()


@pytest.fixture
def stand(database: Database) -> Stand:
    return Stand(database, ExactVectors(database, 4))


def test_it_is_postgresql(place: Place, database: Database) -> None:
    assert {one.engine.dialect.name for one in (place.database, database)} == {"postgresql"}
