"""An erasure that is stopped at any of its steps is ended by asking again, and leaves nothing then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection

from activities.services.content import guard
from activities.services.database import Database
from activities.services.erasure import Erasure
from activities.services.vault import load_keys
from activities.services.verifier import check_database
from models.errors import UnknownName
from tests.test_forgetting import ANN, MARK, NOW, TENANT, Place, hits

T = TypeVar("T")


class Stopped(Exception):
    """Nothing more happens in this attempt."""


class Steps:
    """Counts steps, and stops an attempt at one of them."""

    def __init__(self, last: int) -> None:
        self.left = last

    def step(self) -> None:
        if self.left == 0:
            raise Stopped
        self.left -= 1


class Fragile(Database):
    """Stops before a transaction, inside it, or after its commit."""

    steps: Steps

    async def write(self, work: Callable[[Connection], T]) -> T:
        def inside(connection: Connection) -> T:
            result = work(connection)
            self.steps.step()
            return result

        result = await super().write(inside)
        self.steps.step()
        return result

    async def read(self, work: Callable[[Connection], T]) -> T:
        result = await super().read(work)
        self.steps.step()
        return result


class Index:
    """An index outside SQL, in which each record stands until it is removed."""

    def __init__(self, steps: Steps, there: set[str]) -> None:
        self.steps, self.there = steps, there

    async def delete(self, tenant: str, model: str, record_ids: Any) -> None:
        self.steps.step()
        self.there -= set(record_ids)
        self.steps.step()

    async def held(self, tenant: str, model: str, record_ids: Any) -> int:
        self.steps.step()
        return len(self.there & set(record_ids))


async def stopped_and_ended(folder: Path, sealed: bool, last: int) -> bool:
    """Whether it was stopped; it is ended then by another attempt, which starts from what stands."""
    folder.mkdir()
    place = Place(folder, sealed)
    for fill in (place.remember, place.log, place.answer, place.notify):
        await fill()
    rows = await place.database.read(
        lambda link: link.exec_driver_sql("SELECT record_id FROM memory WHERE subject != 'bob'").all()
    )
    there = {row.record_id for row in rows}

    async def attempt(steps: Steps) -> None:
        database = Fragile(place.settings.database_url)
        database.steps = steps
        guard(database, load_keys(place.settings.encryption, folder))
        notices = folder / "notices"
        try:
            await Erasure(database, lambda: NOW, Index(steps, there), notices=notices).forget(
                TENANT, ANN, by="dpo"
            )
        finally:
            await asyncio.to_thread(database.close)

    try:
        await attempt(Steps(last))
    except Stopped:
        stopped = True
    else:
        stopped = False
    with suppress(UnknownName):  # Where it had been ended, nothing is known any more.
        await attempt(Steps(10_000))
    place.short.drop(TENANT, ANN)
    assert {name: hits(MARK, data) for name, data in place.files().items() if hits(MARK, data)} == {}
    await place.checkpoints.write(TENANT)
    key = place.checkpoints.key(TENANT)
    report = await place.database.read(lambda link: check_database(link, TENANT, key.name, [key], []))
    assert report.exit_code == 0, report
    kinds = [row.type for row in await place.database.read(_erasures)]
    assert kinds[-1] == "erasure", kinds
    place.database.close()
    return stopped


def _erasures(link: Connection) -> Any:
    query = "SELECT type FROM event WHERE stream LIKE 'erasure/%' ORDER BY seq"
    return link.exec_driver_sql(query).all()


@pytest.mark.parametrize("sealed", [False, True], ids=["clear", "sealed"])
async def test_an_erasure_stopped_at_any_step_is_ended_by_another_and_leaves_nothing(
    tmp_path: Path, sealed: bool
) -> None:
    last = 0
    while await stopped_and_ended(tmp_path / str(last), sealed, last):
        last += 1
    assert last > 10
