"""What the ledger says of keys: that one took another's place, or counts no more.

The ledger's own key is handed over by both: the old one signs who follows, the new one whom it follows. Who
has only one of them can go from it to the other, forwards and back.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import Connection

from activities.services.ledger_store import add_in, entries_in
from activities.services.notes import NoteKey
from activities.services.signatures import fingerprint
from activities.services.vault import Vault
from models.canonical import derived_id
from models.errors import InvalidInput
from models.ledger import Draft, EventType
from models.people import SECURITY_KEYS, Key, Person

Plain = dict[str, Any]
LEDGER, VAULT, PERSON = "ledger", "vault", "person"
BATCH = 500


def log_rotation(
    link: Connection,
    tenant: str,
    by: str,
    now: datetime,
    body: Plain,
    name: str = "",
    kind: Literal["person", "system"] = "person",
) -> str:
    """Append `key.rotated`, once per `name` if there is one; returns the event's id."""
    stream = f"keys/{body['purpose']}"
    place = name or len(entries_in(link, tenant, stream)) + 1
    draft = Draft(
        event_id=derived_id("event", tenant, stream, place),
        stream=stream,
        type=EventType.KEY_ROTATED,
        actor_kind=kind,
        actor_ref=by,
        correlation_id=stream,
        body=body,
    )
    add_in(link, tenant, draft, now)
    return draft.event_id


# The vault.


def rewrap(link: Connection, vault: Vault, by: str, now: datetime, limit: int = BATCH) -> int:
    """Wrap some data keys anew, and say so in the ledger of each tenant; how many, 0 when all are."""
    done = vault.rewrapped(link, limit)
    for tenant, old in done:
        body = {"purpose": VAULT, "old": old, "new": vault.current, "keys": done[tenant, old]}
        log_rotation(link, tenant, by, now, body)
    return sum(done.values())


# People.


def people_keys(people: Iterable[Person]) -> dict[str, Plain]:
    """What settings say of each key, by its fingerprint and whose it is."""
    return {
        f"{person.name} {fingerprint(key.public)}": {
            "person": person.name,
            "key": fingerprint(key.public),
            "revoked": key.revoked,
            "valid_after": None if key.valid_after is None else key.valid_after.isoformat(),
            "valid_before": None if key.valid_before is None else key.valid_before.isoformat(),
            **_device(key),
        }
        for person in people
        for key in person.keys
    }


def _device(key: Key) -> Plain:
    """What a security key is asked for; keys of which that says nothing stand as they always did."""
    if key.kind not in SECURITY_KEYS:
        return {}
    return {"no_touch_required": key.no_touch_required, "verify_required": key.verify_required}


def people_changes(link: Connection, tenant: str, people: Iterable[Person]) -> list[Plain]:
    """What has changed in people's keys since the ledger last said how they stand."""
    logged = dict[str, Plain]()
    for entry in entries_in(link, tenant, f"keys/{PERSON}"):
        logged[f"{entry.body['person']} {entry.body['key']}"] = dict(entry.body)
    now = people_keys(people)
    changes = [_change(logged.get(name), state) for name, state in sorted(now.items())]
    gone = [name for name in sorted(logged) if name not in now and logged[name]["change"] != "removed"]
    removed = [logged[name] | {"change": "removed"} for name in gone]
    return [change for change in changes if change is not None] + removed


def _change(before: Plain | None, state: Plain) -> Plain | None:
    said = {"purpose": PERSON} | state
    if before is None or before["change"] == "removed":
        return said | {"change": "added"}
    if all(before.get(name) == value for name, value in said.items()):
        return None
    return said | {"change": "revoked" if state["revoked"] and not before["revoked"] else "changed"}


# The ledger.


def handed_over(old: Ed25519PrivateKey, new: Ed25519PrivateKey, name: str) -> Plain:
    """The body that says that one key of a log follows another, signed by both."""
    first, then = _public(old, name), _public(new, name)
    text = statement(str(first), str(then))
    return {
        "purpose": LEDGER,
        "old": str(first),
        "new": str(then),
        "by_old": b64encode(old.sign(text)).decode(),
        "by_new": b64encode(new.sign(text)).decode(),
    }


def statement(old: str, new: str) -> bytes:
    """What both keys sign."""
    return f"countersign key.rotated/1\n{old}\n{new}\n".encode()


def successor(body: Mapping[str, Any], keys: Sequence[NoteKey]) -> NoteKey | None:
    """The key that takes the place of one of these.

    Raises:
        InvalidInput: one of them is named as the one that hands over, and did not sign it.
    """
    old = next((key for key in keys if str(key) == body.get("old")), None)
    if old is None or body.get("purpose") != LEDGER:
        return None
    if not _signed(old, body, "by_old"):
        raise InvalidInput.field("key", body.get("new"), f"{old.key_id} did not sign that it follows")
    return NoteKey.parse(str(body["new"]))


def relatives(link: Connection, tenant: str, key: NoteKey) -> list[NoteKey]:
    """The keys before this one and after it; whoever runs since before a rotation signs with an older one."""
    bodies = [entry.body for entry in entries_in(link, tenant, f"keys/{LEDGER}")]
    found = [key]
    for one in found:  # It grows meanwhile.
        found += [other for other in _neighbours(one, bodies) if other not in found]
    return found[1:]


def _neighbours(key: NoteKey, bodies: Iterable[Plain]) -> Iterator[NoteKey]:
    """The keys that this one has signed to follow, or to be followed by."""
    for body in bodies:
        for mine, other, by in (("old", "new", "by_old"), ("new", "old", "by_new")):
            if body.get(mine) == str(key) and _signed(key, body, by):
                with suppress(InvalidInput):
                    yield NoteKey.parse(str(body.get(other)))


def _signed(key: NoteKey, body: Mapping[str, Any], which: str) -> bool:
    text = statement(str(body.get("old")), str(body.get("new")))
    with suppress(InvalidSignature, ValueError):
        signature = b64decode(str(body.get(which)), validate=True)
        Ed25519PublicKey.from_public_bytes(key.public).verify(signature, text)
        return True
    return False


def _public(private: Ed25519PrivateKey, name: str) -> NoteKey:
    return NoteKey(name, private.public_key().public_bytes_raw())
