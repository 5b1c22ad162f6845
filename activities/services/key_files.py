"""Private keys in files that only their owner may read, and what it takes for a file to last."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import ColumnElement, Table, create_engine, inspect, make_url, select

from models.errors import InvalidInput


def private_key(path: Path) -> Ed25519PrivateKey:
    """The key in a file; made on first use, readable by its owner only.

    Raises:
        InvalidInput: others may read it, or it is no Ed25519 key.
    """
    if not path.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        put_key(path, pem)
    if path.stat().st_mode & 0o077:
        raise InvalidInput.field("key", str(path), "others can read it; make a new one, or chmod 600 it")
    private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(private, Ed25519PrivateKey):
        raise InvalidInput.field("key", str(path), "it is no Ed25519 key; move it away to get a new one")
    return private


def put_key(path: Path, secret: bytes) -> None:
    """Made aside and linked into place: of several processes, one wins, the others use its key."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink()
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the disk know which files there are: what is signed or sealed next lasts, and so must its key."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_used(url: str, rows: Table, *where: ColumnElement[bool]) -> bool:
    """Whether a database has such rows, made with a key that may be gone; no database is made.

    One that cannot be asked is an error: a key made then could be the wrong one.
    """
    parsed = make_url(url)
    if parsed.drivername.startswith("sqlite") and not Path(parsed.database or "").exists():
        return False
    engine = create_engine(parsed)
    try:
        with engine.connect() as link:
            query = select(rows).where(*where).limit(1)
            return inspect(link).has_table(rows.name) and link.execute(query).first() is not None
    finally:
        engine.dispose()
