"""Work of one kind that waits at the same time is done in one go, be it writes or reads.

Callers that wait at the same time have no order among themselves, so the kinds may change places in a batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection

from activities.services.database import Database, Shared

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Wanted:
    many: Callable[[Connection, Sequence[Any]], Sequence[Any]]
    item: Any


def together(many: Callable[[Connection, Sequence[K]], Sequence[T]], item: K) -> Callable[[Connection], T]:
    """Work for `Database.write` that is done with all others of its kind in the batch."""
    shared: Shared[_Wanted, T] = Shared(_by_kind, _Wanted(many, item))
    return shared


def _by_kind(link: Connection, wanted: Sequence[_Wanted]) -> list[Any]:
    kinds = dict[Any, list[int]]()
    for place, one in enumerate(wanted):
        kinds.setdefault(one.many, []).append(place)
    results = dict[int, Any]()
    for many, places in kinds.items():
        made = many(link, [wanted[place].item for place in places])
        results |= zip(places, made, strict=True)
    return [results[place] for place in range(len(wanted))]


@dataclass(slots=True)
class _Gathering(Generic[K, T]):
    """What waits in one event loop."""

    loop: asyncio.AbstractEventLoop
    waiting: list[tuple[K, asyncio.Future[T]]] = field(default_factory=list[Any])
    reader: asyncio.Task[None] | None = None


class Reading(Generic[K, T]):
    """Reads by key: while one is under way, those that come meanwhile gather for the next."""

    def __init__(self, database: Database, one: Callable[[Connection, K], T]) -> None:
        """`one` reads one thing, or raises."""
        self._database = database
        self._one = one
        self._gathering: _Gathering[K, T] | None = None

    async def get(self, key: K) -> T:
        """Read it; raises what reading it raised."""
        loop = asyncio.get_running_loop()
        here = self._gathering
        if here is None or here.loop is not loop:
            here = self._gathering = _Gathering(loop)
        future: asyncio.Future[T] = loop.create_future()
        here.waiting.append((key, future))
        if here.reader is None or here.reader.done():
            here.reader = loop.create_task(self._read(here))
        return await future

    async def _read(self, here: _Gathering[K, T]) -> None:
        while here.waiting:
            some, here.waiting = here.waiting, []
            keys = [key for key, _ in some]
            try:
                found = await self._database.read(lambda link, keys=keys: self._all(link, keys))
            except Exception as error:
                found = [error] * len(keys)
            for (_, future), one in zip(some, found, strict=True):
                _settle(future, one)

    def _all(self, link: Connection, keys: Sequence[K]) -> list[T | Exception]:
        return [self._tried(link, key) for key in keys]

    def _tried(self, link: Connection, key: K) -> T | Exception:
        try:
            return self._one(link, key)
        except Exception as error:
            return error


def _settle(future: asyncio.Future[T], found: T | Exception) -> None:
    if future.done():
        return
    if isinstance(found, Exception):
        future.set_exception(found)
    else:
        future.set_result(found)
