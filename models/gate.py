"""The gate: whether an intent has the verdicts it needs. Pure, so that who waits and who acts agree.

A payload from a person or a program is read leniently by `read_message`; only `judge` decides whether it
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, cast

from pydantic import ValidationError

from models.answers import ANYBODY, Answer, Identity, Kind, Refusal, Verdict, recorded
from models.canonical import Digest
from models.glass import glass_fault, glass_holds
from models.ledger import Entry, EventType
from models.loop import Assurance, Frozen, GateRule, Intent, Name
from models.policy import change_fault, counts, passes_alone, risk

LEVELS = tuple(Assurance)


class Judged(Frozen):
    """The reply to an answer."""

    counted: bool
    state: str
    digest: Digest | None = None
    field: str = ""
    remedy: str = ""


class Standing(StrEnum):
    """What the gate says about an intent."""

    WAITING = "waiting"
    PASSED = "passed"
    REJECTED = "rejected"
    REVISED = "revised"
    EXPIRED = "expired"


def read_message(kind: Kind, payloads: Sequence[Any]) -> Answer | Refusal:
    """Read whatever arrived as an answer; anything else becomes a refusal that says what to send."""
    if len(payloads) != 1:
        count = "nothing" if not payloads else f"{len(payloads)} payloads"
        return Refusal(
            kind=kind, field="input", remedy=f"got {count}; send one JSON object with digest and approver"
        )
    payload = payloads[0]
    if not isinstance(payload, dict):
        return Refusal(kind=kind, field="input", remedy="send one JSON object with digest and approver")
    given = cast(dict[str, Any], payload)
    try:
        answer = Answer.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = _printable(".".join(str(part) for part in first["loc"])) or "input"
        return Refusal(
            kind=kind,
            field=field,
            remedy=f"{first['msg']}; copy the JSON from the card",
            approver=_claimed(given),
        )
    if kind is Kind.REVISE and not answer.comment.strip():
        return Refusal(kind=kind, field="comment", remedy="say what to change", approver=answer.approver)
    if kind is Kind.DELEGATE and not answer.to:
        return Refusal(
            kind=kind, field="to", remedy="name who should answer instead", approver=answer.approver
        )
    return answer


def judge(
    kind: Kind,
    answer: Answer,
    intent: Intent,
    digest: str,
    counted: Iterable[Verdict],
    closes_at: datetime,
    now: datetime,
    identity: Identity = ANYBODY,
) -> Verdict | Refusal:
    """Decide whether an answer counts towards the intent named by `digest`."""

    def refuse(field: str, remedy: str) -> Refusal:
        return Refusal(kind=kind, field=field, remedy=remedy, approver=answer.approver)

    if answer.digest != digest:
        return refuse(
            "digest", f"{answer.digest[:12]}… is not what is waiting; read the card and answer {digest}"
        )
    if now > closes_at:
        return refuse("digest", f"the intent expired at {closes_at.isoformat()}; start the request again")
    fault = unfit(kind, answer, intent, identity) or _partial(kind, answer, intent, now)
    if fault is not None:
        return refuse(*fault)
    verdicts = tuple(counted)
    if standing(intent, verdicts) is not Standing.WAITING:
        return refuse("digest", "a verdict on it has already counted; nothing more is needed")
    fault = _not_theirs(kind, answer, intent.gate, verdicts, now) or _repeated(kind, answer, verdicts)
    if fault is not None:
        return refuse(*fault)
    return recorded(kind, answer, identity)


def unfit(kind: Kind, answer: Answer, intent: Intent, identity: Identity) -> tuple[str, str] | None:
    """Field and remedy when this person, so known, may not give this answer."""
    rule = intent.gate
    if identity.remedy:
        return identity.field, identity.remedy
    if answer.role is not None and identity.roles is not None and answer.role not in identity.roles:
        return "role", f"you have the roles {', '.join(identity.roles) or 'none'}; answer in one of them"
    if LEVELS.index(identity.assurance) < LEVELS.index(rule.assurance):
        return "signature", f"policy wants a {rule.assurance} answer; use --sign KEY"
    if rule.hardware and kind is Kind.APPROVE and not identity.hardware:
        return "signature", "policy wants it signed by a security key; use --sign with the key on the device"
    if answer.break_glass:
        return glass_fault(kind, answer, intent, identity)
    if answer.review:
        return None
    if rule.roles and kind is Kind.APPROVE and answer.role not in rule.roles:
        return "role", f"answer with one of the roles {', '.join(rule.roles)}"
    return None


def _partial(kind: Kind, answer: Answer, intent: Intent, now: datetime) -> tuple[str, str] | None:
    """Field and remedy when who wants it would also be who lets it happen."""
    if answer.break_glass:
        return None
    if kind is Kind.APPROVE and _wants_it(intent, answer.approver):
        return "approver", "whoever asked for it cannot approve it; somebody else has to"
    if kind is not Kind.DELEGATE:
        return None
    if _wants_it(intent, answer.approver):
        return "approver", "whoever asked for it cannot choose who answers; somebody else has to"
    if answer.to is not None and _wants_it(intent, answer.to):
        return "to", "they asked for it and cannot approve it; name somebody else"
    if answer.until is not None and answer.until <= now:
        return "until", "that time is past already; name a later one"
    return None


def _wants_it(intent: Intent, name: str) -> bool:
    if same_person(name, intent.proposer):
        return True
    asked = intent.requester is not None and same_person(name, intent.requester)
    return asked and not intent.gate.self_approval


def _not_theirs(
    kind: Kind, answer: Answer, rule: GateRule, verdicts: Sequence[Verdict], now: datetime
) -> tuple[str, str] | None:
    """Field and remedy when the question is in somebody else's hands."""
    if answer.break_glass:
        return None
    if kind is Kind.REJECT and answer.role is not None and answer.role in rule.veto_roles:
        return None
    hands = _hands(verdicts, now)
    if hands.holder is not None and not same_person(answer.approver, hands.holder):
        return "approver", f"this was delegated to {hands.holder}; only they can answer"
    if (ended := hands.ended.get(answer.approver.casefold())) is not None:
        return "approver", f"the delegation to you ended at {ended.isoformat()}; ask for a new one"
    return None


def _repeated(kind: Kind, answer: Answer, verdicts: Sequence[Verdict]) -> tuple[str, str] | None:
    """Field and remedy when it was said before."""
    if answer.nonce is not None and any(verdict.nonce == answer.nonce for verdict in verdicts):
        return "nonce", "this very answer has counted already; sign a new one"
    approved = (v for v in verdicts if v.kind is Kind.APPROVE)
    if kind is Kind.APPROVE and any(same_person(v.approver, answer.approver) for v in approved):
        return "approver", "this person has approved already; a different one is needed"
    return None


def _sure_enough(verdict: Verdict, rule: GateRule) -> bool:
    sure = LEVELS.index(verdict.assurance) >= LEVELS.index(rule.assurance)
    return sure and (verdict.hardware or not rule.hardware)


def standing(intent: Intent, verdicts: Iterable[Verdict]) -> Standing:
    """What counted verdicts, in the order in which they were recorded, amount to."""
    if is_automatic(intent):
        return Standing.PASSED
    approvals: dict[str, Name | None] = {}
    for verdict in verdicts:
        if verdict.kind is Kind.REJECT:
            return Standing.REJECTED
        if verdict.kind is Kind.REVISE:
            return Standing.REVISED
        if verdict.kind is not Kind.APPROVE:
            continue
        if verdict.break_glass and glass_holds(intent, verdict):
            return Standing.PASSED
        if verdict.break_glass or _wants_it(intent, verdict.approver):
            continue
        if _sure_enough(verdict, intent.gate):
            approvals[verdict.approver.casefold()] = verdict.role
            if _sufficient(intent.gate, approvals):
                return Standing.PASSED
    return Standing.WAITING


def is_automatic(intent: Intent) -> bool:
    """No person is needed: the gate's own limits say so, or a narrow grant that was bound into it."""
    use = intent.use
    granted = use is not None and counts(use, intent.plans, intent.created_at)
    return granted or passes_alone(intent.gate, intent.plans)


@dataclass(frozen=True, slots=True)
class _Hands:
    """In whose hands the question is, and whose delegation has ended when."""

    holder: str | None
    ended: dict[str, datetime]


def _hands(verdicts: Iterable[Verdict], now: datetime | None) -> _Hands:
    holder, ended = None, dict[str, datetime]()
    for verdict in verdicts:
        if verdict.kind is Kind.DELEGATE and verdict.to is not None:
            if now is not None and verdict.until is not None and verdict.until < now:
                # Whose hands it was in before does not get it back by itself; anybody may answer again.
                holder = None
                ended[verdict.to.casefold()] = verdict.until
            else:
                holder = verdict.to
                ended.pop(holder.casefold(), None)
        elif holder is not None and same_person(verdict.approver, holder):
            holder = None
    return _Hands(holder, ended)


def assignee(verdicts: Iterable[Verdict], now: datetime | None = None) -> str | None:
    """The person it was last delegated to, until they have approved or their time is up."""
    return _hands(verdicts, now).holder


def same_person(one: str, other: str) -> bool:
    """Whether two names are one person's; upper and lower case do not make two people."""
    return one.casefold() == other.casefold()


def closes_at(intent: Intent, delivered_at: datetime | None) -> datetime:
    """Expiry runs from the first delivery; the absolute limit always runs."""
    if delivered_at is None:
        return intent.expires_at
    seconds = intent.gate.expire_by_class.get(risk(intent.plans), intent.gate.expire_seconds)
    return min(intent.expires_at, delivered_at + timedelta(seconds=seconds))


def counted_verdicts(entries: Iterable[Entry], digest: str) -> tuple[Verdict, ...]:
    """Verdicts on one digest among a stream's events, in order."""
    bodies = (entry.body for entry in entries if entry.type is EventType.VERDICT)
    return tuple(Verdict.model_validate(body) for body in bodies if body.get("digest") == digest)


def may_act(
    entries: Sequence[Entry],
    intent: Intent,
    digest: str,
    now: datetime,
    doubt: Callable[[Verdict], str | None] = lambda verdict: None,
) -> str | None:
    """Why an effect of this intent may not happen now; `None` if it may. For the worker that acts.

    Args:
        entries: the whole stream of the run, in order.
        intent: read from the bytes that `digest` names.
        digest: what was approved.
        now: the time.
        doubt: why an approval is not believed any more: a key that was revoked, a role that was taken away.
    """
    if (wrong := change_fault(intent)) is not None:
        return wrong
    logged = [entry for entry in entries if entry.type is EventType.INTENT]
    if not logged or all(entry.body.get("digest") != digest for entry in logged):
        return "no such intent stands in the ledger"
    if logged[-1].body.get("digest") != digest:
        return "a later intent replaced this one"
    if any(entry.type is EventType.OUTCOME for entry in entries):
        return "the run has ended"
    if any(_late(entry, intent, digest) for entry in entries):
        return "a verdict was recorded after the absolute limit"
    if any(_is_over(entry, digest) for entry in entries):
        return "the intent expired, drifted or is being taken back"
    if intent.proposal.not_before is not None and now < intent.proposal.not_before:
        return f"it may not happen before {intent.proposal.not_before.isoformat()}"
    if (outrun := _outrun(entries, digest)) is not None:
        return outrun
    verdicts = counted_verdicts(entries, digest)
    doubts = [why for verdict in verdicts if verdict.kind is Kind.APPROVE and (why := doubt(verdict))]
    believed = [verdict for verdict in verdicts if verdict.kind is not Kind.APPROVE or not doubt(verdict)]
    now_stands = standing(intent, believed)
    if now_stands is Standing.PASSED:
        return None
    return "; ".join([f"the gate says {now_stands}", *doubts])


def may_undo(entries: Sequence[Entry], digest: str, action: int) -> str | None:
    """Why an applied action may not be taken back now; `None` if its run has decided to."""
    if any(entry.type is EventType.OUTCOME for entry in entries):
        return "the run has ended"
    decided = (entry.body for entry in entries if entry.type is EventType.COMPENSATION)
    if not any(body.get("digest") == digest and action in body.get("actions", ()) for body in decided):
        return "the run has not decided to take it back"
    return None


def _late(entry: Entry, intent: Intent, digest: str) -> bool:
    is_ours = entry.type is EventType.VERDICT and entry.body.get("digest") == digest
    return is_ours and entry.recorded_at > intent.expires_at


def _outrun(entries: Iterable[Entry], digest: str) -> str | None:
    """Who answered after their delegation had ended, by the time at which the ledger took it."""
    before: list[Verdict] = []
    for entry in entries:
        if entry.type is not EventType.VERDICT or entry.body.get("digest") != digest:
            continue
        verdict = Verdict.model_validate(entry.body)
        ended = _hands(before, entry.recorded_at).ended
        counts = verdict.kind is Kind.APPROVE and not verdict.break_glass
        if counts and verdict.approver.casefold() in ended:
            return f"the delegation to {verdict.approver} had ended when their answer was recorded"
        before.append(verdict)
    return None


def _is_over(entry: Entry, digest: str) -> bool:
    """Whether an event ends what an intent allows, however many approvals it has."""
    if entry.body.get("digest") != digest:
        return False
    expired = entry.type is EventType.GATE and entry.body.get("standing") == Standing.EXPIRED
    return expired or entry.type in (EventType.DRIFT, EventType.COMPENSATION)


def _sufficient(rule: GateRule, approvals: dict[str, Name | None]) -> bool:
    covered = {role for role in approvals.values() if role is not None}
    return len(approvals) >= rule.approvals and covered.issuperset(rule.roles)


def _claimed(given: dict[str, Any]) -> str:
    name = given.get("approver")
    return (_printable(name) if isinstance(name, str) else "") or "unknown"


def _printable(text: str) -> str:
    """At most 80 characters that every encoding takes; a stranger chose them."""
    return text[:80].encode("ascii", "backslashreplace").decode()
