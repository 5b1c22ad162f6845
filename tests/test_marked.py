"""Personal data by every way there is into the system, and then a search of whatever keeps anything."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import select

from activities.services.beliefs import HEAD, Beliefs
from activities.services.content import guard
from activities.services.database import Database
from activities.services.erasure import Erasure
from activities.services.vault import load_keys
from models.beliefs import Change, Mail
from models.errors import InvalidInput, UnknownName
from models.settings import EncryptionSettings, ScheduleSettings, TemporalSettings
from models.telemetry import TelemetrySettings
from temporal.beliefs import settle, tell
from temporal.client import connect
from temporal.converter import VEILED, codec_of, unveiled
from temporal.schedules import Change as Changed
from temporal.schedules import Schedules, Standing
from temporal.telemetry import sending
from tests.collector import collecting
from tests.conftest import a_key, serving
from tests.databases import migrated
from tests.hostile import hostile
from tests.marked import ALL, EMAIL, NAME, columns, found, said

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ON = EncryptionSettings(enabled=True)


@pytest.fixture
def own_temporal(tmp_path: Path) -> Iterator[TemporalSettings]:
    (tmp_path / "temporal").mkdir()
    with serving(tmp_path / "temporal") as settings:
        yield settings


def files(folder: Path) -> dict[str, bytes]:
    """Temporal's database, its write-ahead log, and what the server logged."""
    kept = {path.name: path.read_bytes() for path in (folder / "temporal").iterdir()}
    assert {"temporal.db", "temporal.db-wal", "log"} <= kept.keys()
    return kept


async def test_with_encryption_on_personal_data_stands_nowhere_in_temporal_and_in_no_log_trace_or_metric(
    own_temporal: TemporalSettings, tmp_path: Path, log: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    with collecting() as collector:
        where = TelemetrySettings(otlp_endpoint=collector.url)
        async with (
            sending(where, "all") as telemetry,
            hostile(own_temporal, tmp_path, sealed=True, telemetry=telemetry) as made,
        ):
            await made.everything()
            histories = await made.histories()
            # Row by row too: a long value is cut into pages that need not follow each other in the file.
            rows = columns(tmp_path / "temporal" / "temporal.db")
    printed = "".join(capfd.readouterr())
    kept = {"histories": histories, "workers": log.getvalue().encode(), "printed": printed.encode()}
    kept["telemetry"] = collector.raw
    hits = {name: marks for name, data in (kept | files(tmp_path)).items() if (marks := found(data))}
    assert (rows, hits) == ({}, {})
    told = {span.name for span in collector.spans()} | collector.metrics().keys()
    assert told >= {"RunWorkflow:Unknown", "RunActivity:undo", "chat large", "countersign.effects"}
    assert b"ConnectorRejected" in kept["workers"] and b"WORKFLOW_EXECUTION_UPDATE_ACCEPTED" in histories


async def test_without_encryption_the_same_search_finds_what_was_put_in(
    own_temporal: TemporalSettings, tmp_path: Path
) -> None:
    async with hostile(own_temporal, tmp_path, sealed=False) as made:
        await made.begin()
        for way in (made.beliefs, made.refused, made.scheduled, made.proposal):
            await way()
        rows = columns(tmp_path / "temporal" / "temporal.db")
    assert {"history_node.data", "executions_visibility.workflow_id"} <= rows.keys()
    standing = b"".join(files(tmp_path).values())
    assert found(standing).keys() == {"e-mail", "name", "phone", "iban"}
    for place in ("feedback", "delegation", "apply error", "undo error", "target", "event", "belief", "note"):
        assert said(place).encode() in standing, place
    for place in ("plan error", "tenant", "direct body", "unknown signal", "first of two", "scheduled"):
        assert said(place)[:40].encode() in standing, place


def sealed(folder: Path, on: bool = True) -> Database:
    url = migrated(f"sqlite:///{folder / 'beliefs.db'}")
    return guard(Database(url), load_keys(EncryptionSettings(enabled=on), folder))


def said_of(subject: str, event: str, text: str = ALL) -> Change:
    return Change(tenant="default", agent="support", subject=subject, event=event, sets={"said": text})


async def test_what_is_believed_of_a_person_names_nobody_in_the_database(tmp_path: Path) -> None:
    database = sealed(tmp_path)
    beliefs = Beliefs(database, lambda: NOW)
    for number, subject in enumerate((NAME, EMAIL, NAME)):
        await beliefs.change(said_of(subject, f"e{number}"))
    assert await beliefs.subjects("default") == (("support", EMAIL, 1), ("support", NAME, 2))
    assert await beliefs.agents("default", NAME) == ("support",)
    assert (await beliefs.now("default", "support", NAME)).value("said") == ALL
    assert columns(tmp_path / "beliefs.db") == {}
    await Erasure(database, lambda: NOW).forget("default", NAME, by="dpo")
    assert await beliefs.subjects("default") == (("support", EMAIL, 1),)
    database.close()


async def test_a_belief_from_before_encryption_goes_on_under_its_opaque_name(tmp_path: Path) -> None:
    before = sealed(tmp_path, on=False)
    for event in ("e1", "e2"):
        await Beliefs(before, lambda: NOW).change(said_of(NAME, event, event))
    before.close()
    database = sealed(tmp_path)
    beliefs = Beliefs(database, lambda: NOW)
    assert (await beliefs.now("default", "support", NAME)).version == 2
    assert (await beliefs.change(said_of(NAME, "e1"))).known
    assert (await beliefs.change(said_of(NAME, "e3"), expected=2)).won
    past = await beliefs.history("default", "support", NAME)
    assert [one.belief.value("said") for one in past] == ["e1", "e2", ALL]
    called = await beliefs.called("default", NAME)
    assert await database.read(lambda link: link.execute(select(HEAD.c.subject)).scalars().all()) == [called]
    await Erasure(database, lambda: NOW).forget("default", NAME, by="dpo")
    assert await beliefs.agents("default", NAME) == ()
    database.close()


async def test_a_belief_from_before_encryption_can_be_forgotten_untouched(tmp_path: Path) -> None:
    before = sealed(tmp_path, on=False)
    await Beliefs(before, lambda: NOW).change(said_of(NAME, "e1"))
    before.close()
    database = sealed(tmp_path)
    assert (await Erasure(database, lambda: NOW).forget("default", NAME, by="dpo")).removed["beliefs"] == 1
    with pytest.raises(UnknownName):
        await Erasure(database, lambda: NOW).forget("default", EMAIL, by="dpo")
    assert columns(tmp_path / "beliefs.db") == {}
    database.close()


async def test_a_name_stays_the_same_and_is_another_in_another_tenant_and_installation(
    tmp_path: Path,
) -> None:
    names: list[str] = []
    for folder in (tmp_path, tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        database = sealed(folder)
        beliefs = Beliefs(database, lambda: NOW)
        names += [await beliefs.called("default", NAME), await beliefs.called("other", NAME)]
        database.close()
    assert names[:2] == names[2:4] and len(set(names)) == 4
    plain = sealed(tmp_path / "other", on=False)
    assert await Beliefs(plain, lambda: NOW).called("default", NAME) == NAME
    plain.close()


@pytest.mark.parametrize("called", [None, NAME])
async def test_with_encryption_on_no_owner_is_asked_under_the_name_of_a_person(
    temporal: TemporalSettings, tmp_path: Path, called: str | None
) -> None:
    client = await connect(temporal, codec_of(ON, tmp_path))
    mail = Mail(agent="support", event="e1", sets={"said": ALL})
    for send in (settle, tell):
        with pytest.raises(InvalidInput, match=r"Beliefs\.called"):
            await send(client, "default", NAME, mail, called=called)


async def test_a_schedule_from_before_encryption_is_sealed_when_it_is_applied_again(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    tenant, codec = f"t{a_key()}", codec_of(ON, tmp_path)
    wanted = [ScheduleSettings(name="weekly", agent="external", cron="0 8 * * 1", note=said("note"))]
    before = Schedules(await connect(temporal), tenant, temporal)
    after = Schedules(await connect(temporal, codec), tenant, temporal)
    assert [one.change for one in await before.apply(wanted, ["external"])] == [Changed.CREATED]
    assert [(one.standing, one.note) for one in await after.listed(wanted)] == [
        (Standing.DIFFERENT, said("note"))
    ]
    assert [one.change for one in await after.apply(wanted, ["external"])] == [Changed.UPDATED]
    assert [one.change for one in await after.apply(wanted, ["external"])] == [Changed.UNCHANGED]
    await after.pause("weekly", said("pause"))
    [listed] = await after.listed(wanted)
    assert (listed.standing, listed.paused, listed.note) == (Standing.APPLIED, True, said("pause"))
    kept = (await after.handle("weekly").describe()).schedule.state.note or ""
    assert kept.startswith(VEILED) and found(kept.encode()) == {}
    await after.handle("weekly").delete()


@pytest.mark.parametrize("note", ["typed in the UI", f"{VEILED}nonsense", f"{VEILED}AAAA", VEILED])
async def test_a_note_that_somebody_else_wrote_is_shown_as_it_is(tmp_path: Path, note: str) -> None:
    assert await unveiled(note, codec_of(ON, tmp_path)) == note
    assert await unveiled(note, None) == note


async def test_an_error_that_nobody_looked_at_is_logged_without_its_text(log: io.StringIO) -> None:
    async def fails(given: str) -> None:
        raise InvalidInput.field("recipient", given, said("remedy"))

    task = asyncio.create_task(fails(EMAIL))
    await asyncio.wait([task])
    loop = asyncio.get_running_loop()
    loop.default_exception_handler(
        {"message": "Task exception was never retrieved", "exception": task.exception(), "task": task}
    )
    assert "never retrieved" in log.getvalue() and "InvalidInput" in log.getvalue()
    assert found(log.getvalue().encode()) == {}
