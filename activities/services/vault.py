"""Keys, and AES-256-GCM under them: master keys from files, and data keys that erasure can destroy.

A master key seals Temporal payloads and wraps data keys. A data key belongs to a tenant, or to one subject of
it, who is erased by destroying it; it seals blobs. Nothing here ever logs a key or what was sealed.
"""

from __future__ import annotations

import hmac
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Connection, Row, func, select

from activities.services.database import insert_for
from activities.services.key_files import is_used, put_key
from models.errors import InvalidInput, KeyDestroyed, KeyMissing, LedgerBroken
from models.settings import EncryptionSettings
from models.tables import SubjectKey, table

KEY = table(SubjectKey)
KEY_BYTES = 32
NONCE_BYTES = 12
WORD_LETTERS = 20
"""80 bits of a word's hash; two words that share them are one to a search."""
TENANT = "tenant"
"""Id of the data key of everything that belongs to no single subject."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The master keys: one seals from now on, the others still open what they sealed."""

    current: str
    secrets: Mapping[str, bytes] = field(repr=False)

    def seal(self, purpose: str, plain: bytes, *bound: str) -> bytes:
        """Seal under the current key; `bound` must be the same when it is opened.

        Nonces are random: rotate a key long before it has sealed 2**32 values.
        """
        nonce = os.urandom(NONCE_BYTES)
        box = AESGCM(self._derived(self.current, purpose))
        return nonce + box.encrypt(nonce, plain, _joined(purpose, self.current, *bound))

    def open(self, key_id: str, purpose: str, sealed: bytes, *bound: str) -> bytes:
        """Open what `seal` made under a key.

        Raises:
            KeyMissing: we do not have that key.
            LedgerBroken: the key is another one, or the bytes were changed.
        """
        box = AESGCM(self._derived(key_id, purpose))
        bound_bytes = _joined(purpose, key_id, *bound)
        try:
            return box.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], bound_bytes)
        except (InvalidTag, ValueError):
            raise LedgerBroken(
                f"{purpose}: it does not open with key {key_id!r}; it was changed, or the key's file was; "
                "restore either from a backup"
            ) from None

    def _derived(self, key_id: str, purpose: str) -> bytes:
        """A key of its own for each purpose, so that no value can be passed off as one of another kind."""
        if key_id not in self.secrets:
            raise missing(key_id)
        return hmac.digest(self.secrets[key_id], b"countersign/" + purpose.encode(), "sha256")


def missing(key_id: str) -> KeyMissing:
    """What to say where a key is needed that we do not have."""
    return KeyMissing(
        f"encryption key {key_id!r} is needed and not there; name its file under [[encryption.keys]] in "
        "countersign.toml, restore the file, and restart"
    )


def load_keys(settings: EncryptionSettings, data: Path, url: str = "sqlite://") -> Keys | None:
    """The master keys that settings name; `None` with encryption off.

    Only the current key's file is made when it is missing, only under the data folder, and only if nothing in
    the database at `url` is under it: a new key in the place of an old one would open nothing.

    Raises:
        KeyMissing: the current key lies elsewhere, or was used, and is not there.
        InvalidInput: a file holds something else, or others may read it.
    """
    if not settings.enabled:
        return None
    secrets: dict[str, bytes] = {}
    for key in settings.keys:
        path = (data / key.file).resolve()
        if key.id == settings.current and not path.exists():
            # Another process may have made it and used it meanwhile.
            if is_used(url, KEY, KEY.c.wrapped_by == key.id) and not path.exists():
                raise missing(key.id)
            _make(path, key.id, data)
        if path.exists():
            secrets[key.id] = _read(path)
    return Keys(settings.current, secrets)


def _make(path: Path, key_id: str, data: Path) -> None:
    if not path.is_relative_to(data.resolve()):
        raise missing(key_id)
    put_key(path, os.urandom(KEY_BYTES))


def _read(path: Path) -> bytes:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InvalidInput.field(
            "encryption.keys.file", f"{path.name} with mode {mode:o}", f"run chmod 600 {path}"
        )
    secret = path.read_bytes()
    if len(secret) != KEY_BYTES:
        raise InvalidInput.field(
            "encryption.keys.file",
            f"{path.name} of {len(secret)} bytes",
            f"a key is {KEY_BYTES} random bytes; restore the file from a backup",
        )
    return secret


@dataclass(frozen=True, slots=True)
class Sealed:
    """Bytes as they are stored, and the data key they are under."""

    key_id: str
    data: bytes


class Vault:
    """Seals blobs under data keys that stand, wrapped, in the database.

    Sealing is deterministic under one data key: the nonce is a keyed hash of the bytes (as in SIV modes), so
    that a retried step stores the same bytes under the same name. Equal texts of one subject are seen to be
    equal; nothing else is.
    """

    def __init__(self, keys: Keys) -> None:
        """Wraps under the current master key and unwraps under any."""
        self._keys = keys

    def seal(self, connection: Connection, tenant: str, plain: bytes, subject: str | None = None) -> Sealed:
        """Seal in a writing transaction; makes the data key at its first use.

        Raises:
            KeyDestroyed: the subject's key was destroyed.
        """
        key_id = self.key_id(connection, tenant, subject)
        secret, bound = self._made(connection, tenant, key_id), _joined("blob", tenant, key_id)
        nonce = hmac.digest(secret, b"nonce" + bound + plain, "sha256")[:NONCE_BYTES]
        return Sealed(key_id, nonce + AESGCM(_sealing(secret)).encrypt(nonce, plain, bound))

    def open(self, connection: Connection, tenant: str, sealed: Sealed) -> bytes:
        """Open what `seal` made.

        Raises:
            KeyDestroyed: its key was destroyed.
            KeyMissing: the master key that wraps its key is not there.
            LedgerBroken: the bytes were changed.
        """
        return self.reader(connection, tenant)(sealed)

    def reader(self, connection: Connection, tenant: str) -> Callable[[Sealed], bytes]:
        """The same for many, which looks for each key once; keep it no longer than the transaction."""
        secrets = dict[str, bytes]()

        def opened(sealed: Sealed) -> bytes:
            name = sealed.key_id
            if name not in secrets:
                secrets[name] = self._standing(connection, tenant, name)
            return _opened(secrets[name], _joined("blob", tenant, name), sealed.data)

        return opened

    def spell(self, connection: Connection, tenant: str, words: Iterable[str]) -> list[str]:
        """Words as keyed hashes: equal ones stay equal, and only who has the key can tell what they are."""
        secret = hmac.digest(self._made(connection, tenant, TENANT), b"words", "sha256")
        return [f"x{hmac.digest(secret, word.encode(), 'sha256').hex()[:WORD_LETTERS]}" for word in words]

    def key_id(self, connection: Connection, tenant: str, subject: str | None) -> str:
        """The opaque id of a subject's key; who has no key cannot tell from it who the subject is."""
        if subject is None:
            return TENANT
        secret = self._made(connection, tenant, TENANT)
        return hmac.digest(secret, b"subject" + subject.encode(), "sha256").hex()[:32]

    def destroy(self, connection: Connection, tenant: str, subject: str, now: int) -> str:
        """Destroy a subject's key for good, whether or not it was ever used; returns the key's id.

        Everything sealed under it is unreadable from here on, and a late retry cannot bring any of it back.
        The caller then rewrites the file, as freed pages may still hold the wrapped key. Copies in backups
        end with the backups, or with the master key.
        """
        key_id = self.key_id(connection, tenant, subject)
        gone: dict[str, Any] = {"wrapped": b"", "wrapped_by": "", "destroyed_at": now}
        self._insert(connection, tenant, key_id, gone)
        here = (*_at(tenant, key_id), KEY.c.destroyed_at.is_(None))
        connection.execute(KEY.update().where(*here).values(**gone))
        return key_id

    @property
    def current(self) -> str:
        """Id of the master key that wraps from now on."""
        return self._keys.current

    def rewrap(self, connection: Connection) -> int:
        """Wrap every data key under the current master key; the blobs stay as they are. Returns how many."""
        return sum(self.rewrapped(connection).values())

    def rewrapped(self, connection: Connection, limit: int | None = None) -> Counter[tuple[str, str]]:
        """The same for at most so many; how many, by tenant and the master key they were under."""
        rows = connection.execute(select(KEY).where(*self._behind()).limit(limit)).all()
        for row in rows:
            secret = self._unwrapped(row)
            connection.execute(
                KEY.update()
                .where(*_at(row.tenant, row.subject_key_id))
                .values(**self._wrapped(row.tenant, row.subject_key_id, secret))
            )
        return Counter((row.tenant, row.wrapped_by) for row in rows)

    def behind(self, connection: Connection) -> int:
        """How many data keys another master key than the current one wraps."""
        return connection.execute(select(func.count()).select_from(KEY).where(*self._behind())).scalar_one()

    def _behind(self) -> tuple[Any, Any]:
        return KEY.c.wrapped_by != self._keys.current, KEY.c.destroyed_at.is_(None)

    def _standing(self, connection: Connection, tenant: str, key_id: str) -> bytes:
        row = _row(connection, tenant, key_id)
        if row is None:
            raise LedgerBroken(f"key {key_id[:12]} of stored content is gone; restore it from a backup")
        return self._unwrapped(row)

    def _made(self, connection: Connection, tenant: str, key_id: str) -> bytes:
        """A data key, straight from its row each time: a copy kept here would outlive its destruction."""
        row = _row(connection, tenant, key_id)
        if row is None:
            fresh = self._wrapped(tenant, key_id, os.urandom(KEY_BYTES))
            self._insert(connection, tenant, key_id, fresh | {"destroyed_at": None})
            # Another process may have been first; its key counts.
            row = _row(connection, tenant, key_id)
        assert row is not None
        return self._unwrapped(row)

    def _insert(self, connection: Connection, tenant: str, key_id: str, values: dict[str, Any]) -> None:
        insert = insert_for(connection.dialect.name)
        named = {"tenant": tenant, "subject_key_id": key_id} | values
        connection.execute(insert(KEY).values(**named).on_conflict_do_nothing())

    def _wrapped(self, tenant: str, key_id: str, secret: bytes) -> dict[str, Any]:
        wrapped = self._keys.seal("data key", secret, tenant, key_id)
        return {"wrapped": wrapped, "wrapped_by": self._keys.current}

    def _unwrapped(self, row: Row[Any]) -> bytes:
        if row.destroyed_at is not None:
            raise KeyDestroyed(
                f"key {row.subject_key_id[:12]} was destroyed to erase a subject; do without its data"
            )
        return self._keys.open(row.wrapped_by, "data key", bytes(row.wrapped), row.tenant, row.subject_key_id)


def _row(connection: Connection, tenant: str, key_id: str) -> Row[Any] | None:
    return connection.execute(select(KEY).where(*_at(tenant, key_id))).first()


def _at(tenant: str, key_id: str) -> tuple[Any, Any]:
    return KEY.c.tenant == tenant, KEY.c.subject_key_id == key_id


def _opened(secret: bytes, bound: bytes, data: bytes) -> bytes:
    try:
        return AESGCM(_sealing(secret)).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], bound)
    except (InvalidTag, ValueError):
        raise LedgerBroken("stored content was changed; restore it from a backup") from None


def _sealing(secret: bytes) -> bytes:
    return hmac.digest(secret, b"sealing", "sha256")


def _joined(*parts: str) -> bytes:
    """Parts with their lengths, so that no two lists of parts give the same bytes."""
    return b"".join(b"%d:%s" % (len(part.encode()), part.encode()) for part in parts)
