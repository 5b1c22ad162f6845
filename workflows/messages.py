"""What people may send to a waiting run: four answers, as signals and as updates that say whether they count.

A payload that does not decode, is missing or is one too many must reach the handler all the same: handlers
take whatever came, and reading it leniently is the gate's business.
"""

from __future__ import annotations

from typing import Any

from temporalio import workflow
from temporalio.exceptions import ApplicationError

from models.gate import Judged, Kind, Refusal, read_message
from workflows.approval import Approval


class Messages:
    """The handlers of every agent's workflow."""

    approval: Approval

    @workflow.signal(name="approve", description="Approve the waiting intent: {digest, approver}")
    async def approve(self, *payloads: Any) -> None:
        """Count an approval."""
        await self.approval.take(Kind.APPROVE, payloads)

    @workflow.signal(name="reject", description="Reject the waiting intent: {digest, approver, comment?}")
    async def reject(self, *payloads: Any) -> None:
        """End the run without an effect."""
        await self.approval.take(Kind.REJECT, payloads)

    @workflow.signal(name="revise", description="Ask for another proposal: {digest, approver, comment}")
    async def revise(self, *payloads: Any) -> None:
        """Send the proposal back with feedback."""
        await self.approval.take(Kind.REVISE, payloads)

    @workflow.signal(name="delegate", description="Let somebody else answer: {digest, approver, to}")
    async def delegate(self, *payloads: Any) -> None:
        """Hand the question on."""
        await self.approval.take(Kind.DELEGATE, payloads)

    @workflow.update(name="decide_approve", description="As signal approve, and says whether it counted")
    async def decide_approve(self, *payloads: Any) -> Judged:
        """Count an approval and say so."""
        return await self.approval.take(Kind.APPROVE, payloads)

    @workflow.update(name="decide_reject", description="As signal reject, and says whether it counted")
    async def decide_reject(self, *payloads: Any) -> Judged:
        """Count a rejection and say so."""
        return await self.approval.take(Kind.REJECT, payloads)

    @workflow.update(name="decide_revise", description="As signal revise, and says whether it counted")
    async def decide_revise(self, *payloads: Any) -> Judged:
        """Count a wish for another proposal and say so."""
        return await self.approval.take(Kind.REVISE, payloads)

    @workflow.update(name="decide_delegate", description="As signal delegate, and says whether it counted")
    async def decide_delegate(self, *payloads: Any) -> Judged:
        """Count a delegation and say so."""
        return await self.approval.take(Kind.DELEGATE, payloads)

    @decide_approve.validator
    def _shape_of_approve(self, *payloads: Any) -> None:
        _well_formed(Kind.APPROVE, payloads)

    @decide_reject.validator
    def _shape_of_reject(self, *payloads: Any) -> None:
        _well_formed(Kind.REJECT, payloads)

    @decide_revise.validator
    def _shape_of_revise(self, *payloads: Any) -> None:
        _well_formed(Kind.REVISE, payloads)

    @decide_delegate.validator
    def _shape_of_delegate(self, *payloads: Any) -> None:
        _well_formed(Kind.DELEGATE, payloads)


def _well_formed(kind: Kind, payloads: tuple[Any, ...]) -> None:
    """Refuse an update whose shape is wrong; everything else is judged and recorded."""
    message = read_message(kind, payloads)
    if isinstance(message, Refusal):
        raise ApplicationError(f"{message.field}: {message.remedy}", type="InvalidInput", non_retryable=True)
