"""A co-signer: it cosigns a checkpoint only if the log has grown from the last one that it cosigned.

Its answers are those of c2sp.org/tlog-witness. Who asks is not looked at: a checkpoint is signed by its log,
or it is nothing.
"""

from __future__ import annotations

import logging
import re
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from activities.services import merkle
from activities.services.cosignatures import WitnessKey, body_of, cosign
from activities.services.notes import NoteKey, is_signed
from activities.services.witness_state import EMPTY, Seen, State

MOST_PROOF = 63
"""Lines of a consistency proof, by the protocol."""
SIZE = re.compile(r"0|[1-9][0-9]{0,17}")
SIZE_TYPE = "text/x.tlog.size"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered over HTTP."""

    status: int
    text: str = ""
    content_type: str = "text/plain"


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request taken apart."""

    old: int
    proof: tuple[bytes, ...]
    note: str
    origin: str
    size: int
    root: bytes


class Cosigner:
    """Judges what is put to it; may be called from several threads."""

    def __init__(self, state: State, logs: Sequence[NoteKey], clock: Callable[[], datetime]) -> None:
        """`logs` are the keys of the logs that it cosigns; a log whose key was rotated has several."""
        self._state, self._logs, self._clock = state, tuple(logs), clock
        self._one = threading.Lock()
        self.key = WitnessKey(state.name, state.private.public_key().public_bytes_raw())
        """What verifies its cosignatures; give it to those who check."""

    def add(self, body: bytes) -> Reply:
        """Answer one `add-checkpoint`.

        Raises:
            OSError: what was seen could not be written, so nothing is cosigned.
        """
        try:
            asked = _read(body)
        except ValueError as error:
            return Reply(400, f"{error}\n")
        keys = [key for key in self._logs if key.name == asked.origin]
        if not keys:
            return Reply(404, "this log is not one of mine\n")
        if not is_signed(asked.note, keys):
            return Reply(403, "none of the log's keys signed it\n")
        if asked.old > asked.size:
            return Reply(400, "the old size is larger than that of the checkpoint\n")
        with self._one:
            return self._judge(asked)

    def _judge(self, asked: _Asked) -> Reply:
        """One at a time: what is compared with the state is what replaces it."""
        seen = self._state.seen(asked.origin)
        if asked.old != seen.size:
            return Reply(409, f"{seen.size}\n", SIZE_TYPE)
        if asked.size == seen.size and asked.root != seen.root:
            log.error("log %s has two roots for %s events; both notes are kept", asked.origin, asked.size)
            self._state.keep_evidence(asked.origin, asked.note)
            return Reply(409, f"{seen.size}\n", SIZE_TYPE)
        if not _grew(seen, asked):
            log.error("log %s does not show that it grew from %s events", asked.origin, seen.size)
            return Reply(422, "the proof does not lead from what was cosigned to this checkpoint\n")
        if asked.size > seen.size:
            self._state.remember(asked.origin, Seen(asked.size, asked.root, asked.note))
        return Reply(200, f"{cosign(body_of(asked.note), self.key, self._state.private, self._clock())}\n")


def _grew(seen: Seen, asked: _Asked) -> bool:
    if seen.size == 0:
        return not asked.proof and (asked.size > 0 or asked.root == EMPTY)
    return merkle.is_consistent(seen.size, seen.root, asked.size, asked.root, asked.proof)


def _read(body: bytes) -> _Asked:
    """Take a request apart; `ValueError` says what is wrong with it."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    head, blank, note = text.partition("\n\n")
    if not blank or not note.endswith("\n") or "\n\n" not in note:
        raise ValueError("send an old size, the proof, an empty line and a signed checkpoint")
    first, *proof = head.split("\n")
    if not first.startswith("old "):
        raise ValueError("begin with the word old and a size")
    if len(proof) > MOST_PROOF:
        raise ValueError(f"a proof has at most {MOST_PROOF} lines")
    origin, size, root = _tree(body_of(note))
    return _Asked(_size(first[4:]), tuple(map(_hash, proof)), note, origin, size, root)


def _tree(body: str) -> tuple[str, int, bytes]:
    """What a checkpoint says; more lines are the log's own affair, and are cosigned as they stand."""
    lines = body.split("\n")[:-1]
    if len(lines) < 3 or not all(lines):
        raise ValueError("a checkpoint has an origin, a size and a root")
    return lines[0], _size(lines[1]), _hash(lines[2])


def _size(text: str) -> int:
    if SIZE.fullmatch(text) is None:
        raise ValueError("a size is a plain decimal number")
    return int(text)


def _hash(text: str) -> bytes:
    try:
        data = b64decode(text, validate=True)
    except ValueError:
        data = b""
    if len(data) != len(EMPTY) or b64encode(data).decode() != text:
        raise ValueError("a hash is 32 bytes in base64")
    return data
