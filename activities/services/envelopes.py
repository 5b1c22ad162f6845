"""The canonical bytes of an event, written fast: all but its place and time beforehand, outside of locks.

The bytes are those of `models/canonical.py`; a body in which anything would need to be converted, refused or
sorted with care goes that way.
"""

from __future__ import annotations

from datetime import datetime
from json.encoder import encode_basestring
from typing import NamedTuple

from models.canonical import canonical, plain_text
from models.ledger import Draft


class Written(NamedTuple):
    """A draft on its way into one log."""

    draft: Draft
    before: str
    """The bytes as far as its place and time."""
    after: str

    def at(self, seq: int, version: int, moment: str) -> bytes:
        """The envelope at this place of its log and stream."""
        # A moment in ISO format has nothing to escape.
        there = f'"recorded_at":"{moment}","seq":{seq}'
        return f'{self.before}{there},{self.after}"version":{version}}}'.encode()


def write(log: str, draft: Draft) -> Written:
    """All of an envelope that is known before its turn comes.

    Raises:
        ValueError: the body holds what has no canonical form.
    """
    # In the order of the names, as they stand in the canonical bytes.
    before = (
        f'{{"actor_kind":{_text(draft.actor_kind)},"actor_ref":{_text(draft.actor_ref)},'
        f'"body":{_body(draft)},"causation_id":{_text(draft.causation_id)},'
        f'"correlation_id":{_text(draft.correlation_id)},"event_id":{_text(draft.event_id)},'
        f'"log_id":{_text(log)},'
    )
    after = (
        f'"span_id":{_text(draft.span_id)},"stream":{_text(draft.stream)},'
        f'"trace_id":{_text(draft.trace_id)},"type":{_text(draft.type)},'
    )
    return Written(draft, before, after)


def envelope(log: str, draft: Draft, seq: int, version: int, moment: datetime) -> bytes:
    """The canonical bytes of an event whose place is known."""
    return write(log, draft).at(seq, version, moment.isoformat())


def _text(value: str | None) -> str:
    return "null" if value is None else encode_basestring(value)


def _body(draft: Draft) -> str:
    text = plain_text(draft.body)
    if text is not None:
        return text
    return canonical(draft.model_dump(mode="json", include={"body"})["body"]).decode()
