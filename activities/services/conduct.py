"""Whether what a log tells of was allowed: every effect asked for, sufficiently approved, and done once.

It applies the rules of the gate once more, to each event with only those before it known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pydantic import ValidationError

from models.gate import may_act, may_undo
from models.ledger import Entry, Event, EventType, act_stream, policy_stream
from models.loop import Intent, Status, action_key
from models.policy import GATE_POLICY

UNDO = ".undo"
ATTEMPTS = (EventType.APPLY, EventType.COMPENSATION)
EFFECTS = (*ATTEMPTS, EventType.RECEIPT)


@dataclass(slots=True)
class _Run:
    entries: list[Entry] = field(default_factory=list[Entry])
    attempted: set[str] = field(default_factory=set[str])
    confirmed: set[str] = field(default_factory=set[str])
    closed: set[str] = field(default_factory=set[str])
    doubtful: set[str] = field(default_factory=set[str])
    changed: set[str] = field(default_factory=set[str])
    ended: bool = False
    still_undoing: bool = False
    """It ended without an answer to an undo, which may still come."""


class Conduct:
    """Follows all runs of one log."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.missing = set[str]()
        """Intents whose bytes were not given, though an effect rests on them."""
        self._runs = dict[str, _Run]()
        self._intents = dict[str, Intent]()
        self._streams = dict[str, str]()

    def know(self, digest: str, data: bytes) -> str | None:
        """Take an intent's bytes; says what is wrong with them."""
        try:
            self._intents[digest] = Intent.model_validate_json(data)
        except ValidationError:
            return f"what stands for intent {digest[:12]} is no intent"
        return None

    def take(self, event: Event) -> Iterator[str]:
        """What is wrong with the next event, given those before it."""
        run = self._runs.setdefault(event.correlation_id, _Run())
        decides = event.type not in (EventType.APPLY, EventType.RECEIPT)
        if event.type is EventType.POLICY_CHANGED:
            yield from self._of_policy(run, event)
        elif event.stream == event.correlation_id and decides:
            yield from self._of_run(run, event)
        elif event.stream == act_stream(event.correlation_id):
            yield from self._of_act(run, event)
        elif event.type in EFFECTS:
            # Elsewhere nobody would look for it, and no gate would be asked.
            yield "it is an effect, and does not stand in the stream of its run"

    def _of_run(self, run: _Run, event: Event) -> Iterator[str]:
        digest = event.body.get("digest")
        if event.type is EventType.INTENT:
            if self._streams.setdefault(str(digest), event.stream) != event.stream:
                yield f"intent {digest} stands in another run already"
            intent = self._intents.get(str(digest))
            if intent is not None and intent.workflow_id != event.stream:
                yield f"intent {digest} was bound for another run"
        elif event.type is EventType.VERDICT and self._streams.get(str(digest)) != event.stream:
            yield "it is a verdict on an intent that does not stand before it in this run"
        run.entries.append(
            Entry(version=event.version, type=event.type, body=event.body, recorded_at=event.recorded_at)
        )
        if event.type is EventType.OUTCOME and event.body.get("status") != Status.IN_DOUBT:
            # Nothing may follow, so nothing of it is needed but that it ended.
            run.entries = run.entries[-1:]
            run.ended = True
            run.still_undoing = event.body.get("status") == Status.COMPENSATION_FAILED

    def _of_act(self, run: _Run, event: Event) -> Iterator[str]:
        key = str(event.body.get("key"))
        if event.type is EventType.ABSENT:
            run.closed.add(key)
        elif event.type is EventType.IN_DOUBT:
            run.doubtful.add(key)
        elif event.type in EFFECTS:
            yield from self._of_effect(run, event, key)

    def _of_effect(self, run: _Run, event: Event, key: str) -> Iterator[str]:
        digest, action = str(event.body.get("digest")), int(event.body.get("action", -1))
        plain = action_key(digest, action)
        if key not in (plain, plain + UNDO):
            yield f"action key {key} is not that of action {action} of intent {digest}"
            return
        if key in run.closed:
            yield f"action {key} was closed before"
        if event.type is EventType.RECEIPT:
            yield from _receipt(run, key)
        elif key in run.confirmed:
            yield f"action {key} was done already"
        elif (event.type is EventType.COMPENSATION) != key.endswith(UNDO):
            yield f"action {key} is not what a {event.type} is for"
        else:
            run.attempted.add(key)
            why = self._forbids(run, event, digest, action, key)
            if why is not None:
                yield f"action {key} was not allowed: {why}"

    def _of_policy(self, run: _Run, event: Event) -> Iterator[str]:
        """A policy changes while an attempt that was allowed goes on, once, and by nothing else."""
        key, digest = str(event.body.get("key")), str(event.body.get("digest"))
        plain, intent = action_key(digest, 0), self._intents.get(digest)
        if key != plain + (UNDO if "withdraws" in event.body else ""):
            yield f"action key {key} is not that of a change of policy by intent {digest}"
        if event.stream != policy_stream(str(event.body.get("agent"))):
            yield "it stands in the stream of another agent's policy"
        if key not in run.attempted or key in run.confirmed | run.changed | run.closed:
            yield f"policy was changed under {key}, and no attempt that was allowed went on"
        if intent is not None and any(plan.connector != GATE_POLICY for plan in intent.plans):
            yield f"policy was changed by intent {digest}, which is about something else"
        run.changed.add(key)

    def _forbids(self, run: _Run, event: Event, digest: str, action: int, key: str) -> str | None:
        if key.endswith(UNDO):
            done = action_key(digest, action) in run.confirmed
            return may_undo(run.entries, digest, action) or (None if done else "it has no receipt")
        if run.ended:
            return "the run has ended"
        intent = self._intents.get(digest)
        if intent is None:
            self.missing.add(digest)
            return None
        if (intent.workflow_id, intent.tenant) != (event.correlation_id, event.log_id):
            return "its intent was bound for another run"
        if all(plan.action != action for plan in intent.plans):
            return "it is not part of the intent"
        return may_act(run.entries, intent, digest, event.recorded_at)


def _receipt(run: _Run, key: str) -> Iterator[str]:
    if key not in run.attempted:
        yield f"action {key} has a receipt and was never attempted"
    if key in run.confirmed:
        yield f"action {key} has a second receipt"
    expected = key in run.doubtful or (run.still_undoing and key.endswith(UNDO))
    if run.ended and not expected:
        yield f"action {key} happened after the run had ended"
    run.confirmed.add(key)
