"""Keys, data keys and sealed content: what opens, what does not, and what is gone for good."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError
from sqlalchemy import select, update

from activities.services.content import BLOB, ContentStore, get_blob, guard, peek_blob, put_blob, put_model
from activities.services.database import Database
from activities.services.vault import KEY, TENANT, Keys, Vault, load_keys
from models.canonical import canonical, sha256
from models.errors import InvalidInput, KeyDestroyed, KeyMissing, LedgerBroken
from models.settings import EncryptionSettings, KeySettings
from tests.databases import migrated

TEXT = b"Ann asked for a refund"
ON = EncryptionSettings(enabled=True)


def keys(*ids: str, current: str = "") -> Keys:
    return Keys(current or ids[-1], {name: name.encode().ljust(32, b".") for name in ids})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    url = migrated(f"sqlite:///{tmp_path / 'vault.db'}")
    opened = guard(Database(url), keys("k1"))
    yield opened
    opened.close()


def again(database: Database, using: Keys | None) -> Database:
    return guard(Database(str(database.engine.url)), using)


def stored(database: Database, digest: str) -> tuple[bytes, str | None]:
    query = select(BLOB.c.data, BLOB.c.sealed_by).where(BLOB.c.digest == digest)
    row = database.read_now(lambda link: link.execute(query).one())
    return bytes(row.data), row.sealed_by


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_what_one_key_sealed_opens_with_that_key_and_for_that_purpose_only() -> None:
    sealed = keys("k1").seal("payload", TEXT, "a", "b")
    assert keys("k1", "k2").open("k1", "payload", sealed, "a", "b") == TEXT
    with pytest.raises(KeyMissing, match="'k1'.*encryption.keys"):
        keys("k2").open("k1", "payload", sealed, "a", "b")
    wrong = [("data key", sealed, ("a", "b")), ("payload", sealed, ("ab", "")), ("payload", b"short", ("a",))]
    for purpose, data, bound in wrong:
        with pytest.raises(LedgerBroken, match="'k1'"):
            keys("k1").open("k1", purpose, data, *bound)


def test_every_changed_byte_is_found() -> None:
    made = keys("k1").seal("payload", TEXT)
    for at in range(len(made)):
        changed = made[:at] + bytes([made[at] ^ 1]) + made[at + 1 :]
        with pytest.raises(LedgerBroken):
            keys("k1").open("k1", "payload", changed)


def test_keys_are_not_shown() -> None:
    assert "k1...." not in repr(keys("k1"))


def test_no_keys_are_made_while_encryption_is_off(tmp_path: Path) -> None:
    assert load_keys(EncryptionSettings(), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_current_key_is_made_at_first_use_for_its_owner_only(tmp_path: Path) -> None:
    made, later = load_keys(ON, tmp_path), load_keys(ON, tmp_path)
    file = tmp_path / "keys" / "payloads-k1.key"
    assert made and later and made.secrets == later.secrets
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(file.read_bytes()) == 32
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_an_old_key_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    both = (KeySettings(id="k1", file=Path("k1")), KeySettings(id="k2", file=Path("k2")))
    loaded = load_keys(EncryptionSettings(enabled=True, keys=both, current="k2"), tmp_path)
    assert loaded and list(loaded.secrets) == ["k2"]
    assert not (tmp_path / "k1").exists()


def test_a_missing_key_outside_the_data_folder_is_not_made(tmp_path: Path) -> None:
    outside = (KeySettings(id="k1", file=tmp_path / "elsewhere"),)
    with pytest.raises(KeyMissing, match="'k1'"):
        load_keys(EncryptionSettings(enabled=True, keys=outside), tmp_path / "data")


@pytest.mark.parametrize(
    ("size", "mode", "remedy"), [(31, 0o600, "32 random bytes"), (32, 0o644, "chmod 600")]
)
def test_a_file_that_is_no_key_or_that_others_read_is_refused(
    tmp_path: Path, size: int, mode: int, remedy: str
) -> None:
    file = tmp_path / "keys" / "payloads-k1.key"
    file.parent.mkdir()
    file.write_bytes(os.urandom(size))
    file.chmod(mode)
    with pytest.raises(InvalidInput, match=remedy):
        load_keys(ON, tmp_path)


def test_settings_name_a_current_key_that_there_is() -> None:
    with pytest.raises(ValidationError, match=r"not the id of one of encryption\.keys"):
        EncryptionSettings(current="k9")
    twice = (KeySettings(id="k1", file=Path("a")), KeySettings(id="k1", file=Path("b")))
    with pytest.raises(ValidationError, match="one id"):
        EncryptionSettings(keys=twice)


async def test_content_is_sealed_in_the_database_and_read_back(database: Database, tmp_path: Path) -> None:
    content = ContentStore(database)
    ref = await content.put("acme", TEXT)
    assert await content.get("acme", ref) == TEXT
    assert ref.digest == sha256(TEXT) and ref.size == len(TEXT)
    assert stored(database, ref.digest)[1] == TENANT
    assert TEXT not in everything(tmp_path)


async def test_content_of_a_subject_is_named_by_what_is_stored(database: Database) -> None:
    content = ContentStore(database)
    ref = await content.put("acme", TEXT, subject="ann@example.test")
    data, key = stored(database, ref.digest)
    assert ref.digest == sha256(data) != sha256(TEXT)
    assert key is not None and key != TENANT and "ann" not in key
    assert await content.get("acme", ref) == TEXT
    assert await content.put("acme", TEXT, subject="ann@example.test") == ref
    assert await content.put("acme", TEXT, subject="bob@example.test") != ref


class Thing(BaseModel):
    name: str


async def test_a_model_is_named_by_its_canonical_bytes_all_the_same(database: Database) -> None:
    ref = await database.write(lambda link: put_model(link, "acme", Thing(name="x")))
    assert ref.digest == sha256(canonical(Thing(name="x")))


async def test_an_erased_subject_is_gone_and_no_late_retry_brings_it_back(database: Database) -> None:
    content, vault = ContentStore(database), Vault(keys("k1"))
    hers = await content.put("acme", TEXT, subject="ann")
    his = await content.put("acme", TEXT, subject="bob")
    key = await database.write(lambda link: vault.destroy(link, "acme", "ann", 7))
    assert await database.write(lambda link: vault.destroy(link, "acme", "ann", 8)) == key
    with pytest.raises(KeyDestroyed, match=key[:12]):
        await content.get("acme", hers)
    with pytest.raises(KeyDestroyed):
        await content.put("acme", b"more about her", subject="ann")
    assert await content.get("acme", his) == TEXT
    rows = database.read_now(lambda link: link.execute(select(KEY).where(KEY.c.subject_key_id == key)).all())
    assert [(row.wrapped, row.destroyed_at) for row in rows] == [(b"", 7)]


async def test_a_subject_can_be_erased_before_anything_of_it_came(database: Database) -> None:
    await database.write(lambda link: Vault(keys("k1")).destroy(link, "acme", "ann", 7))
    with pytest.raises(KeyDestroyed):
        await ContentStore(database).put("acme", TEXT, subject="ann")


async def test_data_keys_move_to_a_new_master_key_and_content_stays(database: Database) -> None:
    ref = await ContentStore(database).put("acme", TEXT, subject="ann")
    both, new = keys("k1", "k2"), keys("k2")
    moved = again(database, both)
    assert await moved.write(lambda link: Vault(both).rewrap(link)) == 2
    assert await moved.write(lambda link: Vault(both).rewrap(link)) == 0
    alone = again(database, new)
    assert await ContentStore(alone).get("acme", ref) == TEXT
    with pytest.raises(KeyMissing, match="'k2'"):
        await ContentStore(database).get("acme", ref)
    moved.close()
    alone.close()


async def test_sealed_content_without_keys_says_what_to_do(database: Database) -> None:
    ref = await ContentStore(database).put("acme", TEXT)
    off = again(database, None)
    with pytest.raises(KeyMissing, match=r"encryption\.enabled"):
        await ContentStore(off).get("acme", ref)
    off.close()


async def test_content_from_before_encryption_is_still_read(database: Database) -> None:
    off = again(database, None)
    ref = await ContentStore(off).put("acme", TEXT)
    off.close()
    assert await ContentStore(database).get("acme", ref) == TEXT


@pytest.mark.parametrize("subject", [None, "ann"])
async def test_changed_or_exchanged_content_is_found(database: Database, subject: str | None) -> None:
    ref = await ContentStore(database).put("acme", TEXT, subject=subject)
    other = await ContentStore(database).put("acme", b"another text", subject=subject)
    data, _ = stored(database, ref.digest)
    for bad in (data[:-1] + bytes([data[-1] ^ 1]), stored(database, other.digest)[0], b""):
        change = update(BLOB).where(BLOB.c.digest == ref.digest).values(data=bad)
        await database.write(lambda link, change=change: link.execute(change))
        with pytest.raises(LedgerBroken):
            await ContentStore(database).get("acme", ref)


async def test_who_checks_by_himself_sees_tampered_content_as_it_is(database: Database) -> None:
    ref = await database.write(lambda link: put_blob(link, "acme", TEXT, "text/plain"))
    await database.write(lambda link: link.execute(update(BLOB).values(data=b"rotten")))
    assert database.read_now(lambda link: peek_blob(link, "acme", ref.digest)) == b"rotten"
    assert database.read_now(lambda link: peek_blob(link, "acme", "0" * 64)) is None


async def test_one_tenant_cannot_open_what_is_another_s(database: Database) -> None:
    ref = await ContentStore(database).put("acme", TEXT)
    await ContentStore(database).put("other", b"its key")
    await database.write(lambda link: link.execute(update(BLOB).values(tenant="stolen")))
    with pytest.raises(LedgerBroken):
        database.read_now(lambda link: get_blob(link, "stolen", ref.digest))
