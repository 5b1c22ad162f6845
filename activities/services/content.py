"""The content store: immutable blobs named by SHA-256, sealed at rest where encryption is on.

What a sealed blob is named by depends on whose it is.

A subject's (`subject=`): by the SHA-256 of what is stored, the ciphertext. Sealing is deterministic under one
data key, so putting twice still keeps one. The name, which stays in the ledger for ever, says nothing about
the text to who has no key, so that destroying the key erases the datum, short or long.

A tenant's, and a subject's that is known by its digest elsewhere (`plainly`: requests, cards): by the
SHA-256 of the bytes in clear. Intents must be, as their name is what people sign; so must the rest, because
workflows, commands and other programs name texts without holding a key. Who can guess such a text can test
the guess by its name: a short text about a person belongs to that subject.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

from pydantic import BaseModel
from sqlalchemy import Connection, bindparam, select, text

from activities.services.database import Database, to_micros
from activities.services.regions import absent, home_of, name_in
from activities.services.statements import Statement
from activities.services.together import Reading
from activities.services.vault import Keys, Sealed, Vault
from models.canonical import canonical, sha256, subject_id
from models.errors import InvalidInput, KeyDestroyed, KeyMissing, LedgerBroken, RegionBound
from models.loop import Ref
from models.tables import Blob, table

LIMIT_BYTES = 4 * 1024 * 1024
JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
OPTION = "countersign_vault"
ERASED = "What this was about was erased."
"""In the place of a card that is gone."""
BLOB = table(Blob)
_STORED = Statement(
    select(BLOB.c.data, BLOB.c.sealed_by).where(
        BLOB.c.tenant == bindparam("of"), BLOB.c.digest == bindparam("named")
    )
)
_COLUMNS = [column.name for column in BLOB.columns]
# What two have in common is nobody's: erasing one of them must leave the other what is theirs.
_PUT = Statement(
    text(
        f"INSERT INTO blob ({', '.join(_COLUMNS)}) VALUES (:{', :'.join(_COLUMNS)}) "
        "ON CONFLICT (tenant, digest) DO UPDATE SET subject = NULL WHERE blob.subject IS NOT NULL "
        "AND (excluded.subject IS NULL OR blob.subject <> excluded.subject)"
    )
)


class _Stored(NamedTuple):
    data: bytes
    sealed_by: str | None


class ContentStore:
    """Blobs of all tenants in the database; putting twice keeps one."""

    def __init__(self, database: Database) -> None:
        """Share the database with everything else, so that one commit covers a blob and its event."""
        self._database = database
        self._reading = Reading[tuple[str, str], bytes](database, lambda link, key: get_blob(link, *key))

    async def put(
        self,
        tenant: str,
        data: bytes,
        media_type: str = TEXT,
        subject: str | None = None,
        plainly: bool = False,
    ) -> Ref:
        """Keep bytes; with a subject they go when the subject is erased. `plainly` as for `put_blob`.

        Raises:
            InvalidInput: more than `LIMIT_BYTES`.
            KeyDestroyed: the subject was erased.
        """
        return await self._database.write(
            lambda connection: put_blob(connection, tenant, data, media_type, subject, plainly)
        )

    async def get(self, tenant: str, ref: Ref) -> bytes:
        """Read bytes back and check their name.

        Raises:
            InvalidInput: there is no such blob.
            RegionBound: another region's processes hold it.
            LedgerBroken: the stored bytes are not those that were named.
            KeyMissing: they are sealed, and the key is not here.
            KeyDestroyed: they were erased.
        """
        return await self._reading.get((tenant, ref.digest))

    async def text(self, tenant: str, ref: Ref) -> str:
        """Read UTF-8 text back."""
        return (await self.get(tenant, ref)).decode()


def guard(database: Database, keys: Keys | None) -> Database:
    """Seal what is put into this database from now on; without keys nothing is sealed."""
    if keys is not None:
        # On the engine, so that every transaction has it: a function that put in clear would be a leak.
        database.engine.update_execution_options(**{OPTION: Vault(keys)})
    return database


def vault_of(connection: Connection) -> Vault | None:
    """What seals and opens in this database."""
    return connection.get_execution_options().get(OPTION)


def put_blob(
    connection: Connection,
    tenant: str,
    data: bytes,
    media_type: str,
    subject: str | None = None,
    plainly: bool = False,
) -> Ref:
    """Keep bytes inside a transaction that is under way.

    With a subject they go when it is erased; `plainly` names them by what they say all the same.
    """
    home = home_of(connection)
    if home is None:
        return put_here(connection, tenant, data, media_type, subject, plainly=plainly)
    ref = home.write(
        lambda link: put_here(link, tenant, data, media_type, subject, home.region, plainly=plainly)
    )
    name_in(connection, tenant, ref, home.region)
    return ref


def put_here(
    connection: Connection,
    tenant: str,
    data: bytes,
    media_type: str,
    subject: str | None = None,
    region: str | None = None,
    plainly: bool = False,
) -> Ref:
    """Keep bytes in this very database; at the centre that is right for what speaks of no request only."""
    if len(data) > LIMIT_BYTES:
        raise InvalidInput.field("content", f"{len(data)} bytes", f"keep it under {LIMIT_BYTES} bytes")
    name, stored, sealed_by = sha256(data), data, None
    if (vault := vault_of(connection)) is not None:
        sealed = vault.seal(connection, tenant, data, subject)
        stored, sealed_by = sealed.data, sealed.key_id
        name = name if subject is None or plainly else sha256(stored)
    row = {
        "tenant": tenant,
        "digest": name,
        "media_type": media_type,
        "data_class": "internal",
        "region": region,
        "stored_at": to_micros(datetime.now(UTC)),
        "data": stored,
        "sealed_by": sealed_by,
        "subject": None if subject is None else subject_id(tenant, subject),
    }
    _PUT.run(connection, row)
    return Ref(digest=name, size=len(data), media_type=media_type)


def put_model(connection: Connection, tenant: str, value: BaseModel) -> Ref:
    """Keep a model as its canonical bytes, so that its digest is the digest of the value."""
    return put_blob(connection, tenant, canonical(value), JSON)


def get_blob(connection: Connection, tenant: str, digest: str) -> bytes:
    """Read bytes inside a transaction that is under way, and check their name.

    Raises:
        InvalidInput: there are none.
        RegionBound: another region's processes hold them.
    """
    home = home_of(connection)
    data = None if home is None else home.read(lambda link: _checked(link, tenant, digest))
    data = _checked(connection, tenant, digest) if data is None else data
    if data is None:
        raise absent(connection, tenant, digest)
    return data


def get_unless_gone(connection: Connection, tenant: str, digest: str) -> bytes | None:
    """The same, or nothing where it was erased: for what must go on without it."""
    try:
        return get_blob(connection, tenant, digest)
    except RegionBound:
        raise
    except (InvalidInput, KeyDestroyed):
        return None


def _checked(connection: Connection, tenant: str, digest: str) -> bytes | None:
    row = _row(connection, tenant, digest)
    if row is None:
        return None
    data = _opened(connection, tenant, row)
    if digest not in (sha256(data), sha256(row.data)):
        raise LedgerBroken(f"content {digest} does not hash to its name; restore it from a backup")
    return data


def peek_blob(connection: Connection, tenant: str, digest: str) -> bytes | None:
    """What is stored under a name, opened if it can be, unchecked; for those who check by themselves."""
    home = home_of(connection)
    data = None if home is None else home.read(lambda link: _peeked(link, tenant, digest))
    return _peeked(connection, tenant, digest) if data is None else data


def _peeked(connection: Connection, tenant: str, digest: str) -> bytes | None:
    row = _row(connection, tenant, digest)
    if row is None:
        return None
    try:
        return _opened(connection, tenant, row)
    except LedgerBroken:
        return bytes(row.data)


def unconfigured(key_id: str) -> KeyMissing:
    """What to say of sealed content where encryption is off."""
    return KeyMissing(
        f"content is sealed by key {key_id[:12]!r}; set encryption.enabled and its keys in "
        "countersign.toml, as they were when it was stored"
    )


def _row(connection: Connection, tenant: str, digest: str) -> _Stored | None:
    rows = _STORED.rows(connection, {"of": tenant, "named": digest})
    return _Stored(bytes(rows[0][0]), rows[0][1]) if rows else None


def _opened(connection: Connection, tenant: str, row: _Stored) -> bytes:
    if row.sealed_by is None:
        return bytes(row.data)
    if (vault := vault_of(connection)) is None:
        raise unconfigured(row.sealed_by)
    return vault.open(connection, tenant, Sealed(row.sealed_by, bytes(row.data)))
