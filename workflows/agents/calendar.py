"""The calendar: from ideas in memory to the week's articles, each of which asks people for itself.

It changes nothing on any target, so its own run waits for nobody: it proposes, starts a run of the content
agent per brief, and ends. What is proposed stands in the ledger before the first of them starts.
"""

from __future__ import annotations

from temporalio import workflow
from temporalio.common import SearchAttributePair, TypedSearchAttributes, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.workflow import ChildWorkflowCancellationType, ParentClosePolicy

from activities.calendar import CONTENT, Candidate, Choose, Chosen, Gather, Gathered, Planning, WeekHead
from models.agent import AgentSpec
from models.calendar import CALENDAR, idea_key, repeated
from models.canonical import derived_id
from models.errors import Declined
from models.inference import Call
from models.loop import (
    Action,
    Evidence,
    Outcome,
    Proposal,
    Receipt,
    Ref,
    Request,
    Status,
    body_digest,
    workflow_id,
)
from models.memory import Hit, Memo, Recall
from models.orders import Reading
from models.visibility import MEMO_BODY, Queue, State, queue_of
from workflows.loop import AGENT, STATE, TENANT, Loop
from workflows.saga import Carried, to_the_end

IDEAS_PER_THEME = 20
MOST_REASON = 600


@workflow.defn(name="calendar")
class ContentCalendar(Loop):
    """Proposes the week's briefs and starts the content agent with each."""

    SPEC = AgentSpec(name="calendar", summary="Starts the week's articles from ideas; each article asks")

    @workflow.init
    def __init__(self, request: Request) -> None:
        """Start with nothing to spare."""
        super().__init__(request)
        self._spare: tuple[Candidate, ...] = ()

    @workflow.run
    async def run(self, request: Request) -> Outcome:
        """Run to an outcome."""
        return await self.loop(request)

    async def propose(self, feedback: tuple[Ref, ...]) -> Proposal:
        """Choose the week's briefs.

        Raises:
            Declined: no idea makes a brief that is new.
        """
        tenant = self.request.tenant
        head: WeekHead = await self.local(Planning.open_week, Reading(tenant=tenant, body=self.body))
        hits, blind = await self._ideas(head)
        order = Gather(tenant=tenant, body=self.body, hits=hits)
        gathered: Gathered = await self.local(Planning.gather, order)
        fresh, near = await self._fresh(head, gathered.candidates)
        passed = (*gathered.passed_over, *near)
        if not fresh:
            raise Declined("; ".join(("no idea in memory makes a new brief", *passed, *blind))[:MOST_REASON])
        chosen = await self._choose(head, fresh, passed)
        picked = [fresh[number] for number in chosen.picks]
        self._spare = tuple(one for one in fresh if one not in picked and one.record_id is None)
        return self._proposal_of(head, picked, chosen.reasons, (*blind, *passed))

    def keepsakes(self, outcome: Outcome) -> tuple[Memo, ...]:
        """Ideas of the request that found no place this week wait in memory for another."""
        tenant = self.request.tenant
        return tuple(
            Memo(
                record_id=derived_id("calendar", tenant, idea_key(one.title)),
                tenant=tenant,
                kind="idea",
                title=one.title,
                text=one.brief,
                source=outcome.workflow_id,
            )
            for one in self._spare
        )

    async def _once(self) -> None:
        """Start what is proposed instead of asking people about it."""
        proposal = self.journal.proposal
        if proposal is None:
            proposal = await self.propose(())
            async with self.journal.writing():
                if not await self.journal.propose(proposal):
                    return
        await to_the_end(self._start_all(proposal))

    async def _start_all(self, proposal: Proposal) -> None:
        receipts = [await self._start(number, action) for number, action in enumerate(proposal.actions)]
        await self._conclude(Carried(Status.EXECUTED, f"started {proposal.title}", receipts))

    async def _start(self, number: int, action: Action) -> Receipt:
        """Start one article, or find that it was; its run outlives this one."""
        tenant, region, key = self.request.tenant, self.request.region, idea_key(action.title)
        if region is not None:
            # A key stands in the ledger for everybody to read, and this one is made of the title.
            key = derived_id("calendar", tenant, key)
        who = self.request.requester
        body = action.arguments
        request = Request(tenant=tenant, agent=CONTENT, region=region, key=key, body=body, requester=who)
        run = workflow_id(tenant, CONTENT, key)
        detail = "started"
        try:
            await workflow.start_child_workflow(
                CONTENT,
                request,
                id=run,
                task_queue=queue_of(Queue.DECIDE, region),
                task_timeout=workflow.info().task_timeout,
                parent_close_policy=ParentClosePolicy.ABANDON,
                cancellation_type=ChildWorkflowCancellationType.ABANDON,
                # One that ended is answered from its claim; it is not to be run again.
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                search_attributes=_attributes(request),
                memo={MEMO_BODY: body_digest(request)},
                static_summary=f"{CONTENT}: {action.title}"[:190],
            )
        except WorkflowAlreadyStartedError:
            detail = "was started before"
        version = action.arguments.digest
        return Receipt(
            action_key=key, action=number, reference=run, version=version, verified=True, detail=detail
        )

    async def _ideas(self, head: WeekHead) -> tuple[tuple[Hit, ...], tuple[str, ...]]:
        """Ideas near the themes, and what memory could not be asked."""
        hits: list[Hit] = []
        blind: list[str] = []
        for query in head.queries:
            wish = Recall(tenant=self.request.tenant, query=query, kinds=("idea",), limit=IDEAS_PER_THEME)
            recalled = await self.recall(wish)
            hits += recalled.hits
            blind += [f"memory answered only in part: {recalled.degraded}"] if recalled.degraded else []
        return tuple(hits), tuple(dict.fromkeys(blind))

    async def _fresh(
        self, head: WeekHead, candidates: tuple[Candidate, ...]
    ) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
        """Those that no post says already, and why the others do not count."""
        fresh: list[Candidate] = []
        near: list[str] = []
        for one in candidates:
            wish = Recall(tenant=self.request.tenant, query=one.query, kinds=("post",), limit=5)
            post = repeated(one.title, (await self.recall(wish)).hits, head.duplicate_permille)
            if post is None:
                fresh.append(one)
            else:
                near.append(f"{one.title}: close to the post {post.title}")
        return tuple(fresh), tuple(near)

    async def _choose(self, head: WeekHead, fresh: tuple[Candidate, ...], passed: tuple[str, ...]) -> Chosen:
        """Let a model choose where there is a choice."""
        take = min(head.per_week, len(fresh))
        answer: Ref | None = None
        if take < len(fresh):
            inputs = {"week": self.body} | {f"idea_{n:02}": one.brief for n, one in enumerate(fresh, 1)}
            answer = (await self.ask(Call(task=CALENDAR, inputs=inputs, params={"take": take}))).text
        order = Choose(
            tenant=self.request.tenant,
            titles=tuple(one.title for one in fresh),
            take=take,
            answer=answer,
            passed_over=passed,
        )
        return await self.local(Planning.choose, order)

    def _proposal_of(
        self, head: WeekHead, picked: list[Candidate], reasons: Ref, passed: tuple[str, ...]
    ) -> Proposal:
        short = len(picked) < head.per_week
        why = ", because memory has too few ideas that make a new brief" if short else ""
        return Proposal(
            agent=self.SPEC.name,
            title=f"{len(picked)} of {head.per_week} briefs for {head.site}{why}",
            # The title is what the run of the brief gets its key from.
            actions=tuple(
                Action(connector=CONTENT, operation="start", arguments=one.brief, title=one.title)
                for one in picked
            ),
            reasons=reasons,
            evidence=tuple(self._evidence(one) for one in picked),
            concerns=tuple(one[:300] for one in passed),
        )

    def _evidence(self, one: Candidate) -> Evidence:
        if one.record_id is None:
            return Evidence(reference="request", version=self.body.digest)
        return Evidence(reference=one.record_id, version=one.version)


def _attributes(request: Request) -> TypedSearchAttributes:
    return TypedSearchAttributes(
        [
            SearchAttributePair(STATE, State.THINKING.value),
            SearchAttributePair(AGENT, request.agent),
            SearchAttributePair(TENANT, request.tenant),
        ]
    )
