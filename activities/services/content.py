"""The content store: immutable blobs named by the SHA-256 of what is stored."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import BaseModel
from sqlalchemy import Connection, select
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from activities.services.database import Database, to_micros
from models.canonical import canonical, sha256
from models.errors import InvalidInput, LedgerBroken
from models.loop import Ref
from models.tables import Blob, table

LIMIT_BYTES = 4 * 1024 * 1024
JSON = "application/json"
BLOB = table(Blob)


class ContentStore:
    """Blobs of all tenants in the database; putting twice keeps one."""

    def __init__(self, database: Database) -> None:
        """Share the database with everything else, so that one commit covers a blob and its event."""
        self._database = database

    async def put(self, tenant: str, data: bytes, media_type: str = "text/plain; charset=utf-8") -> Ref:
        """Keep bytes.

        Raises:
            InvalidInput: more than `LIMIT_BYTES`.
        """
        return await self._database.write(lambda connection: put_blob(connection, tenant, data, media_type))

    async def get(self, tenant: str, ref: Ref) -> bytes:
        """Read bytes back and check their name.

        Raises:
            InvalidInput: there is no such blob.
            LedgerBroken: the stored bytes are not those that were named.
        """
        return await self._database.read(lambda connection: get_blob(connection, tenant, ref.digest))

    async def text(self, tenant: str, ref: Ref) -> str:
        """Read UTF-8 text back."""
        return (await self.get(tenant, ref)).decode()


def put_blob(connection: Connection, tenant: str, data: bytes, media_type: str) -> Ref:
    """Keep bytes inside a transaction that is under way."""
    if len(data) > LIMIT_BYTES:
        raise InvalidInput.field("content", f"{len(data)} bytes", f"keep it under {LIMIT_BYTES} bytes")
    ref = Ref(digest=sha256(data), size=len(data), media_type=media_type)
    insert = sqlite_insert if connection.dialect.name == "sqlite" else pg_insert
    row = dict(
        tenant=tenant,
        digest=ref.digest,
        media_type=media_type,
        data_class="internal",
        region=None,
        stored_at=to_micros(datetime.now(UTC)),
        data=data,
    )
    connection.execute(insert(BLOB).values(**row).on_conflict_do_nothing())
    return ref


def put_model(connection: Connection, tenant: str, value: BaseModel) -> Ref:
    """Keep a model as its canonical bytes, so that its digest is the digest of the value."""
    return put_blob(connection, tenant, canonical(value), JSON)


def get_blob(connection: Connection, tenant: str, digest: str) -> bytes:
    """Read bytes inside a transaction that is under way, and check their name."""
    data = connection.execute(
        select(BLOB.c.data).where(BLOB.c.tenant == tenant, BLOB.c.digest == digest)
    ).scalar_one_or_none()
    if data is None:
        raise InvalidInput.field("ref", digest, "no such content is stored; store it first")
    if sha256(data) != digest:
        raise LedgerBroken(f"content {digest} does not hash to its name; restore it from a backup")
    return data
