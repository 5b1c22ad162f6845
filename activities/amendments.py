"""Reading a change of policy that somebody proposes, as a local activity of the `decide` role."""

from __future__ import annotations

from typing import Protocol

from pydantic import Field, ValidationError
from temporalio import activity

from models.amendments import OPERATION, Amendment
from models.canonical import canonical
from models.errors import InvalidInput
from models.loop import Action, Proposal, Ref
from models.orders import Reading
from models.policy import GATE_POLICY, POLICY_AGENT


class Store(Protocol):
    """The content store."""

    async def get(self, tenant: str, ref: Ref) -> bytes:
        """Read a blob."""
        ...

    async def put(self, tenant: str, data: bytes, media_type: str, subject: str | None = ...) -> Ref:
        """Keep a blob."""
        ...


class SentAmendment(Amendment):
    """A change as it is proposed."""

    why: str = Field(default="", max_length=4000)


class Amending:
    """Reads what was sent."""

    def __init__(self, store: Store) -> None:
        """What is bound becomes a blob, in canonical bytes."""
        self._store = store

    @activity.defn(name="read_amendment")
    async def read_amendment(self, reading: Reading) -> Proposal:
        """Read and check a change.

        Raises:
            InvalidInput: it does not fit; the first wrong field is named.
        """
        sent = read_amendment(await self._store.get(reading.tenant, reading.body))
        wanted = Amendment(agent=sent.agent, base=sent.base, autonomy=sent.autonomy)
        arguments = await self._store.put(reading.tenant, canonical(wanted), "application/json")
        title = f"Change what {sent.agent} may do without a person"
        action = Action(connector=GATE_POLICY, operation=OPERATION, arguments=arguments, title=title)
        why = sent.why.encode()
        reasons = await self._store.put(reading.tenant, why, "text/plain; charset=utf-8") if why else None
        return Proposal(agent=POLICY_AGENT, title=title, actions=(action,), reasons=reasons)


def read_amendment(data: bytes) -> SentAmendment:
    """A change as it was sent.

    Raises:
        InvalidInput: it does not fit; the first wrong field is named.
    """
    try:
        return SentAmendment.model_validate_json(data)
    except ValidationError as error:
        raise InvalidInput.first(error, "body") from None
