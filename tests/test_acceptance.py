"""A tier without a pin is held to the model that answered, whatever process is started since."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from activities.services.acceptance import accepted_by_use
from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.probe import probe
from activities.services.router import Answerer
from activities.services.till import Till
from activities.tiers.kinds import chat_endpoint
from activities.tiers.wire import ChatEndpoint, http_client
from models.errors import IdentityChanged
from models.inference import Answered, Call, attempt_of
from models.settings import TierSettings
from tests.databases import migrated
from tests.test_faults import JUDGE, Faulty, good


class Restarts:
    """One database and one server; every use is a process that has just started."""

    def __init__(self, url: str, server: Faulty) -> None:
        self.url = url
        self.server = server

    @asynccontextmanager
    async def process(self, model: str = "") -> AsyncIterator[tuple[Database, ChatEndpoint]]:
        settings = TierSettings(name="edge", kind="llama_cpp", url=self.server.url, model=model)
        async with AsyncExitStack() as stack:
            database = Database(self.url)
            stack.callback(database.close)
            client = await stack.enter_async_context(http_client(settings))
            yield database, chat_endpoint(settings, client, accepted_by_use(database, "edge"))

    async def ask(self, model: str = "") -> Answered:
        async with self.process(model) as (database, endpoint):
            till = Till(database, lambda: datetime.now(UTC))
            tasks, tiers = {"judge": JUDGE}, [endpoint.settings]
            answerer = Answerer(tiers, {"edge": endpoint}, tasks, ContentStore(database), till=till)
            return await answerer.answer("default", Call(task="judge"), "edge")


@pytest.fixture
async def restarts(tmp_path: Path) -> AsyncIterator[Restarts]:
    url = migrated(f"sqlite:///{tmp_path / 'calls.db'}")
    async with Faulty(good) as server:
        yield Restarts(url, server)


async def test_another_model_is_held_also_by_a_process_that_never_saw_the_first_one(
    restarts: Restarts,
) -> None:
    assert (await restarts.ask()).model == "a-model"
    restarts.server.names = ["another"]
    for _ in range(2):
        with pytest.raises(IdentityChanged, match="'another', not 'a-model'.*settings") as caught:
            await restarts.ask()
        attempt = attempt_of(caught.value)
        assert attempt is not None and (attempt.held, attempt.model) == (True, "another")
    assert restarts.server.chats == 1
    async with restarts.process() as (_, endpoint):
        found = await probe(endpoint, 30)
    assert (found.held, found.model) == (True, "another")
    assert restarts.server.chats == 1


async def test_what_a_person_accepts_in_the_settings_is_what_it_is_held_to_from_then_on(
    restarts: Restarts,
) -> None:
    await restarts.ask()
    restarts.server.names = ["another"]
    assert (await restarts.ask(model="another")).model == "another"
    assert (await restarts.ask()).model == "another"
    restarts.server.names = ["a-model"]
    with pytest.raises(IdentityChanged, match="'a-model', not 'another'"):
        await restarts.ask()


async def test_a_model_that_never_answered_binds_nobody(restarts: Restarts) -> None:
    async with restarts.process() as (database, endpoint):
        assert await endpoint.identity() == "a-model"
        assert await accepted_by_use(database, "edge")() is None
    restarts.server.names = ["another"]
    assert (await restarts.ask()).model == "another"
