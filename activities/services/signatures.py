"""SSH signatures as `ssh-keygen -Y sign` makes them, checked without calling a program.

Format: OpenSSH's PROTOCOL.sshsig. Only Ed25519 keys count; the outcome is a reason, never an exception, since
a bad signature is an ordinary answer that does not count.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from datetime import datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from models.people import NAMESPACE, Key, Person

MAGIC = b"SSHSIG"
BEGIN, END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
ED25519 = b"ssh-ed25519"
HASHES = {b"sha256": hashlib.sha256, b"sha512": hashlib.sha512}
LONGEST = 4_000
"""Characters of an armoured Ed25519 signature, with room to spare."""


class Unreadable(ValueError):
    """It is not a signature at all."""


def fingerprint(public: str) -> str:
    """`SHA256:…` as `ssh-keygen -l` prints it."""
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def check(armoured: str, message: bytes, person: Person, now: datetime) -> tuple[Key | None, str]:
    """The key that signed `message`, or why no signature of this person over it stands.

    Args:
        armoured: what `ssh-keygen -Y sign` printed.
        message: the bytes that should have been signed.
        person: whose keys count.
        now: keys have dates.
    """
    try:
        public, namespace, algorithm, signature = _parse(armoured)
    except Unreadable as error:
        return None, str(error)
    if namespace != NAMESPACE.encode():
        return None, f"it was made for another purpose; sign with -n {NAMESPACE}"
    key = next((key for key in person.keys if _raw(key) == public), None)
    if key is None:
        return None, f"its key is not one of {person.name}'s; add it to people in countersign.toml"
    if (reason := unusable(key, now)) is not None:
        return None, reason
    if not _verifies(public, algorithm, signature, message):
        return None, "it does not fit what is being answered; sign this very answer"
    return key, ""


def unusable(key: Key, now: datetime) -> str | None:
    """Why a key does not count now."""
    if key.revoked:
        return "its key was revoked"
    if key.valid_after is not None and now < key.valid_after:
        return "its key is not valid yet"
    if key.valid_before is not None and now >= key.valid_before:
        return "its key is not valid any more"
    return None


def _raw(key: Key) -> bytes:
    try:
        return base64.b64decode(key.public.split()[1], validate=True)
    except binascii.Error:
        return b""


def _verifies(public: bytes, algorithm: bytes, signature: bytes, message: bytes) -> bool:
    hashed = HASHES[algorithm](message).digest()
    signed = MAGIC + b"".join(_string(part) for part in (NAMESPACE.encode(), b"", algorithm, hashed))
    try:
        kind, rest = _take(public)
        point, _ = _take(rest)
        made_by, rest = _take(signature)
        value, _ = _take(rest)
        if kind != ED25519 or made_by != ED25519:
            return False
        Ed25519PublicKey.from_public_bytes(point).verify(value, signed)
    except (InvalidSignature, Unreadable, ValueError):
        return False
    return True


def _parse(armoured: str) -> tuple[bytes, bytes, bytes, bytes]:
    """Public key, namespace, hash algorithm and signature."""
    text = armoured.strip()
    if len(text) > LONGEST or not text.startswith(BEGIN) or not text.endswith(END):
        raise Unreadable("it is not an SSH signature; make one with ssh-keygen -Y sign")
    try:
        blob = base64.b64decode("".join(text[len(BEGIN) : -len(END)].split()), validate=True)
    except binascii.Error:
        raise Unreadable("its base64 is broken; copy it whole") from None
    if blob[:6] != MAGIC or blob[6:10] != struct.pack(">I", 1):
        raise Unreadable("it is not an SSH signature of version 1")
    public, rest = _take(blob[10:])
    namespace, rest = _take(rest)
    _, rest = _take(rest)
    algorithm, rest = _take(rest)
    signature, rest = _take(rest)
    if rest or algorithm not in HASHES:
        raise Unreadable("it has parts that do not belong to an SSH signature")
    return public, namespace, algorithm, signature


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _take(data: bytes) -> tuple[bytes, bytes]:
    if len(data) < 4:
        raise Unreadable("it ends too early; copy it whole")
    (length,) = struct.unpack(">I", data[:4])
    if len(data) < 4 + length:
        raise Unreadable("it ends too early; copy it whole")
    return data[4 : 4 + length], data[4 + length :]
