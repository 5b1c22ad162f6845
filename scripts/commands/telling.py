"""Ledger events in plain words, for people who read what happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from models.card import visible
from models.ledger import Event, EventType
from scripts.commands.ledger import detail

Body = Mapping[str, Any]
Texts = Mapping[str, str]
"""What is known of the texts that events refer to, by digest: titles of proposals, comments of people."""
WORDS = 300


def told(event: Event, texts: Texts) -> str:
    """What happened, as one line."""
    words = TELL.get(event.type, _plain(event))
    try:
        text = words(event.body, texts)
    except (KeyError, TypeError, ValueError):
        # Written by another version, which said it otherwise.
        text = _plain(event)(event.body, texts)
    return visible(" ".join(text.split()))[:WORDS]


def is_minor(event: Event) -> bool:
    """Whether the events around it say as much."""
    if event.type is EventType.ABSENT:
        return str(event.body.get("reason", "")).startswith("drift: ")
    return event.type is EventType.PLAN or (
        event.type is EventType.DELIVERY and event.body.get("channel", "inbox") == "inbox"
    )


def digests(event: Event) -> tuple[str, ...]:
    """Texts that its words are better with."""
    wanted = {EventType.PROPOSAL: "proposal", EventType.VERDICT: "comment"}.get(event.type)
    ref = event.body.get(wanted) if wanted is not None else None
    return (str(ref["digest"]),) if isinstance(ref, dict) and "digest" in ref else ()


def _plain(event: Event) -> Callable[[Body, Texts], str]:
    return lambda body, texts: f"{event.type.value} {detail(event)}"


def _request(body: Body, texts: Texts) -> str:
    return f"{body['agent']} is asked (request {body['key']})"


def _proposal(body: Body, texts: Texts) -> str:
    actions = ", ".join(f"{one['operation']} on {one['connector']}" for one in body.get("actions", ()))
    title = texts.get(str(body["proposal"]["digest"]), "a text that is gone")
    return f"proposed: {title} ({actions})"


def _plan(body: Body, texts: Texts) -> str:
    plans = (
        f"{one['operation']} on {one['connector']} at version {one['version'][:12]}" for one in body["plans"]
    )
    return f"tried dry: {', '.join(plans)}"


def _intent(body: Body, texts: Texts) -> str:
    return f"put to the gate as intent {body['number']} ({body['digest'][:12]})"


def _delivery(body: Body, texts: Texts) -> str:
    return f"shown on {body.get('channel', 'inbox')}"


def _verdict(body: Body, texts: Texts) -> str:
    ref = body.get("comment")
    comment = texts.get(str(ref["digest"]), "") if isinstance(ref, dict) else ""
    to = f" to {body['to']}" if body.get("to") else ""
    return f"{body['approver']}: {body['kind']}{to} {body['digest'][:12]}" + (
        f', "{comment}"' if comment else ""
    )


def _gate(body: Body, texts: Texts) -> str:
    return f"the gate: {body['standing']}"


def _route(body: Body, texts: Texts) -> str:
    return f"{body['route']['purpose']} goes to {', '.join(body['route']['tiers'])}"


def _apply(body: Body, texts: Texts) -> str:
    attempt = int(body.get("attempt", 1))
    return f"action {int(body['action']) + 1} begins" + (f", attempt {attempt}" if attempt > 1 else "")


def _receipt(body: Body, texts: Texts) -> str:
    undone = " is taken back" if str(body["key"]).endswith(".undo") else " is done"
    return f"action {int(body['action']) + 1}{undone}: {' '.join(body['links']) or body['reference'][:60]}"


def _absent(body: Body, texts: Texts) -> str:
    what = "was not taken back" if str(body.get("key")).endswith(".undo") else "did not happen"
    return f"action {int(body['action']) + 1} {what}: {body['reason']}"


def _drift(body: Body, texts: Texts) -> str:
    return f"not carried out as it was approved: {body['reason']}"


def _outcome(body: Body, texts: Texts) -> str:
    return f"ended: {body['status']}" + (f", {body['reason']}" if body.get("reason") else "")


TELL: dict[EventType, Callable[[Body, Texts], str]] = {
    EventType.REQUEST: _request,
    EventType.PROPOSAL: _proposal,
    EventType.PLAN: _plan,
    EventType.INTENT: _intent,
    EventType.DELIVERY: _delivery,
    EventType.VERDICT: _verdict,
    EventType.GATE: _gate,
    EventType.ROUTE: _route,
    EventType.APPLY: _apply,
    EventType.RECEIPT: _receipt,
    EventType.ABSENT: _absent,
    EventType.DRIFT: _drift,
    EventType.OUTCOME: _outcome,
}
