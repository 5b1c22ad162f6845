from __future__ import annotations

import asyncio

import pytest

from activities.tiers.coalesced import Coalesced
from models.errors import InvalidInput, MemoryUnavailable
from models.inference import DataClass


class Server:
    """Counts requests; holds each until it is let go."""

    model = "m"
    sees = frozenset(DataClass)

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    async def embed(self, texts):
        self.requests.append(list(texts))
        self.reached.set()
        await self.go_on.wait()
        if "away" in texts:
            raise MemoryUnavailable("away")
        if "refused" in texts:
            raise InvalidInput.field("text", "refused", "shorten it")
        return [[float(len(text))] for text in texts]


async def test_a_text_that_comes_alone_goes_out_at_once():
    server = Server()
    server.go_on.set()
    assert await Coalesced(server, pause=3600).embed(["a", "bb"]) == [[1.0], [2.0]]
    assert server.requests == [["a", "bb"]]


async def gathered(server: Server, embedder: Coalesced, *texts: str) -> list[object]:
    """Calls that come while the first one is under way."""
    first = asyncio.create_task(embedder.embed(["first"]))
    await server.reached.wait()
    rest = [asyncio.create_task(embedder.embed([text])) for text in texts]
    await asyncio.sleep(0)
    server.go_on.set()
    await first
    return await asyncio.gather(*rest, return_exceptions=True)


async def test_those_that_come_meanwhile_share_a_request_and_each_gets_its_own():
    server = Server()
    found = await gathered(server, Coalesced(server, pause=0), "a", "bb", "ccc")
    assert found == [[[1.0]], [[2.0]], [[3.0]]]
    assert server.requests == [["first"], ["a", "bb", "ccc"]]


async def test_a_full_request_does_not_wait():
    server = Server()
    found = await gathered(server, Coalesced(server, most=2, pause=3600), "a", "bb", "ccc", "dddd")
    assert found == [[[1.0]], [[2.0]], [[3.0]], [[4.0]]]
    assert server.requests == [["first"], ["a", "bb"], ["ccc", "dddd"]]


async def test_a_text_that_is_refused_takes_no_other_with_it():
    server = Server()
    found = await gathered(server, Coalesced(server, pause=0), "a", "refused", "bb")
    assert [type(one) for one in found] == [list, InvalidInput, list]


async def test_a_server_that_is_away_is_asked_once_for_all():
    server = Server()
    found = await gathered(server, Coalesced(server, pause=0), "a", "away", "bb")
    assert {type(one) for one in found} == {MemoryUnavailable}
    assert len(server.requests) == 2


async def test_who_gives_up_leaves_the_others_their_vectors():
    server = Server()
    embedder = Coalesced(server, most=2, pause=3600)
    first = asyncio.create_task(embedder.embed(["first"]))
    await server.reached.wait()
    leaving, staying = (asyncio.create_task(embedder.embed([text])) for text in ("a", "bb"))
    await asyncio.sleep(0)
    leaving.cancel()
    server.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert await staying == [[2.0]]
    assert await first == [[5.0]]
