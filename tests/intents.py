"""Intents, verdicts and events made by hand, for tests of the pure rules."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from models.canonical import digest_of, sha256
from models.gate import Kind, Verdict
from models.ledger import Entry, EventType
from models.loop import Action, GateRule, Guarantee, Intent, Plan, Proposal, Ref, Reversibility

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def ref(text: str) -> Ref:
    return Ref(digest=sha256(text.encode()), size=len(text.encode()))


def an_intent(
    gate: GateRule | None = None,
    kinds: tuple[Reversibility, ...] = (Reversibility.REVERSIBLE,),
    **more: Any,
) -> Intent:
    actions = tuple(
        Action(connector="null", operation="note", arguments=ref(str(n)), title=f"Note {n}")
        for n in range(len(kinds))
    )
    plans = tuple(
        Plan(
            action=n,
            connector="null",
            operation="note",
            target="null:notes",
            target_version="0",
            diff=ref(f"diff {n}"),
            reversibility=kind,
            guarantee=Guarantee.KEYED,
            undo="take it back",
        )
        for n, kind in enumerate(kinds)
    )
    proposal = Proposal(agent="external", title="Do it", actions=actions)
    fields: dict[str, Any] = {
        "tenant": "default",
        "workflow_id": "external-1",
        "request_key": "k",
        "number": 1,
        "proposer": "external",
        "proposal": proposal,
        "plans": plans,
        "gate": gate or GateRule(),
        "policy_digest": "0" * 64,
        "card_digest": "0" * 64,
        "created_at": START,
        "expires_at": START + 30 * DAY,
        "nonce": "n",
    }
    return Intent(**(fields | more))


def a_verdict(kind: Kind, digest: str, approver: str = "ann", **more: Any) -> Verdict:
    return Verdict(kind=kind, digest=digest, approver=approver, **more)


def a_stream(*events: tuple[EventType, dict[str, Any]], at: datetime = START) -> tuple[Entry, ...]:
    return tuple(
        Entry(version=n, type=kind, body=body, recorded_at=at) for n, (kind, body) in enumerate(events, 1)
    )


def passed(
    intent: Intent, *more: tuple[EventType, dict[str, Any]], at: datetime = START
) -> tuple[Entry, ...]:
    """A stream in which this intent was approved by one person, and what came after."""
    digest = digest_of(intent)
    verdict = a_verdict(Kind.APPROVE, digest).model_dump(mode="json")
    logged = (EventType.INTENT, {"digest": digest, "number": intent.number})
    return a_stream((EventType.REQUEST, {}), logged, (EventType.VERDICT, verdict), *more, at=at)
