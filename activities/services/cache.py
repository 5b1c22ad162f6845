"""The exact cache: one answer for identical calls of one tenant, and one call for those that come together.

An entry's key covers everything the answer depends on and everything that limits who may see it. SQL holds
the truth; a process keeps what it used lately and asks again after a second, so that a retraction is heard
everywhere by then. Nothing here is similar to anything: texts are the same to the byte, or they differ. What
`services.similar` keeps beside an answer goes with it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, bindparam, delete, exists, select

from activities.services.database import Database, from_micros, insert_for, to_micros
from activities.services.discreet import seal_text, text_reader
from activities.services.statements import Statement
from models.canonical import sha256
from models.errors import DeadlineMissed
from models.inference import Answered, DataClass, Prompt
from models.tables import CacheRow, SimilarRow, table

CACHE, SIMILAR = table(CacheRow), table(SimilarRow)
FRESH = timedelta(seconds=1)
"""How long a process believes what it read."""
MOST = 4096
"""Entries a process keeps."""

_ENTRY = Statement(
    select(CACHE.c.answered, CACHE.c.expires_at).where(
        CACHE.c.tenant == bindparam("of"), CACHE.c.key == bindparam("named")
    )
)

Key = tuple[str, str]
"""Tenant and digest."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What an answer depends on besides the prompt; a call outside it never sees the answer."""

    tenant: str
    data_class: DataClass
    region: str | None
    policy: str
    """Digest of the policy; another policy starts with an empty cache."""
    tier: str
    model: str
    """Identity of the model that answered."""
    task: str
    subject: str | None = None
    """Whom the call is about; an answer that goes with one subject must not be another's."""


@dataclass(frozen=True, slots=True)
class _Kept:
    answered: Answered | None
    expires: datetime
    read: datetime


@dataclass(slots=True)
class _Flight:
    task: asyncio.Future[Answered]
    waiting: int = 0

    async def wait(self) -> Answered:
        self.waiting += 1
        try:
            return await asyncio.shield(self.task)
        finally:
            self.waiting -= 1


class Cache:
    """Answers by key, for every process on one database."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        """The clock ends entries."""
        self._database = database
        self._clock = clock
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._flights: dict[Key, _Flight] = {}

    async def get(self, key: Key) -> Answered | None:
        """The answer, marked as cached, unless it expired, was retracted, or never was."""
        now = self._clock()
        kept = self._kept.get(key)
        # Neither is believed what was read in a time to come, by a clock that was set back since.
        if kept is None or not timedelta(0) <= now - kept.read < FRESH:
            kept = await self._database.read(lambda link: _read(link, key, now))
            self._keep(key, kept)
        return kept.answered if kept.expires > now else None

    async def once(self, key: Key, make: Callable[[], Awaitable[Answered]]) -> Answered:
        """Make an answer, or wait for the identical call that is making it.

        A caller that gives up leaves the others alone; when all have given up the call is cancelled.
        """
        while True:
            flight = self._flights.get(key)
            first = flight is None or flight.task.done()
            if flight is None or first:
                flight = self._flights[key] = _Flight(asyncio.ensure_future(_awaited(make)))
            try:
                answered = await flight.wait()
            except DeadlineMissed:
                # It was made in the time that its first caller had; the others may have more.
                if first:
                    raise
            else:
                return answered if first else answered.model_copy(update={"cached": True})
            finally:
                await self._leave(key, flight)

    async def _leave(self, key: Key, flight: _Flight) -> None:
        if flight.waiting:
            return
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.task.done():
            flight.task.cancel()
            # What it took is on the books before anybody gives its money back.
            await asyncio.wait([flight.task])

    async def retract(self, tenant: str, digest: str | None = None, task: str | None = None) -> int:
        """Take back one answer, all of a task, or all of a tenant; heard everywhere within a second."""
        wanted = CACHE.c.tenant == tenant
        if digest is not None:
            wanted &= CACHE.c.key == digest
        if task is not None:
            wanted &= CACHE.c.task == task

        def work(link: Connection) -> int:
            gone = link.execute(delete(CACHE).where(wanted)).rowcount
            leave_in(link)
            return gone

        gone = await self._database.write(work)
        self._kept.clear()
        return gone

    def _keep(self, key: Key, kept: _Kept) -> None:
        if kept.answered is None:
            # What is not there may come any moment, from any process.
            self._kept.pop(key, None)
            return
        self._kept[key] = kept
        self._kept.move_to_end(key)
        while len(self._kept) > MOST:
            self._kept.popitem(last=False)


def key_of(scope: Scope, prompt: Prompt) -> Key:
    """Name what identical calls share: scope, messages, schema and sampling."""
    parts = [
        *(scope.data_class, scope.region or "", scope.policy, scope.tier, scope.model, scope.task),
        *(() if scope.subject is None else (scope.subject,)),
        prompt.model_dump_json(),
    ]
    # Lengths first, so that no two lists of parts read the same.
    return scope.tenant, sha256("".join(f"{len(part)}:{part}" for part in parts).encode())


def put_in(link: Connection, key: Key, answered: Answered, task: str, until: datetime) -> None:
    """Keep an answer, in the transaction that stores its text."""
    tenant, digest = key
    values = {
        "task": task,
        "model": answered.model,
        # What it was objected to for may quote the text.
        "answered": seal_text(link, tenant, answered.model_dump_json()),
        "expires_at": to_micros(until),
    }
    insert = insert_for(link.dialect.name)
    made = insert(CACHE).values(tenant=tenant, key=digest, **values)
    link.execute(made.on_conflict_do_update(index_elements=["tenant", "key"], set_=values))


def drop_in(link: Connection, tenant: str, texts: Collection[str]) -> int:
    """Delete the answers whose text is one of these, and where these lie; returns how many answers.

    A subject's derived name stands for all texts of calls about it.
    """
    gone, read = set(texts), text_reader(link, tenant)
    rows = link.execute(select(CACHE.c.key, CACHE.c.answered).where(CACHE.c.tenant == tenant)) if gone else ()
    keys = [row.key for row in rows if Answered.model_validate_json(read(row.answered)).text.digest in gone]
    for key in keys:
        link.execute(delete(CACHE).where(CACHE.c.tenant == tenant, CACHE.c.key == key))
    for key in _lying(link, tenant, gone):
        link.execute(delete(SIMILAR).where(SIMILAR.c.tenant == tenant, SIMILAR.c.key == key))
    leave_in(link)
    return len(keys)


def lying_in(link: Connection, tenant: str, texts: Collection[str]) -> int:
    """How many of these texts' places are still kept."""
    return len(_lying(link, tenant, set(texts)))


def _lying(link: Connection, tenant: str, texts: set[str]) -> list[str]:
    query = select(SIMILAR.c.key, SIMILAR.c.inputs).where(SIMILAR.c.tenant == tenant)
    return [row.key for row in link.execute(query) if not texts.isdisjoint(row.inputs.split())]


def leave_in(link: Connection) -> None:
    """Delete where the texts of calls lie whose answers are gone."""
    answer = exists().where(CACHE.c.tenant == SIMILAR.c.tenant, CACHE.c.key == SIMILAR.c.key)
    link.execute(delete(SIMILAR).where(~answer))


def sweep_in(link: Connection, now: datetime) -> int:
    """Delete what expired; returns how many."""
    gone = link.execute(delete(CACHE).where(CACHE.c.expires_at <= to_micros(now))).rowcount
    leave_in(link)
    return gone


def _read(link: Connection, key: Key, now: datetime) -> _Kept:
    tenant, digest = key
    rows = _ENTRY.rows(link, {"of": tenant, "named": digest})
    if not rows:
        return _Kept(None, now, now)
    answered = Answered.model_validate_json(text_reader(link, tenant)(rows[0][0]))
    return _Kept(answered.model_copy(update={"cached": True}), from_micros(rows[0][1]), now)


async def _awaited(make: Callable[[], Awaitable[Answered]]) -> Answered:
    return await make()
