"""A FIDO device in software: it signs as a security key of OpenSSH does, and sits behind an SSH agent."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from activities.services.identities import statement_of
from activities.services.signatures import BEGIN, END, MAGIC
from models.gate import Answer, Kind
from models.people import NAMESPACE, SECURITY_KEYS

ED25519, ECDSA = SECURITY_KEYS
Message = dict[str, Any]


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def number(value: int) -> bytes:
    return string(value.to_bytes((value.bit_length() + 8) // 8))


@dataclass
class Device:
    """One key on one device. What it signs can be told to lie, for tests of what is refused."""

    kind: str = ED25519
    flags: int = 0x01
    counter: int = 7
    application: bytes = b"ssh:"
    private: Ed25519PrivateKey | ec.EllipticCurvePrivateKey | None = None

    def __post_init__(self) -> None:
        if self.private is None:
            fresh = self.kind == ED25519
            self.private = Ed25519PrivateKey.generate() if fresh else ec.generate_private_key(ec.SECP256R1())

    @property
    def blob(self) -> bytes:
        """The public key's bytes."""
        public = self.private.public_key()
        if isinstance(public, ec.EllipticCurvePublicKey):
            form = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
            point = string(b"nistp256") + string(public.public_bytes(*form))
        else:
            point = string(public.public_bytes_raw())
        return string(self.kind.encode()) + point + string(self.application)

    @property
    def line(self) -> str:
        """As in `id_ed25519_sk.pub`."""
        return f"{self.kind} {base64.b64encode(self.blob).decode()} a device"

    def value(self, data: bytes) -> bytes:
        """An SSH signature of some data: the device sees hashes, and says what it did."""
        said = struct.pack(">BI", self.flags, self.counter)
        seen = hashlib.sha256(self.application).digest() + said + hashlib.sha256(data).digest()
        if isinstance(self.private, Ed25519PrivateKey):
            made = self.private.sign(seen)
        else:
            r, s = decode_dss_signature(self.private.sign(seen, ec.ECDSA(SHA256())))
            made = number(r) + number(s)
        return string(self.kind.encode()) + string(made) + said

    def sign(self, message: bytes, namespace: str = NAMESPACE) -> str:
        """What `ssh-keygen -Y sign` would print."""
        name, hashed = namespace.encode(), hashlib.sha512(message).digest()
        parts = string(name) + string(b"") + string(b"sha512")
        value = self.value(MAGIC + parts + string(hashed))
        return armoured(MAGIC + struct.pack(">I", 1) + string(self.blob) + parts + string(value))

    def answers(self, kind: Kind, message: Message, tenant: str = "default") -> Message:
        """A message with times in it, signed."""
        statement = statement_of(tenant, kind, Answer.model_validate(message))
        assert statement is not None
        return message | {"signature": self.sign(statement.bytes())}


def armoured(blob: bytes) -> str:
    return f"{BEGIN}\n{base64.encodebytes(blob).decode()}{END}\n"


@contextlib.contextmanager
def agent(path: Path, device: Device) -> Iterator[None]:
    """An SSH agent at a socket, with this device's key; lets the real `ssh-keygen` sign by it."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    thread = threading.Thread(target=_serve, args=(server, device))
    thread.start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        server.close()


def _serve(server: socket.socket, device: Device) -> None:
    while True:
        try:
            link, _ = server.accept()
        except OSError:
            return
        with link, link.makefile("rwb") as file:
            while size := file.read(4):
                request = file.read(*struct.unpack(">I", size))
                file.write(string(_reply(request, device)))
                file.flush()


def _reply(request: bytes, device: Device) -> bytes:
    kind, rest = request[0], request[1:]
    if kind == 11:  # Which keys there are.
        return b"\x0c" + struct.pack(">I", 1) + string(device.blob) + string(b"a device")
    if kind == 13:  # Sign: the key, the data, flags.
        skip = 4 + struct.unpack(">I", rest[:4])[0]
        (size,) = struct.unpack(">I", rest[skip : skip + 4])
        return b"\x0e" + string(device.value(rest[skip + 4 : skip + 4 + size]))
    return b"\x05"
