from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError

from activities.services.checkpoints import Checkpoints
from activities.services.content import ContentStore, guard
from activities.services.cosigning import RemoteCosigner, cosignatures
from activities.services.database import Database
from activities.services.erasure import Erasure
from activities.services.ledger_store import LedgerStore, add_in
from activities.services.memory_store import MemoryStore
from activities.services.migrations import migrate, state
from activities.services.vault import Keys
from activities.services.vectors import ExactVectors
from activities.services.verifier import check_database
from models.errors import InvalidInput
from models.ledger import Append, EventType
from models.loop import Status
from models.memory import Memo, Recall, Search
from models.settings import TemporalSettings
from scripts.bench.ledger import check, killed
from scripts.chaos.bound import World
from tests.conftest import a_key, note, settings_for, stack_of
from tests.ledgers import PRIVATE, TENANT, fill
from tests.test_ledger_tree import draft
from tests.test_witness_asked import House

pytest.importorskip("psycopg")
pytestmark = pytest.mark.real
WAITING = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
SCRIPT = Path(__file__).parents[2] / "scripts" / "targets" / "postgres.sh"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # Its owner may be another account, which reads nothing below a test's own folder.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        argv = [str(SCRIPT), "start", folder, port]
        started = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
        try:
            made = started.stdout.strip()
            migrate(made)
            yield made
        finally:
            subprocess.run([str(SCRIPT), "stop", folder], check=True)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database(url)
    yield opened
    opened.close()


def test_the_migrations_arrive(url: str) -> None:
    current, expected = state(url)
    assert current == expected


async def test_writers_with_connections_of_their_own_leave_no_gap(url: str) -> None:
    databases = [Database(url) for _ in range(4)]

    async def one(database: Database, stream: str) -> None:
        store = LedgerStore(database, lambda: datetime.now(UTC))
        for version in range(10):
            drafts = (draft(f"{stream}-{version}", stream),)
            wish = Append(tenant="many", stream=stream, expected=version, drafts=drafts)
            assert (await store.append(wish)).won

    await asyncio.gather(*(one(d, f"s{n}-{m}") for n, d in enumerate(databases) for m in range(6)))
    for database in databases:
        database.close()
    assert check(url, "many", 240) == 240


def test_stacks_that_start_at_once_migrate_one_after_the_other(url: str) -> None:
    fresh = made(url, "at_once")
    with ThreadPoolExecutor(3) as stacks:
        list(stacks.map(migrate, [fresh] * 3))
    current, expected = state(fresh)
    assert current == expected


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_keep_every_text_is_refused(url: str, encoding: str) -> None:
    narrow = made(url, encoding.lower(), f"ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(InvalidInput, match=f"{encoding}.*ENCODING 'UTF8'"):
        migrate(narrow)


def made(url: str, name: str, how: str = "") -> str:
    """Another database of the same server, empty, by its URL."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as link:
        link.execute(text(f"CREATE DATABASE {name} {how}"))
    engine.dispose()
    return engine.url.set(database=name).render_as_string(hide_password=False)


async def test_writers_take_turns_so_that_no_batch_waits_for_one_that_waits_for_it(url: str) -> None:
    one, other = Database(url), Database(url)
    entered, leave = threading.Event(), threading.Event()

    def hold(link: Connection) -> str:
        add_in(link, "log-a", draft("held", "held"), datetime.now(UTC))
        entered.set()
        leave.wait()
        return str(link.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one())

    holding = asyncio.create_task(one.write(hold))
    await asyncio.to_thread(entered.wait)
    store = LedgerStore(other, lambda: datetime.now(UTC))
    waiting = asyncio.create_task(store.add("log-b", draft("waits", "waits")))
    try:
        while not await one.read(lambda link: link.execute(text(WAITING)).first()):
            assert not waiting.done()
            await asyncio.sleep(0.01)
    finally:
        leave.set()
    await waiting
    assert await holding == "10s", "whoever is stopped in its turn loses it"
    for database in (one, other):
        await asyncio.to_thread(database.close)


async def test_a_signed_log_is_sound(database: Database) -> None:
    checkpoints = Checkpoints(database, PRIVATE, "countersign")
    await fill(database, 4)
    written = await checkpoints.write(TENANT)
    assert written is not None
    report = await database.read(
        lambda link: check_database(link, TENANT, written.key.name, [written.key], [written.note])
    )
    assert (report.status, report.signed, report.findings) == ("sound", 28, ())


async def test_cosignatures_are_kept_beside_a_checkpoint(database: Database, tmp_path: Path) -> None:
    house = House(tmp_path / "witness", "w1")
    await house.open()
    await fill(database, 1, first=90)
    asked = [RemoteCosigner(house.settings, lambda: datetime.now(UTC))]
    written = await Checkpoints(database, PRIVATE, "countersign", (), asked).write(TENANT)
    await house.close()
    assert written is not None
    assert (written.alerts, written.cosigned_by) == ((), ("cosigner:w1",))
    kept = await database.read(lambda link: cosignatures(link, TENANT))
    assert [len(lines) for lines in kept.values()] == [1]


@pytest.mark.parametrize("table", ["event", "merkle_node", "checkpoint", "cosignature"])
@pytest.mark.parametrize("change", ["UPDATE {} SET log_id = log_id", "DELETE FROM {}", "TRUNCATE {}"])
async def test_rows_of_the_ledger_are_only_added(database: Database, table: str, change: str) -> None:
    assert await _rows(database, table), "the tests before this one have written some"
    with pytest.raises(DBAPIError, match="only ever added"):
        await database.write(lambda link: link.execute(text(change.format(table))))


async def _rows(database: Database, table: str) -> int:
    query = text(f"SELECT count(*) FROM {table}")
    return int(await database.read(lambda link: link.execute(query).scalar_one()))


def test_a_killed_writer_loses_nothing_it_acknowledged(url: str) -> None:
    result = killed(url, 5, random.Random(7))
    assert result["kept"] >= result["acknowledged"]


async def test_the_whole_loop_runs_on_it(url: str, temporal: TemporalSettings, tmp_path: Path) -> None:
    async with stack_of(settings_for(temporal, tmp_path, database=url)) as stack:
        run = await stack.propose(a_key(), note())
        assert (await stack.approve(run)).counted
        assert (await run.handle.result()).status is Status.EXECUTED
        assert len(stack.notes()) == 1
        assert (await stack.types(run))[-1] == "outcome"


async def test_a_subject_is_erased_and_the_log_still_holds(url: str) -> None:
    database = guard(Database(url), Keys("k1", {"k1": b"k" * 32}))
    content, tenant = ContentStore(database), "erasing"
    memory = MemoryStore(database, content, None, ExactVectors(database, 8))
    for subject, words in (("ann", "Zanzibar 4711"), ("bob", "green tea")):
        ref = await content.put(tenant, words.encode(), subject=subject)
        memo = Memo(tenant=tenant, kind="fact", title=words, text=ref, source="x", subject=subject)
        await memory.keep(memo, datetime.now(UTC))
        told = draft(f"told-{subject}", "told").model_copy(update={"body": {"said": ref.model_dump()}})
        await LedgerStore(database, lambda: datetime.now(UTC)).add(tenant, told)
    both = await content.put(tenant, b"for both", subject="ann", plainly=True)
    await content.put(tenant, b"for both", subject="bob", plainly=True)
    query = Recall(tenant=tenant, query=both, by=Search.WORDS)
    assert [hit.title for hit in (await memory.recall(query, "zanzibar")).hits] == ["Zanzibar 4711"]
    receipt = await Erasure(database, lambda: datetime.now(UTC)).forget(tenant, "ann", by="dpo")
    assert receipt.removed["records"] == 1 and set(receipt.left.values()) == {0}
    assert (await memory.recall(query, "zanzibar")).hits == ()
    assert [hit.title for hit in (await memory.recall(query, "tea")).hits] == ["green tea"]
    checkpoints = Checkpoints(database, PRIVATE, "countersign")
    written = await checkpoints.write(tenant)
    assert written is not None
    report = await database.read(
        lambda link: check_database(link, tenant, written.key.name, [written.key], [])
    )
    assert (report.status, report.findings) == ("sound", ())
    database.close()


async def test_an_act_waits_for_whoever_writes_to_the_log_and_goes_by_what_they_wrote(
    url: str, tmp_path: Path
) -> None:
    world, other = World(tmp_path, 1, url), Database(url)
    bound = await world.bind("raced")
    body = {"standing": "expired", "digest": bound.order.digest}
    expired = draft("raced-expired", "raced").model_copy(update={"type": EventType.GATE, "body": body})
    with other.engine.begin() as link:
        add_in(link, bound.order.tenant, expired, datetime.now(UTC))
        acting = asyncio.create_task(world.act(bound))
        while not await other.read(lambda link: link.execute(text(WAITING)).first()):
            assert not acting.done()
            await asyncio.sleep(0.01)
    assert await acting == "refused"
    assert world.effects() == 0
    for one in (world.database, other):
        await asyncio.to_thread(one.close)
