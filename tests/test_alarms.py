"""What speaks against a log reaches people, once for as long as it lasts, and stops no other log."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import text

from activities.services.alarms import Alarm, Alarms
from activities.services.checkpoints import Checkpoints
from activities.services.database import Database
from activities.services.ledger_store import LedgerStore
from activities.services.notices import Message, Terminal
from activities.services.scrubbing import Scrub
from activities.services.watching import keep_watch, watch
from activities.services.witnesses import FileWitness
from models.channels import TerminalSettings
from models.errors import Unavailable
from models.notices import Told
from models.settings import LedgerSettings, Settings
from tests.ledgers import PRIVATE, asked, unguard, wipe

BROKEN = Alarm("acme", "log_broken", "", "it was cut")


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 5, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


class Heard:
    """A channel that takes what it is told to, and remembers it."""

    def __init__(self, fails: int = 0) -> None:
        self.fails = fails
        self.said: list[Message] = []

    async def send(self, notice: Message, now: datetime) -> Told:
        if self.fails:
            self.fails -= 1
            raise Unavailable("away")
        self.said.append(notice)
        return Told(at=now, reference="")


def checkpoints(database: Database, folder: Path) -> Checkpoints:
    return Checkpoints(database, PRIVATE, "countersign", [FileWitness(folder / "witness")])


async def happen(database: Database, tenant: str, count: int) -> None:
    for number in range(count):
        await LedgerStore(database, Clock()).add(tenant, asked(f"{tenant}-{number}"))


def lose(database: Database, tenant: str) -> None:
    with database.engine.begin() as link:
        wipe(link, tenant=tenant)


async def test_a_log_that_is_gone_is_an_alarm_and_the_others_are_signed(
    database: Database, tmp_path: Path
) -> None:
    signing = checkpoints(database, tmp_path)
    for tenant in ("acme", "bolt"):
        await happen(database, tenant, 2)
    assert await watch(signing, Scrub(database)) == []
    lose(database, "acme")
    await happen(database, "bolt", 3)
    [alarm] = await watch(signing, Scrub(database))
    assert alarm.key == ("acme", "log_broken", "")
    assert "it was cut" in alarm.text
    [note] = await signing.newest_witnessed("bolt")
    assert note.split("\n")[1] == "3"


async def test_a_log_that_was_cut_is_told_on_the_channel_while_signing_goes_on(
    database: Database, tmp_path: Path
) -> None:
    signing, heard, stop = checkpoints(database, tmp_path), Heard(), asyncio.Event()
    await happen(database, "acme", 2)
    await signing.write("acme")
    lose(database, "acme")
    await happen(database, "acme", 1)
    stop.set()
    await keep_watch(signing, Scrub(database), Alarms({"boss": heard}, Clock()), 3600, stop)
    [said] = heard.said
    assert said.title == "ALARM: the ledger of acme: log_broken"
    assert "countersign ledger verify" in said.text()
    assert json.loads(said.body())["alarm"] == "log_broken"


async def test_an_event_that_was_changed_long_ago_is_an_alarm_though_nobody_asks(
    database: Database, tmp_path: Path
) -> None:
    signing, scrub = checkpoints(database, tmp_path), Scrub(database)
    await happen(database, "acme", 3)
    assert await watch(signing, scrub) == []
    with database.engine.begin() as link:
        unguard(link)
        link.execute(text("UPDATE event SET type = 'receipt' WHERE seq = 2"))
    for _ in range(2):
        [alarm] = await watch(signing, scrub)
        assert (alarm.kind, alarm.text.split(":")[0]) == ("log_broken", "log acme, event 2")


async def test_a_database_with_a_torn_page_is_an_alarm_and_one_that_is_only_away_is_none(
    database: Database, tmp_path: Path
) -> None:
    await happen(database, "acme", 40)
    with database.engine.connect() as link:
        link.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        page = link.exec_driver_sql("SELECT rootpage FROM sqlite_master WHERE name = 'event'").scalar_one()
        size = link.exec_driver_sql("PRAGMA page_size").scalar_one()
    database.engine.dispose()
    file = tmp_path / "countersign.db"
    with file.open("r+b") as pages:
        pages.seek((page - 1) * size)
        pages.write(b"\xff" * size)
    [alarm] = await watch(checkpoints(database, tmp_path), Scrub(database))
    assert (alarm.kind, "malformed" in alarm.text) == ("log_broken", True)
    database.engine.dispose()
    for path in tmp_path.glob("countersign.db*"):
        path.unlink()
    file.mkdir()
    assert await watch(checkpoints(database, tmp_path), Scrub(database)) == []


async def test_the_watch_outlives_whatever_goes_wrong_in_a_round(tmp_path: Path) -> None:
    stop, rounds = asyncio.Event(), list[int]()

    class Odd(Checkpoints):
        def __init__(self) -> None:
            pass

        async def tenants(self) -> tuple[str, ...]:
            rounds.append(len(rounds))
            if len(rounds) == 3:
                stop.set()
            raise RuntimeError("never thought of")

    async with asyncio.timeout(20):
        await keep_watch(Odd(), Scrub(Database("sqlite://")), Alarms({}, Clock()), 0, stop)
    assert len(rounds) in (3, 4)


async def test_an_alarm_is_told_once_while_it_lasts_however_its_text_goes_on() -> None:
    heard = Heard()
    alarms = Alarms({"boss": heard}, Clock())
    for number in range(3):
        await alarms.tell([BROKEN._replace(text=f"it has {number} events")])
    assert len(heard.said) == 1
    await alarms.tell([])
    await alarms.tell([BROKEN])
    assert len({said.id for said in heard.said}) == 2


async def test_a_channel_that_was_away_is_told_later_under_the_same_id_and_the_others_only_once() -> None:
    away, there = Heard(fails=1), Heard()
    alarms = Alarms({"away": away, "there": there}, Clock())
    for _ in range(3):
        await alarms.tell([BROKEN, Alarm("acme", "log_forked", "w1", "another history")])
    assert sorted(said.title for said in away.said) == sorted(said.title for said in there.said)
    assert {said.id for said in away.said} == {said.id for said in there.said}


async def test_an_alarm_is_a_file_on_a_terminal(tmp_path: Path) -> None:
    await Alarms({"desk": Terminal(tmp_path / "desk")}, Clock()).tell([BROKEN])
    [file] = (tmp_path / "desk").iterdir()
    assert file.name.startswith("alarm-")
    assert "it was cut" in file.read_text()


def test_who_hears_of_alarms_is_a_channel_that_there_is() -> None:
    desk = TerminalSettings(name="desk", kind="terminal")
    assert Settings(ledger=LedgerSettings(notify=("desk",)), channels=(desk,)).ledger.notify == ("desk",)
    with pytest.raises(ValidationError, match=r"ledger\.notify names boss, which is no channel"):
        Settings(ledger=LedgerSettings(notify=("boss",)), channels=(desk,))
