"""The content agent: from a Markdown brief to a published article."""

from __future__ import annotations

from temporalio import workflow

from activities.content import (
    Assemble,
    Assembled,
    BriefHead,
    Compose,
    Composed,
    Drafting,
    Nothing,
    OpenBrief,
    Rewritten,
)
from activities.knowledge import Knowledge
from models.agent import AgentSpec
from models.canonical import derived_id
from models.drafting import METADATA, OUTLINE, PARAPHRASE, SECTION
from models.errors import Declined, OutputInvalid
from models.inference import Call, Param
from models.knowledge import Known, look_about
from models.loop import Action, Cost, Evidence, Outcome, Proposal, Ref, Request, Status
from models.memory import Memo, Recall, Recalled
from workflows.loop import Loop

KNOWS = "content-knows-its-subject"
"""Since then it looks up what is known of the request's subject before it drafts."""


@workflow.defn(name="content")
class Content(Loop):
    """Drafts from a brief, asks, publishes, and remembers what it published."""

    SPEC = AgentSpec(name="content", summary="Drafts an article from a brief and publishes it on a site")

    @workflow.init
    def __init__(self, request: Request) -> None:
        """Start with nothing drafted."""
        super().__init__(request)
        self._memo: Memo | None = None

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        """Run to an outcome."""
        return await self.loop(request)

    async def propose(self, feedback: tuple[Ref, ...]) -> Proposal:
        """Draft the article and propose to publish it.

        Raises:
            Declined: an article of this title stands at this address already.
        """
        tenant = self.request.tenant
        order = OpenBrief(tenant=tenant, body=self.body, feedback=feedback, subject=self.request.subject)
        head: BriefHead = await self.local(Drafting.open_brief, order)
        known = await self._known()
        recalled = await self.recall(Recall(tenant=tenant, query=head.query, kinds=("post", "idea")))
        earlier = head.published_already(recalled.hits)
        if earlier is not None:
            where = earlier.links[0]
            raise Declined(f"{head.title!r} stands at {where} already; give it another title or slug")
        draft = await self._draft(head, feedback)
        self._memo = self._idea(draft.title, draft.text)
        return self._proposal_of(head, draft, recalled, known)

    def keepsakes(self, outcome: Outcome) -> tuple[Memo, ...]:
        """A published article is a post; whatever else was drafted stays an idea."""
        intent = self.journal.intent
        if self._memo is None and intent is not None:
            # This run took over an intent that an earlier one had drafted.
            self._memo = self._idea(intent.proposal.title, intent.proposal.actions[0].arguments)
        if self._memo is None:
            return ()
        links = tuple(link for receipt in outcome.receipts for link in receipt.links)
        kind = "post" if outcome.status is Status.EXECUTED and links else "idea"
        source = outcome.digest or outcome.workflow_id
        return (self._memo.model_copy(update={"kind": kind, "links": links, "source": source}),)

    async def _known(self) -> tuple[Evidence, ...]:
        """What is known of the request's subject; if that changes, people are asked again."""
        look = look_about(self.request.tenant, self.SPEC.name, self.request.subject)
        if look is None or not workflow.patched(KNOWS):
            return ()
        known: Known = await self.local(Knowledge.know, look)
        return known.evidence()

    async def _draft(self, head: BriefHead, feedback: tuple[Ref, ...]) -> Composed:
        """Outline, sections, other words for what repeats, metadata; then code puts it together."""
        tenant = self.request.tenant
        inputs = {"brief": head.brief}
        inputs |= {f"feedback_{number:03}": ref for number, ref in enumerate(feedback, 1)}
        outline = await self._answer(OUTLINE, inputs)
        planned = {**inputs, "outline": outline}
        sections = tuple([await self._answer(SECTION, planned, section=n) for n in range(head.sections)])
        subject = self.request.subject
        order = Assemble(
            tenant=tenant, brief=head.brief, sections=sections, feedback=feedback, subject=subject
        )
        found: Assembled = await self.local(Drafting.assemble, order)
        rewritten: list[Rewritten] = []
        for one in found.repeated:
            answer = await self._answer(
                PARAPHRASE, {**inputs, "sentence": one.sentence, "phrase": one.phrase}
            )
            rewritten.append(Rewritten(sentence=one.sentence, answer=answer))
        compose = Compose(
            tenant=tenant,
            brief=head.brief,
            outline=outline,
            sections=sections,
            rewritten=tuple(rewritten),
            metadata=await self._answer(METADATA, inputs),
            feedback=feedback,
            date=head.at or workflow.now(),
            subject=subject,
        )
        return await self.local(Drafting.compose, compose)

    async def _answer(self, task: str, inputs: dict[str, Ref], **params: Param) -> Ref:
        try:
            return (await self.ask(Call(task=task, inputs=inputs, params=params))).text
        except OutputInvalid:
            # Code's own outline, notes and choices stand in for an answer of no use, and the card says so.
            return await self.local(Drafting.nothing, Nothing(tenant=self.request.tenant))

    def _proposal_of(
        self, head: BriefHead, draft: Composed, recalled: Recalled, known: tuple[Evidence, ...]
    ) -> Proposal:
        found = (Evidence(reference=hit.record_id, version=hit.version) for hit in recalled.hits)
        blind = (f"memory answered only in part: {recalled.degraded}",) if recalled.degraded else ()
        action = Action(
            connector=head.site,
            operation="publish",
            arguments=draft.arguments,
            title=f"{'Draft' if head.draft else 'Publish'} {draft.title} at {draft.slug}"[:200],
        )
        return Proposal(
            agent=self.SPEC.name,
            title=draft.title,
            actions=(action,),
            reasons=draft.reasons,
            evidence=tuple(dict.fromkeys((*known, *found))),
            estimated=Cost(tokens=head.estimated_tokens, milliseconds=head.estimated_milliseconds),
            concerns=(*head.closeness(recalled.hits), *blind, *head.concerns, *draft.concerns),
            not_before=head.at,
        )

    def _idea(self, title: str, text: Ref) -> Memo:
        tenant, run = self.request.tenant, workflow.info().workflow_id
        record = derived_id("content", tenant, run)
        about = self.request.subject or ""
        return Memo(
            record_id=record, tenant=tenant, kind="idea", title=title, text=text, source=run, subject=about
        )
