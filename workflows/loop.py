"""The loop, once: propose, plan, log the intent, wait for people, act exactly once, log, remember.

An agent derives from `Loop`, and supplies how to propose and what to remember. The run is always where its
ledger stream says it is, so that a lost attempt, a reset and a repeated request all lead to one truth.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ActivityError, ApplicationError, FailureError, is_cancelled_exception

from activities.routing import Routing
from models.agent import AgentSpec
from models.card import answer_json, review_card
from models.errors import AllTiersFailed, CountersignError, Declined, InvalidInput, OutputInvalid
from models.gate import Standing
from models.inference import Answered, Ask, Call
from models.ledger import event_id
from models.loop import Cost, Outcome, Plan, Proposal, Ref, Request, Status, sum_costs
from models.memory import Memo, Recall, Recalled
from models.orders import Fell, PlanOrder, Presentation, Routed, RouteOrder
from models.policy import permit, risk
from models.visibility import MEMO_ANSWER, MEMO_CARD, MEMO_DIGEST, Attribute, State
from workflows import policies
from workflows.approval import Approval
from workflows.journal import Journal
from workflows.messages import Messages
from workflows.saga import Carried, Saga, to_the_end

T = TypeVar("T")

STATE = SearchAttributeKey.for_keyword(Attribute.STATE)
AGENT = SearchAttributeKey.for_keyword(Attribute.AGENT)
TENANT = SearchAttributeKey.for_keyword(Attribute.TENANT)
RISK = SearchAttributeKey.for_keyword(Attribute.RISK)
WAITING_SINCE = SearchAttributeKey.for_datetime(Attribute.WAITING_SINCE)

GO_ON = frozenset(
    {"TierUnavailable", "RateLimited", "OutputInvalid", "CredentialsRejected", "IdentityChanged", ""}
)
"""Failures of one tier that another may not have; the empty type is a time-out."""

NOTHING_STANDS = frozenset(
    {
        Status.REJECTED,
        Status.EXPIRED,
        Status.STALE,
        Status.CANCELLED,
        Status.FAILED,
        Status.COMPENSATED,
    }
)
"""Ends that say that nothing of the request was done."""


class Loop(Messages):
    """Every agent's workflow; derive and add `@workflow.defn`, `@workflow.init` and `@workflow.run`."""

    SPEC: ClassVar[AgentSpec]

    if not TYPE_CHECKING:  # agents declare what they take; this is about what is sent all the same

        def __new__(cls, *payloads: Any) -> Self:
            """Refuse anything but one request: a constructor that breaks is tried again for ever.

            Raises:
                InvalidInput: there is none, more than one, or something else.
            """
            if len(payloads) != 1 or not isinstance(payloads[0], Request):
                kinds = ", ".join(type(payload).__name__ for payload in payloads) or "nothing"
                raise InvalidInput.field("input", kinds, "send one Request: agent, key and body")
            if payloads[0].agent != cls.SPEC.name:
                # Its policy would be one agent's and its work another's.
                raise InvalidInput.field(
                    "agent", payloads[0].agent, f"this run is of {cls.SPEC.name}; name it"
                )
            return super().__new__(cls)

    def __init__(self, request: Request) -> None:
        """Create all state: messages may come before the first line of `run`."""
        self.journal = Journal(request)
        self.approval = Approval(self.journal)
        self.cost: Cost | None = None
        self._state = State.THINKING
        self._calls = 0
        self._put = 0

    @property
    def request(self) -> Request:
        """What started this run; once admitted its body is a reference."""
        return self.journal.request

    @property
    def body(self) -> Ref:
        """The request's body in the content store."""
        return self.journal.admitted.body

    async def propose(self, feedback: tuple[Ref, ...]) -> Proposal:
        """Say what the agent wants; `feedback` are people's words on earlier intents of this run.

        Raises:
            Declined: there is nothing to propose.
        """
        raise NotImplementedError

    def keepsakes(self, outcome: Outcome) -> tuple[Memo, ...]:
        """What is worth remembering of this run."""
        return ()

    # Queries.

    @workflow.query(name="status", description="Where the run stands")
    def status(self) -> dict[str, Any]:
        """State, open intent, revisions and outcome."""
        progress = self.journal.progress
        return {
            "workflow_id": self.journal.workflow_id,
            "agent": self.request.agent,
            "state": self._state.value,
            "intent": progress.digest,
            "intents": progress.intents,
            "outcome": progress.outcome.status.value if progress.outcome else None,
            "reason": progress.outcome.reason if progress.outcome else "",
        }

    @workflow.query(name="card", description="What the approver reads")
    def card(self) -> str:
        """The short card of the open intent; empty while there is none."""
        return self.journal.card if self.journal.progress.digest is not None else ""

    # What agents may use.

    async def recall(self, recall: Recall) -> Recalled:
        """Search memory by meaning."""
        return await policies.search(recall, self.journal.admitted.pace, self.request.region)

    async def local(self, activity: Any, order: Any) -> Any:
        """Run a short pure step of the agent's own as a local activity."""
        return await policies.book(activity, order)

    async def ask(self, call: Call) -> Answered:
        """Put a call to a model: routed, recorded, with one fallback; waits while every tier is away.

        Raises:
            OutputInvalid: the permitted tiers answered, and none of them to any use.
            AllTiersFailed: they stayed away for as long as the agent may think.
        """
        if self.request.region is not None:
            call = call.within(self.request.region)
        since, pause = workflow.now(), policies.FIRST_PAUSE
        while isinstance(answered := await self._one_round(call), tuple):
            if all(kind == OutputInvalid.__name__ for kind in answered):
                raise OutputInvalid(f"{call.task}: no permitted tier gave a usable answer")
            if workflow.now() + pause - since > self.SPEC.think:
                raise AllTiersFailed(f"{call.task}: no tier answered for {self.SPEC.think}; start one")
            await workflow.sleep(pause, summary=f"{call.task}: no tier answers")
            pause = min(pause * 2, policies.LONGEST_PAUSE)
        return answered

    async def _one_round(self, call: Call) -> Answered | tuple[str, ...]:
        """An answer, or what went wrong with each tier."""
        self._calls += 1
        if self.request.subject is not None and call.subject is None:
            call = call.model_copy(update={"subject": self.request.subject})
        order = RouteOrder(
            tenant=self.request.tenant,
            workflow_id=self.journal.workflow_id,
            event_id=self._route_event("route", 0),
            agent=self.request.agent,
            call=call,
        )
        routed: Routed = await policies.book(Routing.route, order, f"route {call.task}")
        failures: list[str] = []
        doubted: Answered | None = None
        for number, tier in enumerate(routed.route.tiers):
            try:
                ask = Ask(
                    tenant=order.tenant,
                    workflow_id=order.workflow_id,
                    call=call,
                    tier=tier,
                    grant=routed.grant,
                )
                is_last = number + 1 == len(routed.route.tiers)
                pace = self.journal.admitted.pace
                answered = await policies.infer(ask, routed.queues[number], pace, is_last)
            except ActivityError as error:
                kind = policies.error_type(error)
                if (kind not in GO_ON and doubted is None) or _is_cancelled(error):
                    raise
                failures.append(kind)
                kind = kind or type(error.cause).__name__
                await self._fell(order, routed, number, policies.error_text(error), kind)
            else:
                self.cost = sum_costs(self.cost, answered.cost)
                if not answered.unsure:
                    return answered
                doubted = answered
                await self._fell(
                    order, routed, number, f"not sure enough, {answered.confidence} of 1000", "Unsure"
                )
        # An answer that was doubted is better than none.
        return doubted or tuple(failures)

    # The loop.

    async def loop(self, request: Request) -> Outcome:
        """Run to an outcome."""
        try:
            outcome = await self._run()
        except Declined as error:
            outcome = await self._conclude(Carried(Status.CANCELLED, f"the agent declined: {error.message}"))
        except (asyncio.CancelledError, FailureError, CountersignError) as error:
            if not is_cancelled_exception(error) or not self.journal.is_open:
                await self._failed(error)
                raise _readable(error)  # noqa: B904 - an error cannot be its own cause
            outcome = await self._conclude(Carried(Status.CANCELLED, "cancelled before anything was done"))
        await to_the_end(self._drained())
        return outcome

    async def _run(self) -> Outcome:
        admitted = await self.journal.open()
        if admitted.refusal:
            self.approval.close()
            raise InvalidInput(admitted.refusal)
        if admitted.earlier is not None:
            self.approval.close()
            return admitted.earlier
        while self.journal.progress.outcome is None:
            await self._once()
        self._upsert(State.DONE)
        return self.journal.progress.outcome

    async def _once(self) -> None:
        """From wherever the run stands to the next decision."""
        journal = self.journal
        if journal.progress.digest is None or journal.intent is None:
            self._upsert(State.THINKING)
            await self._continue_as_new_if_long()
            await self._put_forward()
            return
        self._show()
        stands = await self.approval.wait()
        match stands:
            case Standing.PASSED:
                await self._act()
            case Standing.REJECTED:
                await self._conclude(Carried(Status.REJECTED, f"by {_by(journal)}"))
            case Standing.EXPIRED:
                await self._conclude(Carried(Status.EXPIRED, "nobody decided in time"))
            case Standing.WAITING:
                await self._continue_as_new_if_long()
            case _:
                pass

    async def _put_forward(self) -> None:
        """Propose unless a proposal stands, try it dry, and log what people will be asked."""
        journal = self.journal
        stage, proposal = self._stage(), journal.proposal
        if proposal is None or journal.progress.proposal is None:
            proposal = await self.propose(tuple(journal.progress.feedback))
            if journal.progress.rethought:
                concerns = (journal.progress.rethought, *proposal.concerns)
                proposal = proposal.model_copy(update={"concerns": concerns})
            permit(journal.admitted.policy, proposal)
            async with journal.writing():
                if stage != self._stage() or not await journal.propose(proposal):
                    return
            stage = self._stage()
        kept = journal.progress.skips
        numbers = policies.numbers(len(proposal.actions), kept)
        subject = self.request.subject
        order = PlanOrder(tenant=self.request.tenant, proposal=proposal, numbers=numbers, subject=subject)
        planned = await policies.dry_run(order, journal.admitted.pace, self.request.region)
        async with journal.writing():
            if stage == self._stage():
                await journal.present(self._presentation(proposal, planned.plans, kept))
        self._put += 1

    def _stage(self) -> tuple[int, Ref | None, Outcome | None]:
        """What a proposal or an intent in the making rests on.

        A message that comes meanwhile may find that an attempt of this run that was lost had gone further,
        and may count there; what was in the making is void then.
        """
        progress = self.journal.progress
        return progress.intents, progress.proposal, progress.outcome

    async def _act(self) -> None:
        journal = self.journal
        intent, digest = journal.intent, journal.progress.digest
        if intent is None or digest is None:
            return
        await self._until(intent.proposal)
        self._upsert(State.ACTING)
        carried = await Saga(journal, intent, digest).run()
        if carried.status is not None:
            await self._conclude(carried)

    async def _until(self, proposal: Proposal) -> None:
        if proposal.not_before is None or proposal.not_before <= workflow.now():
            return
        self._upsert(State.SCHEDULED)
        try:
            await workflow.wait_condition(
                # Only in runs that know of it; others may be long and wait here for their timer.
                lambda: self.approval.review.is_long,
                timeout=proposal.not_before - workflow.now(),
                timeout_summary="until it is due",
            )
        except TimeoutError:
            return
        await self._continue_as_new()

    async def _conclude(self, carried: Carried) -> Outcome:
        return await to_the_end(self._concluded(carried))

    async def _concluded(self, carried: Carried) -> Outcome:
        journal = self.journal
        while (ended := journal.progress.outcome) is None:
            async with journal.writing():
                # A message that held the stream until now may have found the end that a lost attempt logged.
                if journal.progress.outcome is None:
                    outcome = self._outcome(carried)
                    await journal.conclude(outcome, self.keepsakes(outcome))
        self._upsert(State.DONE)
        return ended

    def _outcome(self, carried: Carried) -> Outcome:
        status, reason, kept = carried.status or Status.FAILED, carried.reason, self.journal.progress.kept
        if kept and status in NOTHING_STANDS:
            # An earlier intent of this run was carried out in part, and that part stands.
            status, reason = Status.PARTLY_EXECUTED, f"{status}: {reason}"[:300]
        return Outcome(
            status=status,
            workflow_id=self.journal.workflow_id,
            digest=self.journal.progress.last_digest,
            receipts=(*kept, *carried.receipts),
            reason=reason,
            cost=self.cost or Cost(),
        )

    async def _drained(self) -> None:
        if self.approval.review.is_open:
            self._upsert(State.REVIEWING)
            workflow.set_current_details(review_card(self.approval.review.digest))
            await self.approval.review.wait()
            if self.approval.review.is_open:
                await self._continue_as_new()
            self._upsert(State.DONE)
        await workflow.wait_condition(workflow.all_handlers_finished)

    async def _failed(self, error: BaseException) -> None:
        """A run that fails says so in the ledger too, if it ever got there."""
        if not self.journal.is_open:
            self.approval.close()
        else:
            kind = policies.error_type(error) or getattr(error, "type", "") or type(error).__name__
            await self._conclude(Carried(Status.FAILED, f"{kind}: {policies.error_text(error)}"))
        await to_the_end(self._drained())

    async def _fell(self, order: RouteOrder, routed: Routed, number: int, reason: str, kind: str) -> None:
        tiers = routed.route.tiers
        fell = Fell(
            tenant=order.tenant,
            workflow_id=order.workflow_id,
            event_id=self._route_event("fallback", number),
            task=order.call.task,
            tier=tiers[number],
            to=tiers[number + 1] if number + 1 < len(tiers) else None,
            reason=reason,
            kind=kind,
            reservation=routed.grant.reservation,
        )
        what = "was not sure" if kind == "Unsure" else "failed"
        await policies.book(Routing.fell, fell, f"{tiers[number]} {what}")

    def _route_event(self, step: str, number: int) -> str:
        # The run id keeps a later run of the same chain from taking an earlier one's routes for its own.
        chain = workflow.info().run_id
        ordinal = self._calls * 10 + number
        return event_id(self.request.tenant, self.journal.workflow_id, chain, step, ordinal)

    def _presentation(
        self, proposal: Proposal, plans: tuple[Plan, ...], applied: tuple[int, ...]
    ) -> Presentation:
        journal, admitted = self.journal, self.journal.admitted
        return Presentation(
            append=journal.place(),
            request=self.request,
            number=journal.progress.intents + 1,
            proposal=proposal,
            plans=plans,
            already_applied=applied,
            policy=admitted.policy,
            policy_digest=admitted.policy_digest,
            created_at=workflow.now(),
            nonce=str(workflow.uuid4()),
        )

    def _show(self) -> None:
        """Put the open intent where people look: search attributes, memo, current details."""
        journal = self.journal
        if journal.intent is None or journal.progress.digest is None:
            return
        self._upsert(State.WAITING)
        digest = journal.progress.digest
        answer = answer_json(digest, journal.intent.gate.roles)
        workflow.upsert_memo({MEMO_DIGEST: digest, MEMO_CARD: journal.card, MEMO_ANSWER: answer})
        workflow.set_current_details(journal.card)

    def _upsert(self, state: State) -> None:
        if state is self._state and state is not State.WAITING:
            return
        self._state = state
        intent = self.journal.intent
        updates = [STATE.value_set(state.value)]
        if state is State.WAITING and intent is not None:
            updates += [RISK.value_set(risk(intent.plans).value), WAITING_SINCE.value_set(workflow.now())]
        if workflow.info().typed_search_attributes.get(AGENT) is None:
            updates += [AGENT.value_set(self.request.agent), TENANT.value_set(self.request.tenant)]
        workflow.upsert_search_attributes(updates)

    async def _continue_as_new_if_long(self) -> None:
        if self._put >= self.SPEC.revisions_per_run or workflow.info().is_continue_as_new_suggested():
            await self._continue_as_new()

    async def _continue_as_new(self) -> None:
        await workflow.wait_condition(workflow.all_handlers_finished)
        workflow.continue_as_new(self.request)


def _readable(error: BaseException) -> BaseException:
    """What a run fails with: the error of the step, not just that a step failed."""
    if not isinstance(error, ActivityError) or is_cancelled_exception(error):
        return error
    kind = policies.error_type(error) or "StepFailed"
    return ApplicationError(policies.error_text(error), type=kind, non_retryable=True)


def _by(journal: Journal) -> str:
    return journal.progress.verdicts[-1].approver if journal.progress.verdicts else "nobody"


def _is_cancelled(error: ActivityError) -> bool:
    return type(error.cause).__name__ == "CancelledError"
