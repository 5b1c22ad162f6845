"""The calendar's own short steps: read what is asked, turn ideas into briefs, read the choice. No effects."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from temporalio import activity

from activities.content import MARKDOWN, Store, query_of
from models.calendar import (
    MOST_CANDIDATES,
    TRAVELS,
    Idea,
    Week,
    brief_of,
    idea_key,
    parse_week,
    read_idea,
    read_picks,
)
from models.content import Brief, ContentSettings, render_brief
from models.errors import InvalidInput
from models.loop import Frozen, Name, Ref
from models.memory import Hit
from models.orders import Reading
from models.prose import folded

CONTENT = "content"
"""The agent that gets the briefs."""


class Claimed(Protocol):
    """Knows which requests were taken; `services/claims.py` in a worker."""

    async def taken(self, tenant: str, agent: str, keys: Collection[str]) -> frozenset[str]:
        """Those of the keys that were used before."""
        ...


class WeekHead(Frozen):
    """What the workflow needs to know of what is asked."""

    site: Name
    per_week: int
    queries: tuple[Ref, ...]
    """One search for ideas each."""
    duplicate_permille: int


class Gather(Frozen):
    """Turn ideas into briefs: those of the request first, then what memory has."""

    tenant: Name
    body: Ref
    hits: tuple[Hit, ...] = ()


class Candidate(Frozen):
    """An idea that makes a brief and was not taken before."""

    title: str
    brief: Ref
    query: Ref
    """What to search memory for posts with."""
    record_id: str | None = None
    """The memory it comes from; `None` for an idea of the request."""
    version: str = ""


class Gathered(Frozen):
    """Candidates in the order of the request and then of memory; and why others are none."""

    candidates: tuple[Candidate, ...] = ()
    passed_over: tuple[str, ...] = ()


class Choose(Frozen):
    """Read a model's choice among candidates, and say why these."""

    tenant: Name
    titles: tuple[str, ...]
    take: int
    answer: Ref | None = None
    """Without one the order of the candidates decides."""
    passed_over: tuple[str, ...] = ()


class Chosen(Frozen):
    """Positions of the chosen, best first."""

    picks: tuple[int, ...]
    reasons: Ref


class Planning:
    """Local activities of the calendar. The same input gives the same references."""

    def __init__(
        self, store: Store, claims: Claimed, limits: ContentSettings, sites: tuple[str, ...] = ()
    ) -> None:
        """Take the content store, the claims, the house's limits and the known sites."""
        self._store = store
        self._claims = claims
        self._limits = limits
        self._sites = sites

    @activity.defn(name="calendar_open_week")
    async def open_week(self, order: Reading) -> WeekHead:
        """Read and check what is asked.

        Raises:
            InvalidInput: it names field, value and remedy.
        """
        week = await self._week(order.tenant, order.body)
        if self._sites and week.site not in self._sites:
            raise InvalidInput.field("site", week.site, f"known sites are {', '.join(self._sites)}")
        return WeekHead(
            site=week.site,
            per_week=week.per_week,
            queries=tuple(
                [await self._store.put(order.tenant, theme.encode(), MARKDOWN) for theme in week.themes]
            ),
            duplicate_permille=self._limits.duplicate_permille,
        )

    @activity.defn(name="calendar_gather")
    async def gather(self, order: Gather) -> Gathered:
        """Keep what makes a brief, is not there twice and was not taken before."""
        week = await self._week(order.tenant, order.body)
        found: list[tuple[Brief, Hit | None]] = [(brief_of(idea, week), None) for idea in week.ideas]
        passed: list[str] = []
        for hit in _once(order.hits):
            try:
                found.append((brief_of(await self._idea(order.tenant, hit), week), hit))
            except InvalidInput as error:
                # What may not travel is not named either.
                name = hit.title if hit.data_class in TRAVELS else hit.record_id
                passed.append(f"{name}: {error.message}")
        fresh = await self._untaken(order.tenant, found, passed)
        candidates = [
            await self._candidate(order.tenant, brief, hit) for brief, hit in fresh[:MOST_CANDIDATES]
        ]
        return Gathered(candidates=tuple(candidates), passed_over=tuple(passed))

    @activity.defn(name="calendar_choose")
    async def choose(self, order: Choose) -> Chosen:
        """Read the choice; whatever the answer is, the picks are different candidates."""
        answer = "" if order.answer is None else await self._store.text(order.tenant, order.answer)
        picks = read_picks(answer, len(order.titles), order.take)
        reasons = _reasons(order, picks)
        return Chosen(picks=picks, reasons=await self._store.put(order.tenant, reasons.encode(), MARKDOWN))

    async def _week(self, tenant: str, body: Ref) -> Week:
        return parse_week(await self._store.get(tenant, body))

    async def _idea(self, tenant: str, hit: Hit) -> Idea:
        if hit.data_class not in TRAVELS:
            allowed = " or ".join(TRAVELS)
            raise InvalidInput.field("data_class", hit.data_class.value, f"only {allowed} ideas are taken")
        return read_idea(hit.title, (await self._store.get(tenant, hit.text)).decode(errors="replace"))

    async def _untaken(
        self, tenant: str, found: list[tuple[Brief, Hit | None]], passed: list[str]
    ) -> list[tuple[Brief, Hit | None]]:
        keys = [idea_key(brief.title) for brief, _ in found]
        used = set(await self._claims.taken(tenant, CONTENT, keys))
        fresh: list[tuple[Brief, Hit | None]] = []
        for key, (brief, hit) in zip(keys, found, strict=True):
            if key in used:
                passed.append(f"{brief.title}: taken before")
            else:
                fresh.append((brief, hit))
                used.add(key)
        return fresh

    async def _candidate(self, tenant: str, brief: Brief, hit: Hit | None) -> Candidate:
        return Candidate(
            title=brief.title,
            brief=await self._store.put(tenant, render_brief(brief), MARKDOWN),
            query=await self._store.put(tenant, query_of(brief).encode(), MARKDOWN),
            record_id=hit.record_id if hit else None,
            version=hit.version if hit else "",
        )


def _once(hits: Iterable[Hit]) -> list[Hit]:
    """Each subject once, the closest to a theme first; several themes may find the same."""
    found: dict[str, Hit] = {}
    for hit in sorted(hits, key=lambda hit: (-hit.score_permille, hit.record_id)):
        found.setdefault(folded(hit.title), hit)
    return list(found.values())


def _reasons(order: Choose, picks: tuple[int, ...]) -> str:
    how = "a model's choice among" if order.answer else "all of"
    lines = [f"The week's briefs, {how} {len(order.titles)} ideas; their facts are the ideas' own.", ""]
    lines += [f"{place}. {order.titles[number]}" for place, number in enumerate(picks, 1)]
    if order.passed_over:
        lines += ["", "Passed over:", "", *(f"- {why}" for why in order.passed_over)]
    return "\n".join(lines) + "\n"
