"""What stands in columns instead of in content: sealed with encryption on, as it is without.

A sealed text says so itself, so that what was written before encryption was switched on is still read.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Connection, Select

from activities.services.content import vault_of
from activities.services.vault import Sealed
from models.canonical import subject_id
from models.errors import KeyDestroyed, KeyMissing, LedgerBroken

MARK = "\x01"
"""Begins a sealed text; nobody types it."""


def seal_text(connection: Connection, tenant: str, text: str, subject: str | None = None) -> str:
    """A text as it is to be stored; under the subject's key it goes when that is destroyed.

    Raises:
        KeyDestroyed: the subject was erased.
    """
    vault = vault_of(connection)
    if vault is None or not text:
        return text
    sealed = vault.seal(connection, tenant, text.encode(), subject or None)
    return f"{MARK}{sealed.key_id}:{b64encode(sealed.data).decode()}"


def text_reader(connection: Connection, tenant: str) -> Callable[[str], str]:
    """What opens the texts of a tenant, for as long as the transaction lasts; an erased one is empty.

    Raises:
        KeyMissing, LedgerBroken: it does not open here.
    """
    vault = vault_of(connection)
    opened = None if vault is None else vault.reader(connection, tenant)

    def read(stored: str) -> str:
        if not stored.startswith(MARK):
            return stored
        if opened is None:
            raise KeyMissing(
                "a text of memory is sealed; set encryption.enabled and its keys in countersign.toml as "
                "they were when it was stored"
            )
        key_id, _, data = stored[len(MARK) :].partition(":")
        try:
            return opened(Sealed(key_id, b64decode(data, validate=True))).decode()
        except KeyDestroyed:
            return ""
        except ValueError:
            raise LedgerBroken("a text of memory was changed; restore the database from a backup") from None

    return read


def seal_bytes(connection: Connection, tenant: str, data: bytes, subject: str | None = None) -> bytes:
    """The same for what is stored as bytes."""
    return seal_text(connection, tenant, data.decode(), subject).encode()


def is_sealed(stored: bytes) -> bool:
    """Whether `seal_bytes` sealed it."""
    return bytes(stored[: len(MARK)]) == MARK.encode()


def open_bytes(connection: Connection, tenant: str, stored: bytes) -> bytes:
    """What `seal_bytes` made, opened."""
    return text_reader(connection, tenant)(stored.decode()).encode()


def opened_rows(connection: Connection, tenant: str, query: Select[Any]) -> Iterator[dict[str, Any]]:
    """Rows of memory with their sealed columns opened."""
    read = text_reader(connection, tenant)
    for row in connection.execute(query).mappings():
        yield {**row, "title": read(row["title"]), "links": read(row["links"])}


def name_of(connection: Connection, tenant: str, subject: str) -> str:
    """What a subject is called in columns: an opaque id with encryption on."""
    vault = vault_of(connection)
    return subject if vault is None or not subject else vault.key_id(connection, tenant, subject)


def called_in(connection: Connection, tenant: str, subject: str) -> tuple[str, ...]:
    """What a subject is called in columns and ids: itself, or an opaque name and, in old rows, itself."""
    name = name_of(connection, tenant, subject)
    return (subject,) if name == subject else (name, subject)


def names_of(connection: Connection, tenant: str, subject: str) -> tuple[str, ...]:
    """Every name it may have there: as of today, from before encryption, and once it was emptied."""
    return tuple({subject, name_of(connection, tenant, subject), subject_id(tenant, subject)})
