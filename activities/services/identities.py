"""Who answered: established when an answer comes, and once more before anything is done because of it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import ValidationError

from activities.services.signatures import check, fingerprint, on_device
from models.canonical import sha256
from models.gate import ANYBODY, Answer, Identity, Kind, Verdict
from models.loop import Assurance
from models.orders import Identification
from models.people import Key, People, Person, Statement

LONGEST = timedelta(days=1)
"""How long a signed answer may be meant to count before it reaches us."""
SKEW = timedelta(minutes=5)
"""How far a clock may be off."""


class Untimely(StrEnum):
    """What is wrong with when a signed answer came."""

    EARLY = "came before it was made"
    LATE = "came after it had ended"
    LONG = "was to count for more than a day"


REMEDIES = {
    Untimely.EARLY: "the answer is not valid now; sign again",
    Untimely.LATE: "the answer is not valid now; sign again",
    Untimely.LONG: f"let it count for at most {LONGEST}; sign again",
}


class Identities:
    """Knows the people of settings."""

    def __init__(self, people: People, clock: Callable[[], datetime]) -> None:
        """Keys have dates, so there is a clock."""
        self._people = people
        self._clock = clock

    async def identify(self, wanted: Identification) -> Identity:
        """Who gave this answer, or why that cannot be established."""
        if not self._people.people:
            return ANYBODY
        answer = wanted.answer
        person = self._people.of(answer.approver)
        if person is None:
            return Identity(field="approver", remedy="nobody of that name may answer; see people in settings")
        if wanted.kind is Kind.DELEGATE and answer.to is not None and self._people.of(answer.to) is None:
            # In the hands of nobody it would wait until it expires.
            return Identity(field="to", remedy="nobody of that name may answer; see people in settings")
        if answer.signature is None:
            return Identity(roles=person.roles)
        return self._signed(wanted.tenant, wanted.kind, answer, person)

    def doubt(self, tenant: str, verdict: Verdict) -> str | None:
        """Why a recorded verdict is not believed any more; `None` if it is."""
        if not self._people.people:
            return None
        person = self._people.of(verdict.approver)
        if person is None:
            return f"{verdict.approver} may not answer any more"
        if verdict.role is not None and verdict.role not in person.roles:
            return f"{verdict.approver} has the role {verdict.role} no more"
        if verdict.assurance is not Assurance.SIGNED:
            return None
        return signed_by(tenant, verdict, person, self._clock())[1] or None

    def _signed(self, tenant: str, kind: Kind, answer: Answer, person: Person) -> Identity:
        statement = statement_of(tenant, kind, answer)
        if statement is None:
            remedy = "a signed answer needs nonce, issued_at and expires_at; use countersign approve --sign"
            return Identity(field="signature", remedy=remedy)
        now = self._clock()
        if (fault := untimely(statement.issued_at, statement.expires_at, now)) is not None:
            return Identity(field="expires_at", remedy=REMEDIES[fault])
        key, reason = check(answer.signature or "", statement.bytes(), person, now)
        if key is None:
            return Identity(field="signature", remedy=reason)
        by = fingerprint(key.public)
        return Identity(assurance=Assurance.SIGNED, roles=person.roles, key=by, hardware=on_device(key))


def untimely(issued_at: datetime, expires_at: datetime, now: datetime) -> Untimely | None:
    """What is wrong with when an answer came; `None` if nothing."""
    if issued_at - now > SKEW:
        return Untimely.EARLY
    if expires_at - issued_at > LONGEST:
        return Untimely.LONG
    return Untimely.LATE if now >= expires_at else None


def signed_by(tenant: str, verdict: Verdict, person: Person, now: datetime) -> tuple[Key | None, str]:
    """The key by which this person signed a recorded verdict, or why none of theirs did.

    Args:
        tenant: whose log the verdict stands in.
        verdict: as it was recorded.
        person: whose keys count.
        now: keys have dates.
    """
    statement = _of_verdict(tenant, verdict)
    if statement is None or verdict.signature is None:
        return None, f"what {verdict.approver} signed cannot be put together"
    key, reason = check(verdict.signature, statement.bytes(), person, now)
    if key is None:
        return None, f"the signature of {verdict.approver}: {reason}"
    if fingerprint(key.public) != verdict.key:
        return None, f"the signature of {verdict.approver} is by another key than the one recorded"
    if verdict.hardware and not on_device(key):
        return None, f"the signature of {verdict.approver} is not by a security key, as was recorded"
    return key, ""


def statement_of(tenant: str, kind: Kind, answer: Answer) -> Statement | None:
    """What a signed answer must have been signed over; `None` when parts are missing."""
    return _statement(tenant, kind, answer.model_dump(), sha256(answer.comment.encode()))


def _of_verdict(tenant: str, verdict: Verdict) -> Statement | None:
    return _statement(tenant, verdict.kind, verdict.model_dump(), verdict.comment_sha256)


def _statement(
    tenant: str, kind: Kind, given: dict[str, object], comment_sha256: str | None
) -> Statement | None:
    names = ("digest", "approver", "role", "to", "until", "nonce", "issued_at", "expires_at")
    try:
        return Statement.model_validate(
            {name: given[name] for name in (*names, "break_glass", "review")}
            | {"tenant": tenant, "decision": kind.value, "comment_sha256": comment_sha256}
        )
    except ValidationError:
        return None
