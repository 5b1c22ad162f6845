"""Signed notes and checkpoints as C2SP writes them: lines of text, a blank line, a line per signature."""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from models.errors import InvalidInput

DASH = "\N{EM DASH} "


@dataclass(frozen=True, slots=True)
class Tree:
    """What a checkpoint says: whose log, how many entries, and their root."""

    origin: str
    size: int
    root: bytes


@dataclass(frozen=True, slots=True)
class Verifier:
    """Who signs under which name; the algorithm is part of the key."""

    ALGORITHM: ClassVar[bytes]
    FIELD: ClassVar[str]
    PRINTED_BY: ClassVar[str]

    name: str
    public: bytes

    @property
    def key_hash(self) -> bytes:
        """Four bytes that tell keys of one name apart."""
        return hashlib.sha256(self.name.encode() + b"\n" + self.ALGORITHM + self.public).digest()[:4]

    @property
    def key_id(self) -> str:
        """Name and key hash."""
        return f"{self.name}+{self.key_hash.hex()}"

    def __str__(self) -> str:
        """The key as C2SP writes verifiers."""
        return f"{self.key_id}+{b64encode(self.ALGORITHM + self.public).decode()}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a verifier.

        Raises:
            InvalidInput: it is none.
        """
        name, _, rest = text.strip().partition("+")
        key_hash, _, encoded = rest.partition("+")
        try:
            data = b64decode(encoded, validate=True)
        except ValueError:
            data = b""
        key = cls(name, data[1:])
        if len(data) != 33 or data[:1] != cls.ALGORITHM or key.key_hash.hex() != key_hash:
            raise InvalidInput.field(
                cls.FIELD, text, f"give it as NAME+HASH+BASE64, as `{cls.PRINTED_BY}` prints"
            )
        return key


class NoteKey(Verifier):
    """Who signs notes."""

    __slots__ = ()
    ALGORITHM = b"\x01"
    FIELD = "key"
    PRINTED_BY = "countersign ledger key"


def checkpoint_text(tree: Tree) -> str:
    """The text that a checkpoint signs."""
    return f"{tree.origin}\n{tree.size}\n{b64encode(tree.root).decode()}\n"


def sign(text: str, key: NoteKey, private: Ed25519PrivateKey) -> str:
    """The text as a note with one signature."""
    signature = b64encode(key.key_hash + private.sign(text.encode())).decode()
    return f"{text}\n{DASH}{key.name} {signature}\n"


def read_checkpoint(note: str) -> Tree:
    """What a note says, whoever signed it.

    Raises:
        InvalidInput: it is no checkpoint.
    """
    text, _, _ = note.partition("\n\n")
    lines = text.split("\n")
    try:
        origin, size, root = lines[:3]
        tree = Tree(origin, int(size), b64decode(root, validate=True))
    except ValueError:
        raise InvalidInput.field("checkpoint", note[:40], "give the whole signed note") from None
    if checkpoint_text(tree) != f"{text}\n" or len(tree.root) != 32 or tree.size < 0:
        raise InvalidInput.field("checkpoint", note[:40], "give the note exactly as it was written")
    return tree


def is_signed(note: str, keys: Iterable[NoteKey]) -> bool:
    """Whether one of these keys has signed the note."""
    text, blank, signatures = note.partition("\n\n")
    if not blank or not signatures.endswith("\n"):
        return False
    lines = signatures.removesuffix("\n").split("\n")
    return any(_holds(f"{text}\n", line, key) for line in lines for key in keys)


def _holds(text: str, line: str, key: NoteKey) -> bool:
    start = f"{DASH}{key.name} "
    if not line.startswith(start):
        return False
    encoded = line[len(start) :]
    try:
        data = b64decode(encoded, validate=True)
    except ValueError:
        return False
    # One signature has one spelling; what base64 ignores would otherwise be free to change.
    if b64encode(data).decode() != encoded or data[:4] != key.key_hash:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(data[4:], text.encode())
    except InvalidSignature:
        return False
    return True
