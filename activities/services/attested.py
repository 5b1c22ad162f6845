"""Whether the answers that a log calls signed were signed, by the keys of people whom an auditor names.

What is wrong is a finding. What the file cannot tell, or what a worker may come to that was away for a while,
is a gap. The time that counts is the log's own; nobody can move it to before what stands before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import ValidationError

from activities.services.identities import SKEW, Untimely, signed_by, untimely
from activities.services.signers import Signers
from models.canonical import canonical
from models.gate import Verdict
from models.ledger import Event, EventType
from models.loop import Assurance

ANSWERS = (EventType.VERDICT, EventType.REVIEW)
NAMES = (
    "kind",
    "digest",
    "approver",
    "role",
    "to",
    "until",
    "break_glass",
    "review",
    "comment_sha256",
    "key",
)
SAID = (*NAMES, "hardware", "nonce", "issued_at", "expires_at", "signature")
"""What of an answer is looked at here; nothing else of it makes a signature good or bad."""


@dataclass(slots=True)
class Attested:
    """Follows the signed answers of one log."""

    signers: Signers | None
    """`None`: no file was given, so they are only counted."""
    checked: int = 0
    unchecked: int = 0
    gaps: list[str] = field(default_factory=list[str])
    _nonces: set[tuple[str, str, str | None]] = field(default_factory=set[tuple[str, str, str | None]])
    _hands: dict[tuple[str, str | None], str] = field(default_factory=dict[tuple[str, str | None], str])
    """Who answered an intent by which key."""
    _latest: datetime | None = None

    def take(self, event: Event) -> Iterator[str]:
        """What is wrong with the next event."""
        before, self._latest = self._latest, max(event.recorded_at, self._latest or event.recorded_at)
        if event.type not in ANSWERS or event.body.get("assurance") != Assurance.SIGNED:
            return
        if self.signers is None:
            self.unchecked += 1
            return
        self.checked += 1
        verdict = _said(event)
        if verdict is None:
            yield "it calls itself signed, and what was signed cannot be put together"
            return
        why, gaps = _judged(event, verdict, self.signers)
        if why is None:
            why = self._repeated(event, verdict)
        if why is not None:
            yield why
            return
        if before is not None and before - event.recorded_at > SKEW:
            gaps.append(f"events before it were recorded later than {event.recorded_at.isoformat()}")
        self.gaps += [f"event {event.seq}: {gap}, so whether it counted cannot be told" for gap in gaps]

    def _repeated(self, event: Event, verdict: Verdict) -> str | None:
        """What one answer, or one key, is said to have done twice."""
        once = (event.type, verdict.digest, verdict.nonce)
        if once in self._nonces:
            return f"the answer of {verdict.approver} with nonce {verdict.nonce} counted before"
        other = self._hands.setdefault((verdict.digest, verdict.key), verdict.approver)
        if other != verdict.approver:
            return f"{verdict.approver} answered by the key by which {other} answered: that is one person"
        self._nonces.add(once)
        return None


def _said(event: Event) -> Verdict | None:
    """What an event says was signed; `None` if it is not written as a verdict is."""
    said = {name: event.body[name] for name in SAID if name in event.body}
    if said.get("hardware") is False:
        del said["hardware"]
    try:
        verdict = Verdict.model_validate(said)
        # Of two spellings of a time or a number another program might read the other.
        written = verdict.model_dump(mode="json", include=set(said))
        return verdict if canonical(written) == canonical(said) else None
    except (ValidationError, ValueError):
        return None


def _judged(event: Event, verdict: Verdict, signers: Signers) -> tuple[str | None, list[str]]:
    """What is wrong with a verdict by itself, and what cannot be told of it."""
    person = signers.of(verdict.approver)
    if person is None:
        return f"{verdict.approver[:80]} is said to have signed, and is not named by the signers given", []
    key, why = signed_by(event.log_id, verdict, person, event.recorded_at)
    if key is None:
        return why, []
    line = signers.line(key)
    if line.roles is not None and verdict.role is not None and verdict.role not in line.roles:
        return f"{verdict.approver} answered as {verdict.role}, and has no such role", []
    if verdict.issued_at is None or verdict.expires_at is None:
        raise ValueError("a statement has both")
    untimed = untimely(verdict.issued_at, verdict.expires_at, event.recorded_at)
    if untimed in (Untimely.EARLY, Untimely.LONG):
        return f"the answer of {verdict.approver} {untimed}", []
    gaps = [f"the answer of {verdict.approver} {untimed}"] if untimed is not None else []
    if line.revoked:
        gaps.append(f"the key of {verdict.approver} was revoked, since when is not said (see valid-before)")
    return None, gaps
