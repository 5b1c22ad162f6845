"""Cosignatures as C2SP writes them: that somebody else has seen a log grow to a checkpoint, and when.

Format: c2sp.org/tlog-cosignature, `cosignature/v1` (Ed25519). A cosignature is one more line under a signed
note; who does not know its key passes over it.
"""

from __future__ import annotations

import struct
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from activities.services.notes import DASH, Verifier

LENGTH = 4 + 8 + 64
"""Key hash, time, signature."""
LATEST = 2**63


class WitnessKey(Verifier):
    """Who cosigns."""

    __slots__ = ()
    ALGORITHM = b"\x04"
    FIELD = "witness key"
    PRINTED_BY = "countersign witness key"


def body_of(note: str) -> str:
    """What the signatures of a note are over."""
    return note.partition("\n\n")[0] + "\n"


def lines_of(note: str) -> list[str]:
    """The signature lines of a note."""
    return [line for line in note.partition("\n\n")[2].split("\n") if line]


def cosign(body: str, key: WitnessKey, private: Ed25519PrivateKey, now: datetime) -> str:
    """A cosignature line over a note's body, without its line end."""
    seconds = int(now.timestamp())
    signature = private.sign(_message(body, seconds))
    return _line(key, key.key_hash + struct.pack(">Q", seconds) + signature)


def is_by(line: str, key: WitnessKey) -> bool:
    """Whether a line says that it is this key's, true or not."""
    data = _decoded(line, key)
    return data is not None and data[:4] == key.key_hash


def cosigned_at(body: str, line: str, key: WitnessKey) -> datetime | None:
    """When this key made this line over this body; `None` if it did not."""
    data = _decoded(line, key)
    if data is None or len(data) != LENGTH or data[:4] != key.key_hash:
        return None
    if line != _line(key, data):
        return None  # One signature has one spelling; what base64 ignores would otherwise be free to change.
    (seconds,) = struct.unpack(">Q", data[4:12])
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(data[12:], _message(body, seconds))
        return datetime.fromtimestamp(seconds, UTC) if seconds < LATEST else None
    except (InvalidSignature, ValueError, OverflowError, OSError):
        return None


def cosigners(note: str, keys: Iterable[WitnessKey]) -> frozenset[bytes]:
    """Whose cosignature stands under a note, by public key: under two names one key is one witness."""
    body, lines = body_of(note), lines_of(note)
    return frozenset(key.public for key in keys if any(cosigned_at(body, line, key) for line in lines))


def forged(note: str, keys: Iterable[WitnessKey]) -> list[str]:
    """Names of known keys under which something stands that they did not make."""
    body, lines = body_of(note), lines_of(note)
    return [
        key.name
        for key in keys
        if any(is_by(line, key) and cosigned_at(body, line, key) is None for line in lines)
    ]


def with_lines(note: str, lines: Sequence[str]) -> str:
    """The note with more signature lines."""
    return note + "".join(f"{line}\n" for line in lines)


def _message(body: str, seconds: int) -> bytes:
    return f"cosignature/v1\ntime {seconds}\n{body}".encode()


def _line(key: WitnessKey, data: bytes) -> str:
    return f"{DASH}{key.name} {b64encode(data).decode()}"


def _decoded(line: str, key: WitnessKey) -> bytes | None:
    """What a line of this name encodes."""
    start = f"{DASH}{key.name} "
    try:
        return b64decode(line[len(start) :], validate=True) if line.startswith(start) else None
    except ValueError:
        return None
