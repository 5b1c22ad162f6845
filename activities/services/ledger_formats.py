"""The log in other people's words: OCSF for a SIEM, W3C PROV-JSON for whoever asks where something came from.

Both are views: they say what the log says and prove nothing by themselves. Each event carries its id and the
hash of its leaf, by which the export in our own format, or a proof, can be found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from activities.services.ledger_export import Header, Item, Leaf
from activities.services.merkle import leaf_hash
from models.errors import LedgerBroken
from models.ledger import Event, EventType
from models.loop import Status

Plain = dict[str, Any]
E = EventType

OCSF_VERSION = "1.6.0"
CLASS, CATEGORY = 6003, 6
"""API Activity, of the category Application Activity."""
CREATE, UPDATE, DELETE, OTHER = 1, 3, 4, 99
ACTIVITIES: Mapping[EventType, int] = {
    **dict.fromkeys((E.REQUEST, E.PROPOSAL, E.PLAN, E.INTENT, E.ROUTE, E.BELIEF, E.ERASURE_ORDER), CREATE),
    **dict.fromkeys((E.VERDICT, E.GATE, E.APPLY, E.RECEIPT, E.COMPENSATION, E.OUTCOME), UPDATE),
    **dict.fromkeys((E.KEY_ROTATED, E.POLICY_CHANGED, E.POLICY_NARROWED), UPDATE),
    E.ERASURE: DELETE,
}
"""What is not named here is 99, Other, with our word for it in `activity_name`."""
NAMES = {CREATE: "Create", UPDATE: "Update", DELETE: "Delete"}
SUCCESS, FAILURE, ELSE = (1, "Success"), (2, "Failure"), (99, "Other")
FAILED = frozenset((E.REFUSAL, E.NOTICE_FAILED, E.FALLBACK, E.DRIFT, E.ABSENT))
GOOD, SO_SO = frozenset((Status.EXECUTED,)), frozenset((Status.PARTLY_EXECUTED, Status.IN_DOUBT))
INFORMATIONAL, LOW, MEDIUM = (1, "Informational"), (2, "Low"), (3, "Medium")
SEVERITIES: Mapping[EventType, tuple[int, str]] = {
    E.REFUSAL: LOW,
    E.NOTICE_FAILED: LOW,
    E.DRIFT: LOW,
    E.IN_DOUBT: MEDIUM,
}


def to_ocsf(items: Iterable[Item]) -> Iterator[str]:
    """One API Activity event a line, in the order of the log.

    Raises:
        LedgerBroken: an event cannot be read.
    """
    for header, event in _events(items):
        yield _line(event, header.origin)


def to_prov(items: Iterable[Item]) -> Iterator[str]:
    """One PROV-JSON document for the whole log.

    Raises:
        LedgerBroken: an event cannot be read.
    """
    made = _Prov()
    for header, event in _events(items):
        made.prefix = f"urn:countersign:{quote(header.origin, safe='')}:"
        made.take(event)
    yield json.dumps(made.document(), indent=1, sort_keys=True)


def _events(items: Iterable[Item]) -> Iterator[tuple[Header, Event]]:
    header = Header("", "", 0, b"")
    for item in items:
        if isinstance(item, Header):
            header = item
        elif isinstance(item, Leaf):
            yield header, _event(item)


def _event(leaf: Leaf) -> Event:
    try:
        plain = json.loads(leaf.envelope) | {"leaf_hash": leaf_hash(leaf.envelope).hex()}
        return Event.model_validate(plain)
    except (ValueError, TypeError, ValidationError, RecursionError):
        raise _unreadable(leaf.seq) from None


def _unreadable(seq: int) -> LedgerBroken:
    return LedgerBroken(f"event {seq} cannot be read; run `countersign ledger verify` before you export")


# OCSF.


def _line(event: Event, origin: str) -> str:
    try:
        return json.dumps(_ocsf(event, origin), separators=(",", ":"), sort_keys=True, allow_nan=False)
    except (ValueError, RecursionError):
        # Numbers beyond all bounds are read as infinite, and no JSON; the ledger writes none.
        raise _unreadable(event.seq) from None


def _ocsf(event: Event, origin: str) -> Plain:
    activity = ACTIVITIES.get(event.type, OTHER)
    (severity, severe), (status, stated) = SEVERITIES.get(event.type, INFORMATIONAL), _status(event)
    return {
        "activity_id": activity,
        "activity_name": NAMES.get(activity, event.type.value),
        "category_uid": CATEGORY,
        "category_name": "Application Activity",
        "class_uid": CLASS,
        "class_name": "API Activity",
        "type_uid": CLASS * 100 + activity,
        "severity_id": severity,
        "severity": severe,
        "status_id": status,
        "status": stated,
        "time": int(event.recorded_at.timestamp() * 1000),
        "message": f"{event.type} in {event.stream}",
        "metadata": _metadata(event, origin),
        "actor": _actor(event),
        "api": {
            "operation": event.type.value,
            "service": {"name": "countersign"},
            "request": {"uid": event.correlation_id},
        },
        "src_endpoint": {"name": origin, "svc_name": "countersign"},
        "resources": [{"uid": uid, "type": kind} for kind, uid in _resources(event)],
        "unmapped": {
            "stream": event.stream,
            "stream_version": event.version,
            "causation_id": event.causation_id,
            "leaf_hash": event.leaf_hash,
            "body": event.body,
        },
    }


def _metadata(event: Event, origin: str) -> Plain:
    return {
        "version": OCSF_VERSION,
        "product": {"name": "Countersign", "vendor_name": "Countersign"},
        "uid": event.event_id,
        "event_code": event.type.value,
        "correlation_uid": event.correlation_id,
        "log_name": origin,
        "tenant_uid": event.log_id,
        "sequence": event.seq,
        "original_time": event.recorded_at.isoformat(),
    }


def _actor(event: Event) -> Plain:
    """A person is a user; whatever else acts is an application."""
    if event.actor_kind == "person":
        return {"user": {"name": event.actor_ref, "uid": event.actor_ref, "type_id": 1, "type": "User"}}
    return {"app_name": event.actor_ref, "app_uid": f"{event.actor_kind}:{event.actor_ref}"}


def _status(event: Event) -> tuple[int, str]:
    if event.type is E.OUTCOME:
        ended = _text(event, "status")
        return SUCCESS if ended in GOOD else ELSE if ended in SO_SO else FAILURE
    if event.type is E.IN_DOUBT:
        return ELSE
    return FAILURE if event.type in FAILED else SUCCESS


def _resources(event: Event) -> Iterator[tuple[str, str]]:
    yield "run", event.correlation_id
    for kind, name in (("intent", "digest"), ("action", "key")):
        if text := _text(event, name):
            yield kind, text


# PROV.


@dataclass(slots=True)
class _Run:
    """What later steps of a run use: what was asked and proposed, verdicts by intent, and receipts."""

    asked: list[str] = field(default_factory=list[str])
    proposed: list[str] = field(default_factory=list[str])
    verdicts: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    receipts: list[str] = field(default_factory=list[str])


class _Prov:
    """Every event is an activity of its actor; it uses what it rests on and generates one thing."""

    def __init__(self) -> None:
        self.prefix = "urn:countersign:"
        self._runs = dict[str, _Run]()
        self._generated = set[str]()
        self._parts: dict[str, dict[str, Plain]] = {
            name: {}
            for name in ("entity", "activity", "agent", "wasGeneratedBy", "wasAssociatedWith", "used")
        }

    def take(self, event: Event) -> None:
        """Take the next event."""
        activity, agent = _name("event", event.event_id), _name(event.actor_kind, event.actor_ref)
        time = event.recorded_at.isoformat()
        run = self._runs.setdefault(event.correlation_id, _Run())
        made, used = _steps(event, run)
        if made in self._generated:
            # PROV lets a thing come about once; what comes again was used.
            made, used = _name("record", event.event_id), [made, *used]
        self._generated.add(made)
        self._parts["agent"][agent] = {"prov:type": _type(AGENTS.get(event.actor_kind, "SoftwareAgent"))}
        self._parts["activity"][activity] = {
            "prov:startTime": time,
            "prov:endTime": time,
            "prov:type": _type(event.type.value, "cs"),
            "cs:sequence": event.seq,
            "cs:leafHash": event.leaf_hash,
            "cs:run": event.correlation_id,
        }
        for entity in (made, *used):
            self._parts["entity"].setdefault(entity, {})
        self._relate("wasAssociatedWith", {"prov:activity": activity, "prov:agent": agent})
        self._relate("wasGeneratedBy", {"prov:entity": made, "prov:activity": activity, "prov:time": time})
        for entity in used:
            self._relate("used", {"prov:activity": activity, "prov:entity": entity, "prov:time": time})

    def document(self) -> Plain:
        """The whole."""
        return {"prefix": {"cs": self.prefix}, **self._parts}

    def _relate(self, kind: str, what: Plain) -> None:
        known = self._parts[kind]
        known[f"_:{kind}{len(known) + 1}"] = what


AGENTS = {"person": "Person"}


def _steps(event: Event, run: _Run) -> tuple[str, list[str]]:
    """What an event generates, and what it used."""
    digest, key = _text(event, "digest"), _text(event, "key")
    # What names no intent belongs to none, and not to one that is called nothing.
    intents = [_name("intent", digest)] if digest else []
    made, used = _name("record", event.event_id), list[str]()
    match event.type:
        case E.REQUEST:
            made = _content(event, "body") or made
            run.asked = [made]
        case E.PROPOSAL:
            made, used = _content(event, "proposal") or made, run.asked
            run.proposed = [made]
        case E.INTENT:
            made, used = intents[0] if intents else made, run.proposed
        case E.VERDICT:
            made, used = _name("verdict", event.event_id), intents
            run.verdicts.setdefault(digest, []).append(made)
        case E.APPLY | E.COMPENSATION if key:
            made, used = _name("attempt", event.event_id), [*intents, *run.verdicts.get(digest, ())]
        case E.RECEIPT:
            made, used = _name("effect", key) if key else made, intents
            run.receipts.append(made)
        case E.OUTCOME:
            made, used = _name("outcome", event.event_id), run.receipts
        case _:
            pass
    return made, list(used)


def _content(event: Event, name: str) -> str | None:
    ref: Any = event.body.get(name)
    digest = ref.get("digest") if isinstance(ref, dict) else None
    return _name("content", digest) if isinstance(digest, str) and digest else None


def _name(kind: str, name: str) -> str:
    """A qualified name; whatever else than letters, digits and a few marks it holds is percent-encoded."""
    # Half a surrogate pair has no UTF-8, and a name all the same.
    spelt = (quote(kind, safe="", errors="surrogatepass"), quote(name, safe="@.", errors="surrogatepass"))
    return f"cs:{'.'.join(spelt)}"


def _type(name: str, prefix: str = "prov") -> Plain:
    return {"$": f"{prefix}:{name}", "type": "prov:QUALIFIED_NAME"}


def _text(event: Event, name: str) -> str:
    """A text of its body; empty if there is none, or something else."""
    found: Any = event.body.get(name)
    return found if isinstance(found, str) else ""
