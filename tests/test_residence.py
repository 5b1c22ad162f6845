"""Content of a region: where its bytes are, who may read them, and what records say at the centre."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import Connection

from activities.services.content import ContentStore, put_here
from activities.services.database import Database
from activities.services.regions import Home, bind
from activities.services.residence import stores, withheld
from models.canonical import sha256
from models.errors import InvalidInput, RegionBound
from models.settings import EncryptionSettings, KeySettings, RegionSettings, Settings
from scripts.commands.start import request_of
from tests.databases import migrated
from tests.shared import LIMIT

TEXT = b"what the quokka said"
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def region(name: str, **more: Any) -> RegionSettings:
    return RegionSettings(
        keys=(KeySettings(id=f"{name}1", file=Path(f"keys/{name}1.key")),), current=f"{name}1", **more
    )


class Places:
    """The centre and two regions, each with a database of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        centre = f"sqlite:///{folder / 'centre.db'}"
        self.settings = Settings(
            data=folder,
            database=centre,
            regions={
                name: region(name, database=f"sqlite:///{folder / name}.db", tenants=(f"of-{name}",))
                for name in ("eu", "us")
            },
        )
        migrated(centre)
        for name in ("eu", "us"):
            migrated(self.at(name).region_url or "")
        self.centre, self.eu, self.us = (
            stack.enter_context(stores(self.at(name))) for name in (None, "eu", "us")
        )

    def at(self, name: str | None) -> Settings:
        return self.settings.model_copy(update={"region": name})


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    with ExitStack() as stack:
        yield Places(tmp_path, stack)


def bytes_of(folder: Path, name: str) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob(f"{name}.db*"))


async def test_what_a_region_stores_is_read_by_the_region_and_by_nobody_else(
    places: Places, tmp_path: Path
) -> None:
    ref = await ContentStore(places.eu).put("t", TEXT)
    assert ref.digest == sha256(TEXT) and ref.size == len(TEXT)
    assert await ContentStore(places.eu).get("t", ref) == TEXT
    for other, here in ((places.centre, "the centre"), (places.us, "region us")):
        with pytest.raises(RegionBound, match=f"'eu'.*{here}.*region = \"eu\""):
            await ContentStore(other).get("t", ref)
    assert ref.digest.encode() in bytes_of(tmp_path, "centre")
    assert TEXT not in bytes_of(tmp_path, "centre") + bytes_of(tmp_path, "eu")
    with pytest.raises(InvalidInput, match="no such content"):
        await ContentStore(places.centre).get("another", ref)


async def test_the_same_text_at_the_centre_and_in_a_region_is_two_contents(places: Places) -> None:
    ref = await ContentStore(places.eu).put("t", TEXT)
    assert await ContentStore(places.centre).put("t", TEXT) == ref
    assert await ContentStore(places.centre).get("t", ref) == TEXT
    assert await ContentStore(places.us).put("t", TEXT) == ref
    assert await ContentStore(places.us).get("t", ref) == TEXT


async def test_what_speaks_of_no_request_may_stand_at_the_centre_and_is_read_everywhere(
    places: Places,
) -> None:
    ref = await places.eu.write(lambda link: put_here(link, "t", b"a policy", "text/plain"))
    assert await ContentStore(places.centre).get("t", ref) == b"a policy"
    assert await ContentStore(places.us).get("t", ref) == b"a policy"


async def test_a_transaction_that_fails_at_the_centre_names_nothing_there(places: Places) -> None:
    def work(link: Any) -> None:
        put_here(link, "t", b"beside", "text/plain")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await places.eu.write(work)
    ref = await ContentStore(places.us).put("t", TEXT)
    with pytest.raises(RegionBound, match="'us'"):
        await ContentStore(places.eu).get("t", ref)


async def test_words_of_a_record_stay_in_the_region_and_are_named_at_the_centre(places: Places) -> None:
    body = {
        "digest": "0" * 64,
        "reason": "target 'quokka' changed",
        "receipts": [{"reference": "c0ffee", "links": ["https://x/quokka"], "detail": ""}],
        "route": {"tiers": ["edge"]},
    }
    told = await places.eu.write(lambda link: withheld(link, "t", body))
    assert "quokka" not in str(told)
    assert told["reason"] == f"sha256:{sha256(body['reason'].encode())}"
    assert told["receipts"][0]["detail"] == "" and told["route"] == body["route"]
    assert await places.eu.write(lambda link: withheld(link, "t", told)) == told
    assert await places.centre.write(lambda link: withheld(link, "t", body)) == body


def test_a_region_seals_always_and_by_keys_that_the_centre_has_not(places: Places) -> None:
    assert not places.settings.sealing.enabled
    sealing = places.at("eu").sealing
    assert sealing.enabled and sealing.current == "eu1"
    shared = EncryptionSettings(enabled=True, keys=region("eu").keys, current="eu1")
    with pytest.raises(ValidationError, match="eu seals under a key of the centre's"):
        Settings(encryption=shared, regions={"eu": region("eu")})
    with pytest.raises(ValidationError, match="eu names the centre's database"):
        Settings(database="sqlite:///one.db", regions={"eu": region("eu", database="sqlite:///one.db")})


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"tenants": ("acme",)}, "two regions name the same tenant acme"),
        ({"database": "postgresql+psycopg://me:secret@db/one"}, "two regions name the same database;"),
        ({"keys": region("eu").keys, "current": "eu1"}, "two regions name the same key keys/eu1.key"),
    ],
)
def test_two_regions_share_no_tenant_no_database_and_no_key(own: dict[str, Any], said: str) -> None:
    both = {name: region(name).model_copy(update=own) for name in ("eu", "us")}
    with pytest.raises(ValidationError, match=said):
        Settings(regions=both)


def test_a_command_keeps_nothing_of_a_request_that_is_another_places(places: Places) -> None:
    def asked(name: str | None, tenant: str) -> str | None:
        settings = places.at(name).model_copy(update={"tenant": tenant})
        return request_of(settings, "external", b"{}").region

    assert (asked("eu", "of-eu"), asked("eu", "default"), asked(None, "default")) == ("eu", "eu", None)
    for name, tenant in ((None, "of-eu"), ("us", "of-eu")):
        with pytest.raises(InvalidInput, match='every request of of-eu is bound to "eu"'):
            asked(name, tenant)


def test_a_region_that_nobody_set_up_is_refused() -> None:
    with pytest.raises(ValidationError, match="there is no such region"):
        Settings(region="mars")
    with pytest.raises(ValidationError, match="not the id of one of this region's keys"):
        RegionSettings(keys=region("eu").keys, current="k9")


def test_a_tenant_may_be_bound_as_a_whole(places: Places) -> None:
    assert places.settings.home("of-us") == "us"
    assert places.settings.home("default") is None


def test_a_database_that_serves_no_region_is_as_it_was(places: Places) -> None:
    assert isinstance(places.centre, Database)
    assert places.settings.region_url is None


async def test_a_region_whose_database_has_fallen_silent_keeps_nobody_else_from_writing(
    places: Places,
) -> None:
    asked, answers = threading.Event(), threading.Event()

    class Silent(Database):
        def read_now(self, work: Callable[[Connection], Any]) -> Any:
            asked.set()
            assert answers.wait(LIMIT)
            return super().read_now(work)

    own = Silent(places.at("eu").region_url or "")
    there = bind(Database(places.settings.database_url), Home("eu", own))
    began = list[Connection]()
    writing = asyncio.create_task(there.write(began.append))
    assert await asyncio.to_thread(asked.wait, LIMIT)
    assert await places.centre.write(lambda link: len(began)) == 0
    answers.set()
    await writing
    assert len(began) == 1
    for database in (there, own):
        await asyncio.to_thread(database.close)
