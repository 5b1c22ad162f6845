"""Runs as the ledger has them: where they stand, and the cards that people answer, as they were bound.

It needs neither a worker nor Temporal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from activities.services.content import ERASED, ContentStore
from activities.services.ledger_store import LedgerStore
from models.canonical import sha256
from models.errors import InvalidInput, KeyDestroyed, LedgerBroken, RegionBound
from models.gate import Standing
from models.glass import UNSAID
from models.ledger import Entry, Event, EventType
from models.loop import Intent, Outcome, Ref
from models.progress import Progress
from models.visibility import State


@dataclass(frozen=True, slots=True)
class Card:
    """The last intent of a run, and its texts as they were bound."""

    digest: str
    intent: Intent
    short: str
    full: str


@dataclass(frozen=True, slots=True)
class Reading:
    """A run as the ledger has it."""

    run: str
    agent: str
    state: State
    progress: Progress
    card: Card | None

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, if it has."""
        return self.progress.outcome

    @property
    def waiting(self) -> str | None:
        """The digest that waits for an answer, if one does."""
        return self.progress.digest if self.state is State.WAITING else None

    @property
    def reviewing(self) -> bool:
        """Whether others have yet to say if breaking the glass was right."""
        return self.state is State.REVIEWING

    def plain(self) -> dict[str, Any]:
        """For programs."""
        progress, card = self.progress, self.card
        return {
            "workflow_id": self.run,
            "agent": self.agent,
            "state": self.state.value,
            "title": card.intent.proposal.title if card else None,
            "digest": card.digest if card else None,
            "waiting": self.waiting,
            "intents": progress.intents,
            "verdicts": [verdict.model_dump(mode="json") for verdict in progress.verdicts],
            "outcome": progress.outcome.model_dump(mode="json") if progress.outcome else None,
        }


class Runs:
    """What is recorded of the runs of one tenant."""

    def __init__(self, ledger: LedgerStore, content: ContentStore, tenant: str) -> None:
        """Read only."""
        self._ledger = ledger
        self._content = content
        self._tenant = tenant

    async def events(self, run: str) -> tuple[Event, ...]:
        """Everything that is recorded of a run, in order."""
        return await self._ledger.of_run(self._tenant, run)

    async def read(self, run: str) -> Reading:
        """A run from its events and the bytes they name.

        Raises:
            InvalidInput: nothing is recorded of such a run.
            LedgerBroken: a text is not the one that was bound.
        """
        events = await self.events(run)
        if not events:
            raise unknown(run)
        progress = Progress()
        progress.take(_entries(event for event in events if event.stream == run))
        card = await self._card(events)
        state = _state(progress, card)
        if state is State.REVIEWING:
            # Not what may have followed it after a drift.
            card = await self._card(events, progress.broken[-1].digest)
        return Reading(run, _agent(events), state, progress, card)

    async def has_intent(self, run: str) -> bool:
        """Whether it has put something forward."""
        return await self._ledger.has(self._tenant, run, EventType.INTENT)

    async def title(self, run: str, digest: str) -> str:
        """What a run's intent is called; nothing where that digest names none of it here."""
        try:
            data = await self._blob(digest)
        except (InvalidInput, ValueError):
            return ""
        intent = Intent.model_validate_json(data)
        return intent.proposal.title if intent.workflow_id == run else ""

    async def _card(self, events: Sequence[Event], wanted: str | None = None) -> Card | None:
        """Of the last intent, or of the one that is wanted."""
        bodies = [event.body for event in events if event.type is EventType.INTENT]
        logged = [body for body in bodies if wanted in (None, body["digest"])]
        if not logged:
            return None
        digest = str(logged[-1]["digest"])
        data = await self._blob(digest)
        intent = Intent.model_validate_json(data)
        has_ended = any(event.type is EventType.OUTCOME for event in events)
        full = await self._card_text(str(logged[-1]["card"]), has_ended)
        # The bytes that were bound, not what this version would make of them: it may know more fields.
        if sha256(data) != digest or intent.card_digest != sha256(full) and full != ERASED.encode():
            raise LedgerBroken(
                f"intent {digest} does not bind the card that is stored; answer nothing, look why"
            )
        short = await self._card_text(str(logged[-1]["short_card"]), has_ended)
        return Card(digest, intent, short.decode(), full.decode())

    async def _card_text(self, digest: str, has_ended: bool) -> bytes:
        try:
            return await self._blob(digest)
        except (InvalidInput, KeyDestroyed) as error:
            # Nobody decides by a card that is gone; what was decided is told, and reviewed, without it.
            if not has_ended or isinstance(error, RegionBound):
                raise
            return ERASED.encode()

    async def _blob(self, digest: str) -> bytes:
        return await self._content.get(self._tenant, Ref(digest=digest, size=0))


def unknown(run: str) -> InvalidInput:
    """No run of this id."""
    return InvalidInput.field(
        "ID", run, "no such run is recorded; `countersign pending` lists those that wait"
    )


def _entries(events: Iterable[Event]) -> list[Entry]:
    return [Entry(version=e.version, type=e.type, body=e.body, recorded_at=e.recorded_at) for e in events]


def _agent(events: Iterable[Event]) -> str:
    return next((str(e.body["agent"]) for e in events if e.type is EventType.REQUEST), "unknown")


def _state(progress: Progress, card: Card | None) -> State:
    if progress.outcome is not None:
        glass = UNSAID if card is None else card.intent.gate.break_glass or UNSAID
        return State.REVIEWING if progress.reviewing(glass) else State.DONE
    if progress.digest is None or card is None:
        return State.THINKING
    stands = Standing.EXPIRED if progress.expired else progress.stands(card.intent)
    return State.WAITING if stands is Standing.WAITING else State.ACTING
