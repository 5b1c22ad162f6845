"""Answers to intents, given in one way by all who can read the ledger: the command line and the desk."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from temporalio.client import Client, WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.service import RPCError, RPCStatusCode

from activities.services.ledger_store import LedgerStore
from activities.services.runs import Runs, unknown
from models.canonical import derived_id
from models.errors import InvalidInput, Unavailable
from models.gate import Judged, Kind, Refusal
from models.ledger import Draft, Event, EventType
from models.visibility import State
from temporal.client import answer

PATIENCE = timedelta(seconds=30)
STOPPED = "Temporal has no open run of it; start the request again, which goes on from where its ledger is"


class Answering:
    """Gives answers, and records those that come when the run is over."""

    def __init__(self, client: Client, runs: Runs, ledger: LedgerStore, tenant: str) -> None:
        """Everything of one tenant."""
        self._client = client
        self._runs = runs
        self._ledger = ledger
        self._tenant = tenant

    async def give(
        self, run: str, kind: Kind, message: dict[str, Any], patience: timedelta = PATIENCE
    ) -> Judged:
        """Answer an intent and learn whether it counted; a refusal stands in the ledger, whatever it is for.

        Raises:
            InvalidInput: no such run is recorded, or Temporal did not take the message.
            Unavailable: no worker took it in time.
        """
        before = await self._runs.events(run)
        if not before:
            # Temporal may well have it: of another tenant, whose runs are not answered from here.
            raise unknown(run)
        judged = await self._sent(run, kind, message, patience)
        if judged is not None and judged.counted:
            return judged
        found = await counted(self._runs, run, kind, message, before)
        return found or judged or await self._late(run, kind, message)

    async def _sent(
        self, run: str, kind: Kind, message: dict[str, Any], patience: timedelta
    ) -> Judged | None:
        """What the run says of it; nothing if there is no such run, or no more."""
        try:
            return await answer(self._client, run, kind, message, patience)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            return None
        except WorkflowUpdateFailedError as error:
            text = str(getattr(error.cause, "message", error.cause))
            raise InvalidInput.field(kind.value, run, text) from None
        except WorkflowUpdateRPCTimeoutOrCancelledError:
            raise Unavailable(
                f"{kind}: no worker took it within {patience.seconds} s, and it may or may not count later; "
                f"start `countersign up`, look with `countersign show {run}`, and answer again if it waits"
            ) from None

    async def _late(self, run: str, kind: Kind, message: dict[str, Any]) -> Judged:
        """An answer to a run that is over stands in the ledger too."""
        reading = await self._runs.read(run)
        ended = reading.outcome if reading.state is State.DONE else None
        remedy = STOPPED if ended is None else f"the run has ended as {ended.status}; nothing is open"
        approver = str(message["approver"])
        refusal = Refusal(kind=kind, field="ID", remedy=remedy, approver=approver)
        parts = [str(message.get(name, "")) for name in ("digest", "approver", "comment", "to", "role")]
        await self._ledger.add(
            self._tenant,
            Draft(
                event_id=derived_id("closed", self._tenant, run, kind.value, *parts),
                stream=run,
                type=EventType.REFUSAL,
                actor_kind="person",
                actor_ref=approver,
                correlation_id=run,
                body=refusal.model_dump(mode="json"),
            ),
        )
        return Judged(counted=False, state=reading.state, field=refusal.field, remedy=remedy)


async def counted(
    runs: Runs, run: str, kind: Kind, message: dict[str, Any], before: Sequence[Event]
) -> Judged | None:
    """Whether an answer counted since, by a task that Temporal lost; sent again it comes too late."""
    known = {event.event_id for event in before}
    said = {name: message.get(name) for name in ("digest", "approver", "role", "to")} | {"kind": kind.value}
    for event in await runs.events(run):
        is_answer = event.type in (EventType.VERDICT, EventType.REVIEW) and event.event_id not in known
        if is_answer and all(event.body.get(name) == value for name, value in said.items()):
            reading = await runs.read(run)
            state = reading.outcome.status if reading.outcome is not None else reading.state
            return Judged(counted=True, state=state, digest=message["digest"])
    return None
