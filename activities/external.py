"""Reading a proposal that another program sent, as a local activity of the `decide` role."""

from __future__ import annotations

import json
from typing import Any, Protocol

from pydantic import Field, ValidationError
from temporalio import activity

from models.errors import InvalidInput
from models.loop import Action, Evidence, Frozen, Name, Proposal, Ref
from models.orders import Reading


class Store(Protocol):
    """The content store."""

    async def get(self, tenant: str, ref: Ref) -> bytes:
        """Read a blob."""
        ...

    async def put(self, tenant: str, data: bytes, media_type: str, subject: str | None = ...) -> Ref:
        """Keep a blob."""
        ...


class SentAction(Frozen):
    """An action with its arguments written out."""

    connector: Name
    operation: Name
    arguments: dict[str, Any]
    title: str = Field(max_length=200)


class SentProposal(Frozen):
    """A proposal as another program writes it."""

    title: str = Field(max_length=200)
    actions: tuple[SentAction, ...] = Field(min_length=1, max_length=50)
    reasons: str = Field(default="", max_length=20_000)
    evidence: tuple[Evidence, ...] = ()
    confidence_percent: int | None = Field(default=None, ge=0, le=100)


class External:
    """Reads what was sent."""

    def __init__(self, store: Store) -> None:
        """Arguments and reasons become blobs."""
        self._store = store

    @activity.defn(name="read_proposal")
    async def read_proposal(self, reading: Reading) -> Proposal:
        """Read and check a proposal.

        Raises:
            InvalidInput: it does not fit; the first wrong field is named.
        """
        sent = _read(await self._store.get(reading.tenant, reading.body))
        actions = [await self._action(reading, one) for one in sent.actions]
        reasons = sent.reasons.encode()
        return Proposal(
            agent="external",
            title=sent.title,
            actions=tuple(actions),
            reasons=await self._store.put(
                reading.tenant, reasons, "text/plain; charset=utf-8", reading.subject
            )
            if reasons
            else None,
            evidence=sent.evidence,
            confidence_percent=sent.confidence_percent,
        )

    async def _action(self, reading: Reading, sent: SentAction) -> Action:
        data = json.dumps(sent.arguments, sort_keys=True, ensure_ascii=False).encode()
        arguments = await self._store.put(reading.tenant, data, "application/json", reading.subject)
        return Action(
            connector=sent.connector, operation=sent.operation, arguments=arguments, title=sent.title
        )


def _read(data: bytes) -> SentProposal:
    try:
        return SentProposal.model_validate_json(data)
    except ValidationError as error:
        raise InvalidInput.first(error, "body") from None
