"""Gives a call what a similar one got, where its task, the settings and the comparisons so far permit it.

It asks all the same while too little was compared, and now and then after that: both answers are compared,
and that is the only evidence there is. Of a kept answer it knows where the call's texts lie, nothing else;
the answer itself stays in the cache, goes with it, and must pass the task's check for whom it is given to.
"""

from __future__ import annotations

import asyncio
import json
import logging
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy import Connection, func, select, update

from activities.services.cache import CACHE, SIMILAR, Cache, Scope, key_of
from activities.services.content import BLOB, ContentStore
from activities.services.database import Database, insert_for, to_micros
from activities.services.discreet import seal_text, text_reader
from activities.services.ledger_store import add_in
from activities.services.till import Try
from activities.tiers.base import Embedder
from models.canonical import derived_id, sha256, subject_id
from models.errors import CountersignError
from models.inference import OPEN, Answered, Likeness
from models.ledger import Draft, EventType, route_stream
from models.settings import AS_IT_IS, TaskSettings
from models.similar import (
    MOST_COMPARED,
    Evidence,
    Framed,
    Near,
    Tally,
    at_most,
    candidate,
    edge_of,
    explores,
    framed,
    gist_of,
    given_from,
)
from models.tables import SimilarTally, table

TALLY = table(SimilarTally)
MOST = 512
"""Entries that are looked at for one call; the newest count."""
PATIENCE, REST = 2.0, timedelta(seconds=30)
"""Seconds a call waits for its vectors, and how long an embedding server that is away is left alone."""
logger = logging.getLogger(__name__)

Make = Callable[[], Awaitable[Answered]]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the texts of a call lie, and among what."""

    scope: Scope
    framed: Framed
    params: Mapping[str, Any]
    embedder: str
    vectors: Sequence[Sequence[float]]

    def shape(self, model: str) -> str:
        """Names all that must be the same between similar calls."""
        scope = self.scope
        who = (scope.policy, scope.data_class, scope.region, scope.subject)
        return _named(self.line(model), *who, self.framed.guarded)

    def line(self, model: str) -> str:
        """Names what comparisons hold for: one question put to one model, whoever asks about whatever."""
        scope = self.scope
        asked = (scope.tier, model, scope.task, self.framed.frame)
        return _named(*asked, sorted(self.params.items()), self.embedder)


@dataclass(frozen=True, slots=True)
class _Offer:
    """An answer that could be given, and what is known of such."""

    near: Near
    answered: Answered
    evidence: Evidence

    def likeness(self, permitted: int) -> Likeness | None:
        """Why it may be given; `None` if it may not."""
        edge = given_from(self.evidence, permitted)
        if edge is None or self.near.similarity < edge:
            return None
        return Likeness(
            entry=self.near.key,
            similarity=self.near.similarity,
            wrong_permille=at_most(self.evidence, edge),
            permitted=permitted,
        )


class Similar:
    """Answers of similar calls, for every process on one database."""

    def __init__(
        self,
        database: Database,
        contents: ContentStore,
        cache: Cache,
        embedder: Embedder,
        wanted: Mapping[str, TaskSettings],
        clock: Callable[[], datetime],
    ) -> None:
        """Take where answers are kept and what says where texts lie."""
        self._database = database
        self._contents = contents
        self._cache = cache
        self._embedder = embedder
        self._wanted = wanted
        self._clock = clock
        self._resting: datetime | None = None

    async def answer(self, tried: Try, scope: Scope, make: Make) -> Answered:
        """What a similar call got, if that may be given; else what `make` makes, which is then compared."""
        permitted, route = self._permitted(tried, scope), tried.grant.similar
        place = None if permitted is None or route is None else await self._place(tried, scope)
        if permitted is None or route is None or place is None:
            return await make()
        offer = await self._offer(tried, place)
        why = None if offer is None else offer.likeness(permitted)
        if offer is not None and why is not None and not explores(route.route):
            return offer.answered.model_copy(update={"similar": why})
        answered = await make()
        await self._learn(tried, place, offer, answered)
        return answered

    async def record(self, tried: Try, answered: Answered) -> None:
        """Put on record with its route what a call was given, and why."""
        similar, route = answered.similar, tried.grant.similar
        if similar is None or route is None:
            return
        draft = Draft(
            event_id=derived_id("similar", tried.tenant, route.route, answered.tier),
            stream=route_stream(route.workflow_id),
            type=EventType.SIMILAR,
            actor_kind="system",
            actor_ref="router",
            correlation_id=route.workflow_id,
            body={
                "route": route.route,
                "task": tried.question.task.name,
                "tier": answered.tier,
                "model": answered.model,
                **similar.model_dump(mode="json"),
            },
        )
        now = self._clock()
        await self._database.write(lambda link: add_in(link, tried.tenant, draft, now))

    def _permitted(self, tried: Try, scope: Scope) -> int | None:
        # A region's texts, and what they look like, stay with the region; this database is everybody's.
        if scope.region is not None or scope.data_class not in self._embedder.sees.intersection(OPEN):
            return None
        if not tried.question.task.read_only or not scope.model:
            return None
        return self._wanted.get(scope.task, AS_IT_IS).similar_wrong_permille

    async def _place(self, tried: Try, scope: Scope) -> _Place | None:
        question, now = tried.question, self._clock()
        parts = framed(question.prompt, question.inputs)
        if parts is None or (self._resting is not None and now < self._resting):
            return None
        try:
            async with asyncio.timeout(PATIENCE):
                vectors = await self._embedder.embed(parts.texts)
        except (CountersignError, TimeoutError) as error:
            # Without vectors nothing is similar, and the tier is asked as ever.
            logger.warning("similar calls were not looked for (%s)", type(error).__name__)
            self._resting = now + REST
            return None
        return _Place(scope, parts, question.call.params, self._embedder.model, vectors)

    async def _offer(self, tried: Try, place: _Place) -> _Offer | None:
        """The answer of the nearest call, if it would do for this one."""
        tenant, now = tried.tenant, self._clock()
        found, evidence = await self._database.read(lambda link: _look(link, tenant, place, now))
        near = candidate(found)
        answered = None if near is None else await self._cache.get((tenant, near.key))
        if near is None or answered is None:
            return None
        try:
            text = await self._contents.text(tenant, answered.text)
        except CountersignError:
            # Erased since.
            return None
        question = tried.question
        fits = not question.task.check(text, question.inputs, question.call.params)
        return _Offer(near, answered, evidence) if fits else None

    async def _learn(self, tried: Try, place: _Place, offer: _Offer | None, answered: Answered) -> None:
        """Compare, and keep where this call's texts lie."""
        if answered.cached or answered.problems or answered.unsure:
            return
        tenant, question = tried.tenant, tried.question
        inputs = sorted({ref.digest for ref in question.call.inputs.values()})
        try:
            text = await self._contents.text(tenant, answered.text)
            gist = gist_of(text, question.task.gist)
            known = offer if answered.model == place.scope.model else None
            key = key_of(replace(place.scope, model=answered.model), question.prompt)[1]
            until = to_micros(self._clock() + timedelta(seconds=question.cache_seconds))

            def work(link: Connection) -> None:
                if known is not None:
                    _count(link, tenant, place.line(answered.model), known.near, gist)
                if _stand(link, tenant, key, inputs):
                    row = {"shape": place.shape(answered.model), "gist": gist, "expires_at": until}
                    _put(link, tenant, key, row | _texts(link, tenant, place, inputs))

            await self._database.write(work)
        except Exception as error:
            # The answer is made and paid for; a comparison that is missing only keeps others waiting.
            logger.warning("an answer was not compared (%s)", type(error).__name__)


def _named(*parts: Any) -> str:
    return sha256(json.dumps(parts, ensure_ascii=False).encode())


def _packed(vectors: Sequence[Sequence[float]]) -> str:
    return b64encode(np.asarray(vectors, dtype="<f4").tobytes()).decode()


def _look(link: Connection, tenant: str, place: _Place, now: datetime) -> tuple[list[Near], Evidence]:
    """Kept answers to calls of this shape by how near they lie, and what was compared of such."""
    mine = (SIMILAR.c.tenant == tenant, SIMILAR.c.shape == place.shape(place.scope.model))
    query = select(SIMILAR.c.key, SIMILAR.c.gist, SIMILAR.c.vectors)
    query = query.where(*mine, SIMILAR.c.expires_at > to_micros(now))
    read = text_reader(link, tenant)
    kept = [
        (row.key, row.gist, b64decode(read(row.vectors)))
        for row in link.execute(query.order_by(SIMILAR.c.expires_at.desc()).limit(MOST))
    ]
    asked = np.asarray(place.vectors, dtype="<f4")
    full = [one for one in kept if len(one[2]) == asked.nbytes]
    if not full:
        return [], {}
    stored = np.frombuffer(b"".join(data for _, _, data in full), dtype="<f4").reshape(-1, *asked.shape)
    # The least like of several texts decides.
    likeness = np.einsum("ntd,td->nt", stored, asked).min(axis=1)
    near = [
        Near(key, max(0, min(1000, int(one * 1000))), gist)
        for (key, gist, _), one in zip(full, likeness, strict=True)
    ]
    return near, _evidence(link, tenant, place.line(place.scope.model))


def _evidence(link: Connection, tenant: str, line: str) -> Evidence:
    mine = (TALLY.c.tenant == tenant, TALLY.c.line == line)
    rows = link.execute(select(TALLY.c.edge, TALLY.c.rights, TALLY.c.wrongs).where(*mine))
    return {row.edge: Tally(row.rights, row.wrongs) for row in rows}


def _count(link: Connection, tenant: str, line: str, near: Near, gist: str) -> None:
    """Add a comparison; beyond a number the older ones count half."""
    edge, right = edge_of(near.similarity), near.gist == gist
    values = {"rights": int(right), "wrongs": int(not right)}
    made = insert_for(link.dialect.name)(TALLY).values(tenant=tenant, line=line, edge=edge, **values)
    added = {name: TALLY.c[name] + value for name, value in values.items()}
    link.execute(made.on_conflict_do_update(index_elements=["tenant", "line", "edge"], set_=added))
    mine = (TALLY.c.tenant == tenant, TALLY.c.line == line)
    compared = select(func.sum(TALLY.c.rights + TALLY.c.wrongs)).where(*mine)
    if link.execute(compared).scalar_one() > MOST_COMPARED:
        # Rounded against ourselves.
        halved = {"rights": TALLY.c.rights // 2, "wrongs": (TALLY.c.wrongs + 1) // 2}
        link.execute(update(TALLY).where(*mine).values(halved))


def _stand(link: Connection, tenant: str, key: str, inputs: Sequence[str]) -> bool:
    """Whether answer and texts are still there: what is erased meanwhile must leave nothing behind."""
    answer = select(CACHE.c.key).where(CACHE.c.tenant == tenant, CACHE.c.key == key)
    texts = select(func.count()).where(BLOB.c.tenant == tenant, BLOB.c.digest.in_(inputs))
    return link.execute(answer).first() is not None and link.execute(texts).scalar_one() == len(inputs)


def _texts(link: Connection, tenant: str, place: _Place, inputs: Sequence[str]) -> dict[str, str]:
    """Where they lie, and by what they go when they are erased."""
    subject = place.scope.subject
    about = [] if subject is None else [subject_id(tenant, subject)]
    sealed = seal_text(link, tenant, _packed(place.vectors), subject)
    return {"inputs": " ".join([*inputs, *about]), "vectors": sealed}


def _put(link: Connection, tenant: str, key: str, row: Mapping[str, Any]) -> None:
    made = insert_for(link.dialect.name)(SIMILAR).values(tenant=tenant, key=key, **row)
    link.execute(made.on_conflict_do_update(index_elements=["tenant", "key"], set_=dict(row)))
