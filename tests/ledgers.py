"""Logs of whole runs, made without Temporal, for what reads logs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, text

from activities.services.content import put_blob, put_model
from activities.services.database import Database
from activities.services.ledger_store import add_in
from models.canonical import derived_id
from models.ledger import Draft, EventType, act_stream
from models.loop import (
    Action,
    GateRule,
    Guarantee,
    Intent,
    Outcome,
    Plan,
    Proposal,
    Receipt,
    Reversibility,
    Status,
    action_key,
)

TENANT = "default"
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
LOG = ("event", "merkle_node", "checkpoint")
"""Tables of which nothing may be changed or deleted."""
Step = tuple[EventType, dict[str, Any]]


def unguard(link: Connection, *tables: str) -> None:
    """Do away with what keeps tables from being changed, as whoever has the database can."""
    for table in tables or LOG:
        for change in ("update", "delete"):
            link.execute(text(f"DROP TRIGGER IF EXISTS {table}_no_{change}"))


def wipe(link: Connection, *tables: str, tenant: str = TENANT) -> None:
    """Take a log away, and with it what these tables hold of it."""
    tables = tables or LOG
    unguard(link, *tables)
    for table in (*tables, "log_head"):
        link.execute(text(f"DELETE FROM {table} WHERE log_id = :log"), {"log": tenant})


def asked(event_id: str, stream: str = "s", **body: Any) -> Draft:
    """An event of no run."""
    return Draft(
        event_id=event_id,
        stream=stream,
        type=EventType.REQUEST,
        actor_kind="system",
        actor_ref="test",
        correlation_id=stream,
        body=body,
    )


def intent_of(link: Connection, run: str, gate: GateRule, reversibility: Reversibility) -> tuple[Intent, str]:
    """An intent of one action, stored."""
    arguments = put_blob(link, TENANT, f'{{"text":"{run}"}}'.encode(), "application/json")
    diff = put_blob(link, TENANT, b"+ note", "text/x-diff")
    action = Action(connector="null", operation="note", arguments=arguments, title="Note")
    plan = Plan(
        action=0,
        connector="null",
        operation="note",
        target="notes",
        target_version="0",
        diff=diff,
        reversibility=reversibility,
        guarantee=Guarantee.KEYED,
        undo="delete it",
    )
    intent = Intent(
        tenant=TENANT,
        workflow_id=run,
        request_key=run,
        number=1,
        proposer="external",
        proposal=Proposal(agent="external", title="Note", actions=(action,)),
        plans=(plan,),
        gate=gate,
        policy_digest="0" * 64,
        card_digest="1" * 64,
        created_at=NOW,
        expires_at=NOW + timedelta(seconds=gate.absolute_seconds),
        nonce=run,
    )
    return intent, put_model(link, TENANT, intent).digest


def whole(digest: str, run: str) -> list[Step]:
    """What a run that one person approves leaves, in its own stream before and after the effect."""
    return [
        (EventType.REQUEST, {"agent": "external"}),
        (EventType.INTENT, {"digest": digest, "number": 1}),
        (EventType.DELIVERY, {"digest": digest, "channel": "inbox", "at": NOW.isoformat()}),
        (EventType.VERDICT, {"digest": digest, "kind": "approve", "approver": "ann", "assurance": "claimed"}),
        (EventType.APPLY, {"attempt": 1}),
        (EventType.RECEIPT, receipt_of(digest)),
        (EventType.OUTCOME, Outcome(status=Status.EXECUTED, workflow_id=run).model_dump(mode="json")),
    ]


def receipt_of(digest: str) -> dict[str, Any]:
    """What the target said."""
    key = action_key(digest, 0)
    return Receipt(action_key=key, action=0, reference="r1", version="1").model_dump(mode="json")


def record(link: Connection, run: str, digest: str, steps: Sequence[Step], now: datetime = NOW) -> None:
    """Append a run's events; effects go to its act stream."""
    for place, (kind, body) in enumerate(steps):
        at_target = kind in (EventType.APPLY, EventType.RECEIPT, EventType.ABSENT, EventType.IN_DOUBT)
        # A verdict's key is a person's.
        at_target = at_target or bool(body.get("key") and kind is not EventType.VERDICT)
        if at_target:
            body = {"key": action_key(digest, 0), "digest": digest, "action": 0} | body
        stream = act_stream(run) if at_target else run
        draft = Draft(
            event_id=derived_id(run, place),
            stream=stream,
            type=kind,
            actor_kind="agent",
            actor_ref="external",
            correlation_id=run,
            body=body,
        )
        add_in(link, TENANT, draft, now + timedelta(seconds=place))


async def fill(database: Database, runs: int, first: int = 0) -> None:
    """Append whole runs."""

    def work(link: Connection) -> None:
        for number in range(first, first + runs):
            run = f"run-{number}"
            _, digest = intent_of(link, run, GateRule(), Reversibility.REVERSIBLE)
            record(link, run, digest, whole(digest, run))

    await database.write(work)
