"""The content agent's own short steps: read the brief, find repeats, put the article together. No effects."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from pydantic import AwareDatetime
from temporalio import activity

from models.article import Answers, Draft, compose, find_repeats, read_outline, section_count
from models.canonical import canonical
from models.content import Brief, ContentSettings, amend, parse_brief, render_brief, slug_candidates
from models.drafting import estimated_tokens
from models.errors import InvalidInput
from models.loop import Frozen, Name, Ref, Subject
from models.memory import Hit
from models.prose import folded

MARKDOWN = "text/markdown; charset=utf-8"
JSON = "application/json"


class Store(Protocol):
    """Blobs by reference; `services/content.py` in a worker."""

    async def get(self, tenant: str, ref: Ref) -> bytes:
        """Bytes."""
        ...

    async def text(self, tenant: str, ref: Ref) -> str:
        """UTF-8 text."""
        ...

    async def put(self, tenant: str, data: bytes, media_type: str, subject: str | None = ...) -> Ref:
        """Keep bytes; putting twice keeps one."""
        ...


class OpenBrief(Frozen):
    """Read a brief, with what people asked to be changed since."""

    tenant: Name
    body: Ref
    feedback: tuple[Ref, ...] = ()
    subject: Subject | None = None


class BriefHead(Frozen):
    """What the workflow needs to know of a brief; everything longer is a reference."""

    brief: Ref
    """The brief as it now stands: with feedback lines such as `slug: other` followed."""
    query: Ref
    """What to search memory for."""
    title: str
    site: Name
    slugs: tuple[str, ...]
    """The candidates; one of them will be taken."""
    draft: bool
    at: AwareDatetime | None = None
    sections: int
    facts: int
    estimated_tokens: int
    estimated_milliseconds: int | None = None
    duplicate_permille: int
    concerns: tuple[str, ...] = ()

    def published_already(self, hits: Iterable[Hit]) -> Hit | None:
        """The post that has this very title and address, if memory knows one."""
        for hit in hits:
            pages = {part for link in hit.links for part in link.split("/")}
            same = folded(hit.title) == folded(self.title)
            if hit.kind == "post" and same and pages.intersection(self.slugs):
                return hit
        return None

    def closeness(self, hits: Iterable[Hit]) -> tuple[str, ...]:
        """Near-duplicates, in words for the approver."""
        return tuple(
            f"close to an earlier {hit.kind}: {' '.join((hit.title, *hit.links[:1]))}"
            for hit in hits
            # Without its embedding server memory cannot measure; the same title is close anyway.
            if hit.score_permille >= self.duplicate_permille or folded(hit.title) == folded(self.title)
        )


class Assemble(Frozen):
    """Look through the sections for phrases that stand twice."""

    tenant: Name
    brief: Ref
    sections: tuple[Ref, ...]
    feedback: tuple[Ref, ...] = ()
    subject: Subject | None = None


class Repeated(Frozen):
    """A sentence to say in other words, and the phrase that must go."""

    sentence: Ref
    phrase: Ref


class Assembled(Frozen):
    """What is worth a paraphrase; usually nothing."""

    repeated: tuple[Repeated, ...] = ()


class Rewritten(Frozen):
    """A sentence and the model's other words for it."""

    sentence: Ref
    answer: Ref


class Nothing(Frozen):
    """An empty answer is wanted."""

    tenant: Name


class Compose(Frozen):
    """Put the article together."""

    tenant: Name
    brief: Ref
    outline: Ref
    sections: tuple[Ref, ...]
    rewritten: tuple[Rewritten, ...] = ()
    metadata: Ref
    feedback: tuple[Ref, ...] = ()
    date: AwareDatetime
    """The article's date; given, so that every attempt writes the same."""
    subject: Subject | None = None


class Composed(Frozen):
    """The article, as arguments of the site's `publish`."""

    title: str
    slug: str
    arguments: Ref
    text: Ref
    """The article's Markdown, for memory."""
    reasons: Ref
    concerns: tuple[str, ...] = ()


class Drafting:
    """Local activities of the content agent. The same input gives the same references."""

    def __init__(
        self,
        store: Store,
        limits: ContentSettings,
        sites: tuple[str, ...] = (),
        tokens_per_second: int | None = None,
    ) -> None:
        """Take the content store and the house's limits.

        Args:
            store: where texts are.
            limits: what an article must satisfy.
            sites: known targets; empty leaves refusing an unknown one to the dry run.
            tokens_per_second: of the tier that writes, if known, for the estimate of time.
        """
        self._store = store
        self._limits = limits
        self._sites = sites
        self._speed = tokens_per_second

    @activity.defn(name="no_answer")
    async def nothing(self, wanted: Nothing) -> Ref:
        """An empty text, in the place of an answer that no model could give."""
        return await self._store.put(wanted.tenant, b"", MARKDOWN)

    @activity.defn(name="content_open_brief")
    async def open_brief(self, order: OpenBrief) -> BriefHead:
        """Read and check the brief.

        Raises:
            InvalidInput: it names field, value and remedy.
        """
        asked = parse_brief(await self._store.get(order.tenant, order.body))
        if self._sites and asked.target.site not in self._sites:
            raise InvalidInput.field("target", asked.target.site, f"known sites are {', '.join(self._sites)}")
        brief, concerns = amend(asked, await self._texts(order.tenant, order.feedback))
        tokens = estimated_tokens(brief)
        return BriefHead(
            brief=await self._put(order, render_brief(brief)),
            query=await self._put(order, query_of(brief).encode()),
            title=brief.title,
            site=brief.target.site,
            slugs=slug_candidates(brief),
            draft=brief.draft,
            at=brief.at,
            sections=section_count(brief),
            facts=len(brief.key_facts),
            estimated_tokens=tokens,
            estimated_milliseconds=tokens * 1000 // self._speed if self._speed else None,
            duplicate_permille=self._limits.duplicate_permille,
            concerns=concerns,
        )

    @activity.defn(name="content_assemble")
    async def assemble(self, order: Assemble) -> Assembled:
        """Find phrases that a later section repeats."""
        brief = await self._brief(order.tenant, order.brief)
        sections = await self._texts(order.tenant, order.sections)
        feedback = await self._texts(order.tenant, order.feedback)
        return Assembled(
            repeated=tuple(
                [
                    Repeated(
                        sentence=await self._put(order, one.sentence.encode()),
                        phrase=await self._put(order, one.phrase.encode()),
                    )
                    for one in find_repeats(brief, sections, self._limits, feedback)
                ]
            )
        )

    @activity.defn(name="content_compose")
    async def compose(self, order: Compose) -> Composed:
        """Place the facts, check the whole, and store it as arguments of `publish`."""
        brief = await self._brief(order.tenant, order.brief)
        answers = await self._answers(order)
        draft = compose(brief, answers, self._limits)
        arguments = draft.model_dump(mode="json", exclude={"concerns", "notices"})
        arguments |= {"date": order.date.isoformat(), "draft": brief.draft}
        reasons = _reasons(brief, draft, answers)
        return Composed(
            title=draft.title,
            slug=draft.slug,
            arguments=await self._put(order, canonical(arguments), JSON),
            text=await self._put(order, f"# {draft.title}\n\n{draft.body}".encode()),
            reasons=await self._put(order, reasons.encode()),
            concerns=draft.concerns,
        )

    async def _put(
        self, order: OpenBrief | Assemble | Compose, data: bytes, media_type: str = MARKDOWN
    ) -> Ref:
        return await self._store.put(order.tenant, data, media_type, order.subject)

    async def _brief(self, tenant: str, ref: Ref) -> Brief:
        return parse_brief(await self._store.get(tenant, ref))

    async def _texts(self, tenant: str, refs: tuple[Ref, ...]) -> tuple[str, ...]:
        return tuple([await self._store.text(tenant, ref) for ref in refs])

    async def _answers(self, order: Compose) -> Answers:
        text = self._store.text
        return Answers(
            outline=await text(order.tenant, order.outline),
            sections=await self._texts(order.tenant, order.sections),
            metadata=await text(order.tenant, order.metadata),
            rewritten={
                await text(order.tenant, one.sentence): await text(order.tenant, one.answer)
                for one in order.rewritten
            },
            feedback=await self._texts(order.tenant, order.feedback),
        )


def query_of(brief: Brief) -> str:
    """What to search memory for: as close as can be to what is remembered of an article."""
    return f"# {brief.title}\n\n{brief.notes}\n\n{' '.join(brief.key_facts)}"[:4000]


def _reasons(brief: Brief, draft: Draft, answers: Answers) -> str:
    outline = read_outline(brief, answers.outline)
    placed = [
        f"- Section {number}: key facts {', '.join(str(fact + 1) for fact in slot) or 'none'}"
        for number, slot in enumerate(outline.slots, 1)
    ]
    lines = ["Every key fact was placed by code, word for word.", "", *placed]
    if draft.notices:
        lines += ["", "Chosen by code, because the model's answer was of no use:", ""]
        lines += [f"- {notice}" for notice in draft.notices]
    return "\n".join(lines) + "\n"
