"""A request that is bound to a region: nothing of its texts leaves the region's processes."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import sqlite3
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import WorkflowFailureError

from activities.services.content import ContentStore
from models.content import ContentSettings
from models.errors import InvalidInput, RegionBound
from models.gate import Kind
from models.ledger import EventType
from models.loop import Ref, Request, Status
from models.settings import (
    KeySettings,
    RegionSettings,
    Settings,
    SiteSettings,
    TemporalSettings,
    TierSettings,
)
from models.visibility import Queue
from scripts.commands.session import Session
from temporal.client import Started, connect, submit
from temporal.inbox import waiting
from tests.conftest import Stack, a_key, free_port, note, serving, settings_for, stack_of
from tests.regional import Recorder, connections, process, stands
from tests.shared import LIMIT
from tests.test_agents_content import BRIEF, page

MARK, UMLAUT, CONTROL = "quokkavelt", "zältweger", "wombatheim"
"""Two words of the region's, and one of the centre's by which it is seen that the search finds words."""


ON_LAND = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Land:
    """The centre with its workers, and a region with a process of its own."""

    centre: Stack
    eu: Stack
    recorder: Recorder
    pid: int
    folder: Path

    async def start(self, agent: str, body: str, key: str = "") -> Started:
        media = "text/markdown; charset=utf-8" if agent == "content" else "application/json"
        ref = await self.eu.content.put("default", body.encode(), media)
        request = Request(agent=agent, region="eu", key=key or a_key(), body=ref)
        return await submit(self.eu.client, request, self.eu.settings.temporal, f"About {MARK}")

    async def note(self) -> Started:
        action = note(f"dear {MARK} and {UMLAUT}") | {"title": f"Write to {MARK}"}
        reasons = f"because {UMLAUT} of {MARK} said so"
        return await self.start(
            "external", json.dumps({"title": MARK, "actions": [action], "reasons": reasons})
        )

    async def article(self, place: str) -> Started:
        brief = BRIEF.replace("Winter hours of", f"Winter hours of {MARK}, {place},").replace(
            "winter-hours", f"{place}-{MARK}"
        )
        return await self.start(
            "content", brief.replace("In winter people", f"{UMLAUT} said so. In winter people")
        )

    def outside(self, word: str, temporal: Path) -> list[str]:
        """Where a word stands of all that left the region's processes."""
        sent = [(f"message {number}", data) for number, data in enumerate(self.recorder.bytes())]
        files = [*self.folder.joinpath("centre").glob("countersign.db*"), *temporal.glob("*")]
        kept = [(path.name, path.read_bytes()) for path in files if path.is_file()]
        return [name for name, data in (*sent, *kept) if stands(word, data)]


def land_of(temporal: TemporalSettings, folder: Path) -> Settings:
    """What both the centre and the region are set up by."""
    eu = RegionSettings(
        keys=(KeySettings(id="eu1", file=Path("keys/eu1.key")),), current="eu1", tenants=("bound",)
    )
    tier = TierSettings(name="large", kind="llama_cpp", url="http://127.0.0.1:9", region="eu")
    site = SiteSettings(
        name="site",
        repository=Path("site.git"),
        build=Path("site"),
        address=f"http://127.0.0.1:{free_port()}",
        engine="plain",
    )
    return settings_for(
        temporal,
        folder / "centre",
        database=f"sqlite:///{folder / 'centre' / 'countersign.db'}",
        regions={"eu": eu},
        tiers=(tier,),
        sites=(site,),
        content=ContentSettings(min_words=10),
        probe=False,
    )


@asynccontextmanager
async def landed(temporal: TemporalSettings, folder: Path) -> AsyncGenerator[Land]:
    for name in ("centre", "eu"):
        (folder / name).mkdir()
    recorder = Recorder(temporal.address)
    settings = land_of(temporal, folder)
    async with recorder.listening():
        way = temporal.model_copy(update={"address": f"127.0.0.1:{recorder.port}"})
        there = settings.model_copy(update={"region": "eu", "data": folder / "eu", "temporal": way})
        async with stack_of(settings) as centre, stack_of(there, roles=()) as eu, process(there) as child:
            yield Land(centre, eu, recorder, child.pid, folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def land(temporal: TemporalSettings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Land]:
    """One for the tests to which it is no matter what else was told of there; its process starts slowly."""
    async with landed(temporal, tmp_path_factory.mktemp("land")) as made:
        yield made


@pytest.fixture
def temporal_alone(tmp_path: Path) -> Iterator[TemporalSettings]:
    (tmp_path / "temporal").mkdir()
    with serving(tmp_path / "temporal") as settings:
        yield settings


@pytest.fixture
async def new_land(temporal_alone: TemporalSettings, tmp_path: Path) -> AsyncIterator[Land]:
    """With a server of its own: two lands on one server would take each other's work."""
    async with landed(temporal_alone, tmp_path) as made:
        yield made


async def test_no_byte_of_a_region_bound_text_leaves_the_processes_of_its_region(
    new_land: Land, caplog: pytest.LogCaptureFixture
) -> None:
    land, temporal = new_land, new_land.folder / "temporal"
    written = await land.note()
    digest = await land.eu.digest(written)
    assert connections(land.pid) == {land.recorder.port}
    assert MARK in await written.handle.query("card")
    answered = await land.eu.answer(written, Kind.APPROVE, digest, comment=f"yes, {MARK}")
    assert answered.counted and (await written.handle.result()).status is Status.EXECUTED

    published = await land.article("at")
    first = await land.eu.digest(published)
    await land.eu.answer(published, Kind.REVISE, first, comment=f"mention {UMLAUT}")
    await land.eu.answer(published, Kind.APPROVE, await land.eu.digest(published, 2))
    outcome = await published.handle.result()
    assert outcome.status is Status.EXECUTED
    assert outcome.receipts[0].links[0].endswith(f"/posts/at-{MARK}/")
    assert MARK in (await page(land.eu, f"at-{MARK}")).text

    refused = await land.start("content", BRIEF.replace("target: site", f"target: {MARK}"))
    with pytest.raises(WorkflowFailureError) as failed:
        await refused.handle.result()
    assert MARK in str(failed.value.cause)

    # The same search, of a text that is the centre's and went the same way.
    client = await connect(land.eu.settings.temporal)
    body = json.dumps({"title": CONTROL, "actions": [note(CONTROL)]})
    loose = await submit(client, Request(agent="external", key=a_key(), body=body), land.eu.settings.temporal)
    await land.centre.approve(loose)
    await loose.handle.result()
    seen = land.outside(CONTROL, temporal)
    assert any(name.startswith("message") for name in seen)
    assert any(name.startswith("countersign.db") for name in seen)
    assert any(name.startswith("temporal.db") for name in seen)

    assert land.outside(MARK, temporal) + land.outside(UMLAUT, temporal) == []
    log = (land.folder / "eu" / "log").read_bytes()
    assert not any(stands(word, text) for word in (MARK, UMLAUT) for text in (log, caplog.text.encode()))
    await what_the_centre_has(land, written, digest)
    await what_the_centre_has(land, published, first)


async def what_the_centre_has(land: Land, run: Started, digest: str) -> None:
    """Names and sizes, and a ledger that says by digests what was done; the texts are in the region."""
    intent = Ref(digest=digest, size=0)
    assert MARK.encode() in await land.eu.content.get("default", intent)
    with pytest.raises(RegionBound, match="bound to region 'eu'.*serves the centre.*region = \"eu\""):
        await ContentStore(land.centre.database).get("default", intent)
    events = await land.centre.events(run)
    [asked] = [event for event in events if event.type is EventType.REQUEST]
    [ended] = [event for event in events if event.type is EventType.OUTCOME]
    assert ended.body["status"] == "executed"
    named = held_by_regions(land.folder / "centre" / "countersign.db")
    assert {digest, asked.body["body"]["digest"]} <= named.keys()
    assert set(named.values()) == {"eu"}
    words = [link for receipt in ended.body["receipts"] for link in receipt["links"]]
    assert all(word.removeprefix("sha256:") in named for word in words)


def held_by_regions(database: Path) -> dict[str, str]:
    with sqlite3.connect(database) as link:
        rows = dict(link.execute("SELECT digest, region FROM regional_content").fetchall())
    link.close()
    return rows


def remembered(database: Path) -> int:
    with sqlite3.connect(database) as link:
        [count] = link.execute("SELECT count(*) FROM memory").fetchone()
    link.close()
    return int(count)


@ON_LAND
async def test_what_is_remembered_of_a_region_is_recalled_there_and_nowhere_else(land: Land) -> None:
    before = remembered(land.folder / "eu" / "region-eu.db")
    published = await land.article("behind")
    await land.eu.approve(published)
    assert (await published.handle.result()).status is Status.EXECUTED
    assert remembered(land.folder / "eu" / "region-eu.db") == before + 1
    assert remembered(land.folder / "centre" / "countersign.db") == 0
    again = await land.article("behind")
    outcome = await again.handle.result()
    assert outcome.status is Status.CANCELLED and "stands at" in outcome.reason


@ON_LAND
async def test_the_centre_sees_that_a_run_waits_and_the_region_what_it_is_about(land: Land) -> None:
    run = await land.note()
    digest = await land.eu.digest(run)

    async def listed(place: Stack) -> dict[str, Any]:
        """The run's row, once Temporal's own list has it."""
        session = Session(place.settings, place.database)
        async with asyncio.timeout(LIMIT * 2):
            while True:
                rows = await waiting(place.client, session.runs, session.tenant)
                if found := [row for row in rows if row["workflow_id"] == run.workflow_id]:
                    return found[0]
                await asyncio.sleep(0.05)

    seen = await listed(land.centre)
    assert (seen["agent"], seen["title"], seen["digest"]) == ("external", "", "")
    known = await listed(land.eu)
    assert (known["title"], known["digest"]) == (MARK, digest)
    await run.handle.terminate()


@ON_LAND
async def test_a_request_that_comes_to_the_wrong_place_is_refused_before_anything_is_kept(land: Land) -> None:
    async def refusal(queue: str, request: Request) -> str:
        # Workers open what comes in clear; what they answer is sealed by the keys of their own place.
        client = land.centre.client
        handle = await client.start_workflow("external", request, id=a_key(), task_queue=queue)
        if queue != Queue.DECIDE:
            handle = land.eu.client.get_workflow_handle(handle.id)
        with pytest.raises(WorkflowFailureError) as failed:
            await handle.result()
        return str(failed.value.cause)

    def asking(**more: Any) -> Request:
        return Request(**({"agent": "external", "key": a_key(), "body": "some text"} | more))

    assert "start it on the queue decide-eu" in await refusal(Queue.DECIDE, asking(region="eu"))
    assert "is not served here, which is region eu" in await refusal("decide-eu", asking())
    assert "store it in region eu first" in await refusal("decide-eu", asking(region="eu"))
    assert 'is bound to "eu", so write that' in await refusal(Queue.DECIDE, asking(tenant="bound"))
    with pytest.raises(InvalidInput, match="store it in region eu first and send its reference"):
        await submit(land.eu.client, asking(region="eu"), land.eu.settings.temporal)


@pytest.mark.parametrize(
    "data",
    [
        f"a {MARK} b".encode(),
        json.dumps(f"a {UMLAUT} b").encode(),
        base64.b64encode(f"xy{MARK}z".encode()),
        base64.b64encode(f"x{MARK} is".encode()),
        base64.b64encode(json.dumps([UMLAUT]).encode()),
        b"abc" + gzip.compress(f"a {MARK} b".encode(), mtime=0) + b"def",
        b"abc" + zlib.compress(f"a {UMLAUT} b".encode()),
        MARK.encode().hex().encode(),
        UMLAUT.encode("utf-16-le"),
    ],
)
def test_the_search_finds_a_word_however_it_is_written(data: bytes) -> None:
    assert stands(MARK, data) or stands(UMLAUT, data)
    assert not stands(CONTROL, data)
