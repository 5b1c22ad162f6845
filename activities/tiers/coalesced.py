"""Texts that are to be embedded at the same time go to the server in one request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from activities.tiers.base import Embedder
from models.errors import InvalidInput
from models.inference import DataClass

MOST, PAUSE = 32, 0.005
"""Texts in one request, and seconds that a text waits for others while one is under way."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    texts: Sequence[str]
    vectors: asyncio.Future[list[list[float]]]


class Coalesced:
    """An embedder whose callers share requests; whoever comes alone waits for nobody.

    A server computes a batch hardly slower than one text. While no request is under way, a call goes out at
    once; those that come meanwhile gather until there are `most` texts or the first waited `pause` seconds.
    """

    def __init__(self, inner: Embedder, most: int = MOST, pause: float = PAUSE) -> None:
        """Share the requests to `inner`."""
        self._inner = inner
        self._most = most
        self._pause = pause
        self._waiting: list[_Waiting] = []
        self._timer: asyncio.TimerHandle | None = None
        self._under_way = set[asyncio.Task[None]]()

    @property
    def model(self) -> str:
        """Identity of model and revision."""
        return self._inner.model

    @property
    def sees(self) -> frozenset[DataClass]:
        """The data classes that it may be shown."""
        return self._inner.sees

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One unit vector per text, in order.

        Raises:
            MemoryUnavailable: the server is away.
            InvalidInput: it refuses one of these texts; what others asked for does not matter.
        """
        loop = asyncio.get_running_loop()
        mine = _Waiting(texts, loop.create_future())
        self._waiting.append(mine)
        if not self._under_way or sum(len(one.texts) for one in self._waiting) >= self._most:
            self._send()
        elif self._timer is None:
            self._timer = loop.call_later(self._pause, self._send)
        return await mine.vectors

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        some, self._waiting = self._waiting, []
        task = asyncio.get_running_loop().create_task(self._ask(some))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _ask(self, some: Sequence[_Waiting]) -> None:
        try:
            vectors = await self._inner.embed([text for one in some for text in one.texts])
        except InvalidInput as error:
            if len(some) == 1:
                _fail(some, error)
            for one in some if len(some) > 1 else ():
                # One text that is refused must not take the others with it.
                await self._ask([one])
        except Exception as error:
            _fail(some, error)
        except asyncio.CancelledError:
            for one in some:
                one.vectors.cancel()
            raise
        else:
            _share(some, vectors)


def _share(some: Sequence[_Waiting], vectors: list[list[float]]) -> None:
    start = 0
    for one in some:
        end = start + len(one.texts)
        if not one.vectors.done():
            one.vectors.set_result(vectors[start:end])
        start = end


def _fail(some: Sequence[_Waiting], error: Exception) -> None:
    for one in some:
        if not one.vectors.done():
            one.vectors.set_exception(error)
