"""What `countersign doctor` looks at in keys: there, readable by their owner only, and the ones in use."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, create_engine, make_url, select
from sqlalchemy.exc import SQLAlchemyError

from activities.services.checkpoints import KEY_FILE, last_note
from activities.services.key_life import people_changes, relatives
from activities.services.notes import NoteKey, is_signed
from activities.services.vault import KEY, KEY_BYTES, Keys, Vault
from models.settings import Settings
from scripts.commands.findings import Finding, Health

NEW = "made at first use"


async def look_at_keys(settings: Settings) -> list[Finding]:
    """Key files, and what the database says of them; makes none."""
    return await asyncio.to_thread(lambda: [*_master(settings), *_ledger(settings), *_database(settings)])


def _master(settings: Settings) -> Iterator[Finding]:
    """The files of the keys that seal."""
    sealing = settings.sealing
    if not sealing.enabled:
        yield Finding("encryption", Health.ABSENT, "off", "payloads and content stand in clear")
        return
    for key in sealing.keys:
        path = (settings.data / key.file).resolve()
        name, now = f"key {key.id}", key.id == sealing.current
        if path.exists():
            yield _file(name, path, KEY_BYTES)
        elif now and path.is_relative_to(settings.data.resolve()):
            yield Finding(name, Health.ABSENT, f"{path} is not there yet", NEW)
        else:
            health = Health.FAILED if now else Health.ABSENT
            yield Finding(name, health, f"{path} is missing", "restore it; what it sealed cannot be read")


def _ledger(settings: Settings) -> Iterator[Finding]:
    path = (settings.data / KEY_FILE).resolve()
    if not path.exists():
        yield Finding("ledger key", Health.ABSENT, f"{path} is not there yet", NEW)
    else:
        yield _file("ledger key", path, None)


def _file(name: str, path: Path, size: int | None) -> Finding:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Finding(name, Health.FAILED, f"{path} has mode {mode:o}", f"chmod 600 {path}")
    if size is not None and path.stat().st_size != size:
        found = f"{path} has {path.stat().st_size} bytes, a key has {size}"
        return Finding(name, Health.FAILED, found, "restore it from a backup")
    return Finding(name, Health.OK, f"{path}, mode {mode:o}")


def _database(settings: Settings) -> list[Finding]:
    """What is signed, wrapped and recorded; nothing where there is no database yet."""
    url = make_url(settings.database_url)
    if url.drivername.startswith("sqlite") and not Path(url.database or "").exists():
        return []
    engine = create_engine(url)
    try:
        with engine.connect() as link:
            return [*_signed(link, settings), *_wrapped(link, settings), *_people(link, settings)]
    except SQLAlchemyError:
        return []  # Its own line says what is wrong with the database.
    finally:
        engine.dispose()


def _signed(link: Connection, settings: Settings) -> Iterator[Finding]:
    """Whether the last checkpoint is by the key that signs now."""
    note, path = last_note(link, settings.tenant), settings.data / KEY_FILE
    if note is None:
        return
    if not path.exists():
        use = f"restore {path}; a new key would not follow the one that signed"
        yield Finding("checkpoints", Health.FAILED, "they are signed by a key that is not there", use)
        return
    key = NoteKey(f"{settings.ledger.origin}/{settings.tenant}", _public(path))
    if is_signed(note, [key]):
        yield Finding("checkpoints", Health.OK, f"the last one is signed by {key.key_id}")
    elif is_signed(note, relatives(link, settings.tenant, key)):
        found = "the last one is signed by a key before this one"
        yield Finding("checkpoints", Health.ABSENT, found, "restart the workers")
    else:
        use = "restore keys/ledger.pem; for a new key use `countersign ledger rotate`"
        yield Finding("checkpoints", Health.FAILED, f"the last one is not signed by {key.key_id}", use)


def _public(path: Path) -> bytes:
    private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    return private.public_key().public_bytes_raw() if isinstance(private, Ed25519PrivateKey) else b""


def _wrapped(link: Connection, settings: Settings) -> Iterator[Finding]:
    sealing = settings.sealing
    if not sealing.enabled:
        return
    gone = [key.id for key in sealing.keys if not (settings.data / key.file).exists()]
    under = select(KEY.c.wrapped_by).where(KEY.c.wrapped_by.in_(gone)).distinct()
    for name in link.execute(under).scalars():
        use = "restore it from a backup; what they seal cannot be read"
        yield Finding("data keys", Health.FAILED, f"some are under {name}, whose file is missing", use)
    if behind := Vault(Keys(sealing.current, {})).behind(link):
        found = f"{behind} are not under {sealing.current}"
        yield Finding("data keys", Health.ABSENT, found, "run `countersign vault rewrap`")


def _people(link: Connection, settings: Settings) -> Iterator[Finding]:
    changes = people_changes(link, settings.tenant, settings.people)
    if changes:
        found = f"{len(changes)} changes are not in the ledger"
        yield Finding("people's keys", Health.ABSENT, found, "run `countersign people --record`")
