"""SSH signatures as `ssh-keygen -Y sign` makes them, checked without calling a program.

Formats: OpenSSH's PROTOCOL.sshsig, and PROTOCOL.u2f for keys that live in a FIDO device. Ed25519 keys count,
and both kinds of security keys; the outcome is a reason, never an exception, since a bad signature is an
ordinary answer that does not count.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from dataclasses import dataclass
from datetime import datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from models.people import NAMESPACE, ORDINARY, SECURITY_KEYS, Key, Person

MAGIC = b"SSHSIG"
BEGIN, END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
ED25519 = ORDINARY.encode()
SK_ED25519, SK_ECDSA = (kind.encode() for kind in SECURITY_KEYS)
CURVE = b"nistp256"
HASHES = {b"sha256": hashlib.sha256, b"sha512": hashlib.sha512}
LONGEST = 4_000
"""Characters of an armoured signature, with room to spare."""
TOUCHED, VERIFIED = 0x01, 0x04
"""What a device says: somebody touched it; it knew who, by PIN or fingerprint."""


class Unreadable(ValueError):
    """It is not a signature at all."""


@dataclass(frozen=True, slots=True)
class _Public:
    """A public key taken apart."""

    kind: bytes
    point: bytes
    application: bytes = b""
    """What a security key signs for; part of the key, and of what it signs."""


@dataclass(frozen=True, slots=True)
class _Value:
    """A signature taken apart."""

    kind: bytes
    value: bytes
    device: bytes = b""
    """Flags and counter, as they are signed."""


def fingerprint(public: str) -> str:
    """`SHA256:…` as `ssh-keygen -l` prints it."""
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def kind_of(key: Key) -> str:
    """What kind a key is, by its own bytes and not by what its line calls it; empty if they are no key."""
    try:
        return _public(key.blob).kind.decode()
    except Unreadable:
        return ""


def on_device(key: Key) -> bool:
    """Whether a key is a security key."""
    return kind_of(key) in SECURITY_KEYS


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
    key = next((key for key in person.keys if key.blob == public), None)
    if key is None:
        return None, f"its key is not one of {person.name}'s; add it to people in countersign.toml"
    if (reason := unusable(key, now)) is not None:
        return None, reason
    made = _verified(public, algorithm, signature, message)
    if made is None:
        return None, "it does not fit what is being answered; sign this very answer"
    if (reason := _lacks(key, made)) is not None:
        return None, reason
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


def _lacks(key: Key, made: _Value) -> str | None:
    """What a device should have seen to and did not; `ssh-keygen -Y verify` does not ask, sshd does."""
    flags = made.device[0] if made.device else None
    if flags is not None and not flags & TOUCHED and not key.no_touch_required:
        return "nobody touched the security key; sign with a key that was made without no-touch-required"
    if key.verify_required and (flags is None or not flags & VERIFIED):
        return "the security key asked for no PIN; make the key with -O verify-required"
    return None


def _verified(public: bytes, algorithm: bytes, signature: bytes, message: bytes) -> _Value | None:
    """The signature, if this key made it over this message."""
    hashed = HASHES[algorithm](message).digest()
    signed = MAGIC + b"".join(_string(part) for part in (NAMESPACE.encode(), b"", algorithm, hashed))
    try:
        key, made = _public(public), _value(signature)
        if key.kind != made.kind:
            return None
        _verify(key, made, signed)
    except (InvalidSignature, Unreadable, ValueError):
        return None
    return made


def _verify(key: _Public, made: _Value, signed: bytes) -> None:
    """Raises `InvalidSignature` or `ValueError` unless it fits."""
    if key.kind != ED25519:
        # A device does not see the message: it signs what it is for, what it did, and the message's hash.
        application = hashlib.sha256(key.application).digest()
        signed = application + made.device + hashlib.sha256(signed).digest()
    if key.kind == SK_ECDSA:
        r, rest = _number(made.value)
        s, rest = _number(rest)
        if rest:
            raise Unreadable("something follows the signature")
        public = EllipticCurvePublicKey.from_encoded_point(SECP256R1(), key.point)
        public.verify(encode_dss_signature(r, s), signed, ECDSA(SHA256()))
    else:
        Ed25519PublicKey.from_public_bytes(key.point).verify(made.value, signed)


def _public(blob: bytes) -> _Public:
    """A public key, to its last byte."""
    kind, rest = _take(blob)
    if kind == SK_ECDSA:
        curve, rest = _take(rest)
        if curve != CURVE:
            raise Unreadable("it is on another curve")
    elif kind not in (ED25519, SK_ED25519):
        raise Unreadable("it is a key of another kind")
    point, rest = _take(rest)
    application = b""
    if kind != ED25519:
        application, rest = _take(rest)
    if rest:
        raise Unreadable("something follows the key")
    return _Public(kind, point, application)


def _value(blob: bytes) -> _Value:
    """A signature, to its last byte; from a device with a byte of flags and a counter of four."""
    kind, rest = _take(blob)
    value, device = _take(rest)
    if len(device) != (0 if kind == ED25519 else 5):
        raise Unreadable("something follows the signature, or is missing")
    return _Value(kind, value, device)


def _parse(armoured: str) -> tuple[bytes, bytes, bytes, bytes]:
    """Public key, namespace, hash algorithm and signature."""
    text = armoured.strip()
    if len(text) > LONGEST or not text.startswith(BEGIN) or not text.endswith(END):
        raise Unreadable("it is not an SSH signature; make one with ssh-keygen -Y sign")
    try:
        blob = base64.b64decode("".join(text[len(BEGIN) : -len(END)].split()), validate=True)
    except ValueError:
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


def _number(data: bytes) -> tuple[int, bytes]:
    """A number that is not negative, in its one spelling."""
    taken, rest = _take(data)
    number = int.from_bytes(taken, signed=True)
    if number < 0 or taken != number.to_bytes((number.bit_length() + 8) // 8 if number else 0):
        raise Unreadable("a number is not written as SSH writes it")
    return number, rest


def _take(data: bytes) -> tuple[bytes, bytes]:
    if len(data) < 4:
        raise Unreadable("it ends too early; copy it whole")
    (length,) = struct.unpack(">I", data[:4])
    if len(data) < 4 + length:
        raise Unreadable("it ends too early; copy it whole")
    return data[4 : 4 + length], data[4 + length :]
