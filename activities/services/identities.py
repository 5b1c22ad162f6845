"""Who answered: established when an answer comes, and once more before anything is done because of it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from pydantic import ValidationError

from activities.services.signatures import check, fingerprint, on_device
from models.canonical import sha256
from models.gate import ANYBODY, Answer, Identity, Kind, Verdict
from models.loop import Assurance
from models.orders import Identification
from models.people import People, Person, Statement

LONGEST = timedelta(days=1)
"""How long a signed answer may be meant to count before it reaches us."""
SKEW = timedelta(minutes=5)


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
        statement = _of_verdict(tenant, verdict)
        if statement is None or verdict.signature is None:
            return f"what {verdict.approver} signed cannot be put together"
        key, reason = check(verdict.signature, statement.bytes(), person, self._clock())
        if key is not None and fingerprint(key.public) != verdict.key:
            return f"the signature of {verdict.approver} is by another key than the one recorded"
        if key is not None and verdict.hardware and not on_device(key):
            return f"the signature of {verdict.approver} is not by a security key, as was recorded"
        return None if key is not None else f"the signature of {verdict.approver}: {reason}"

    def _signed(self, tenant: str, kind: Kind, answer: Answer, person: Person) -> Identity:
        statement = statement_of(tenant, kind, answer)
        if statement is None:
            remedy = "a signed answer needs nonce, issued_at and expires_at; use countersign approve --sign"
            return Identity(field="signature", remedy=remedy)
        now = self._clock()
        if not statement.issued_at <= now + SKEW or now >= statement.expires_at:
            return Identity(field="expires_at", remedy="the answer is not valid now; sign again")
        if statement.expires_at - statement.issued_at > LONGEST:
            return Identity(field="expires_at", remedy=f"let it count for at most {LONGEST}; sign again")
        key, reason = check(answer.signature or "", statement.bytes(), person, now)
        if key is None:
            return Identity(field="signature", remedy=reason)
        by = fingerprint(key.public)
        return Identity(assurance=Assurance.SIGNED, roles=person.roles, key=by, hardware=on_device(key))


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
