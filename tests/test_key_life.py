"""Keys that take each other's place: in the vault, in the ledger, and people's."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import SecretStr
from typer.testing import CliRunner

from activities.services.checkpoints import (
    KEY_FILE,
    Checkpoints,
    HandoverLate,
    Written,
    _keep,
    load_key,
    rotating,
    tree_of,
)
from activities.services.content import ContentStore, guard
from activities.services.database import Database
from activities.services.key_life import handed_over, log_rotation
from activities.services.ledger_export import of_database, of_lines, to_lines
from activities.services.ledger_store import LedgerStore
from activities.services.notes import NoteKey, checkpoint_text, sign
from activities.services.vault import load_keys
from activities.services.verifier import Verifier
from models.errors import KeyMissing, LedgerBroken
from models.ledger import EventType
from models.people import Key, Person
from models.settings import (
    CodecServerSettings,
    EncryptionSettings,
    KeySettings,
    Settings,
    TemporalSettings,
)
from scripts import stack, verify_ledger
from scripts.cli import app
from scripts.commands.doctor import Health
from scripts.commands.keys import look_at_keys
from temporal import dev_server
from temporal.converter import codec_of
from tests.conftest import a_key, free_port
from tests.databases import migrated
from tests.ledgers import NOW, TENANT, asked, fill
from workers import config

FILES = tuple(KeySettings(id=name, file=Path(f"keys/{name}.key")) for name in ("k1", "k2"))
OLD, NEW = (EncryptionSettings(enabled=True, keys=FILES, current=name) for name in ("k1", "k2"))
PUBLIC = "ssh-ed25519 " + "A" * 68


class Place:
    """A data folder whose content is sealed under the first key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(data=folder, embeddings=None, approver="ops", encryption=OLD)
        migrated(self.settings.database_url)

    def opened(self, encryption: EncryptionSettings = OLD) -> Database:
        return guard(Database(self.settings.database_url), load_keys(encryption, self.folder))

    async def fill(self) -> None:
        database = self.opened()
        await fill(database, 2)
        for number in range(3):
            data = f"text {number}".encode()
            await ContentStore(database).put(TENANT, data, subject=f"s{number}")
        await asyncio.to_thread(database.close)

    async def events(self) -> list[dict[str, Any]]:
        database = self.opened()
        events = await LedgerStore(database, lambda: NOW).tail(TENANT, 100)
        await asyncio.to_thread(database.close)
        return [one.body for one in events if one.type is EventType.KEY_ROTATED]

    async def run(self, *arguments: str, **changed: Any) -> Any:
        kept = self.folder / "settings.json"
        config.snapshot(self.settings.model_copy(update=changed), kept)
        env = {config.SNAPSHOT: str(kept)}
        return await asyncio.to_thread(lambda: CliRunner().invoke(app, list(arguments), env=env))

    async def said(self, *arguments: str, **changed: Any) -> Any:
        ran = await self.run(*arguments, "--json", **changed)
        assert ran.exit_code == 0, ran.output
        return json.loads(ran.stdout)

    async def health(self, **changed: Any) -> dict[str, tuple[Health, str]]:
        found = await look_at_keys(self.settings.model_copy(update=changed))
        return {one.name: (one.health, f"{one.found}; {one.use}") for one in found}


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    made = Place(tmp_path)
    await made.fill()
    yield made


async def test_data_keys_are_wrapped_anew_and_the_ledger_says_so(place: Place) -> None:
    await place.said("vault", "status", encryption=NEW)
    before = await place.health(encryption=NEW)
    assert before["data keys"][0] is Health.ABSENT and "vault rewrap" in before["data keys"][1]
    assert await place.said("vault", "rewrap", encryption=NEW) == {"current": "k2", "rewrapped": 4}
    assert (await place.said("vault", "status", encryption=NEW))["keys"] == {"k2": 4}
    assert await place.said("vault", "rewrap", encryption=NEW) == {"current": "k2", "rewrapped": 0}
    assert await place.events() == [{"purpose": "vault", "old": "k1", "new": "k2", "keys": 4}]
    assert "data keys" not in await place.health(encryption=NEW)
    (place.folder / "keys" / "k1.key").unlink()
    database = place.opened(NEW)
    ref = await ContentStore(database).put(TENANT, b"text 1", subject="s1")
    assert await ContentStore(database).get(TENANT, ref) == b"text 1"
    await asyncio.to_thread(database.close)


async def test_rewrapping_says_what_is_missing(place: Place) -> None:
    off = await place.run("vault", "rewrap", encryption=EncryptionSettings())
    assert off.exit_code == 2 and "encryption.enabled" in off.output
    nobody = await place.run("vault", "rewrap", approver=None)
    assert nobody.exit_code == 2 and "--as" in nobody.output


async def test_no_key_is_made_in_the_place_of_one_that_data_keys_are_under(place: Place) -> None:
    file, url = place.folder / "keys" / "k1.key", place.settings.database_url
    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(KeyMissing, match="restore the file"):
        codec_of(OLD, place.folder, url)
    ended = await place.run("vault", "status")
    assert ended.exit_code == 3 and "restore the file" in ended.stderr
    assert "restore it" in (await place.health())["data keys"][1]
    assert not file.exists()
    file.write_bytes(kept)
    file.chmod(0o600)
    assert (await place.said("vault", "status"))["keys"] == {"k1": 4}


async def exported(place: Place) -> tuple[list[str], Checkpoints]:
    database = place.opened()
    checkpoints = Checkpoints(database, load_key(place.folder), "countersign")
    await checkpoints.write(TENANT)
    name = checkpoints.key(TENANT).name
    lines = await database.read(lambda link: list(to_lines(of_database(link, TENANT, name))))
    await asyncio.to_thread(database.close)
    return lines, checkpoints


def codes(place: Place, lines: list[str], *keys: NoteKey) -> set[int]:
    """What both verifiers make of an export."""
    file = place.folder / "export"
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8", newline="\n")
    code, _ = verify_ledger.check_export(str(file), [verify_ledger.Key(str(key)) for key in keys], [])
    return {code, Verifier(keys).check(of_lines(lines)).exit_code}


async def test_the_ledger_s_new_key_is_trusted_by_who_has_the_old_one(place: Place) -> None:
    await exported(place)
    told = await place.said("ledger", "rotate")
    old, new = NoteKey.parse(told["old"]), NoteKey.parse(told["new"])
    assert old != new and str(new) == (await place.run("ledger", "key")).stdout.strip()
    kept = [path for path in (place.folder / "keys").glob("ledger*") if path.stat().st_mode & 0o077 == 0]
    assert len(kept) == 2
    lines, signer = await exported(place)
    assert signer.key(TENANT) == new
    assert codes(place, lines, old) == codes(place, lines, old, new) == {0}
    # Who has only the new key cannot check what the old one signed; the database leads back to it.
    assert codes(place, lines, new) == {1}
    assert (await place.run("ledger", "verify")).exit_code == 0
    await place.said("ledger", "rotate")
    assert (await place.run("ledger", "verify")).exit_code == 0
    assert codes(place, (await exported(place))[0], old) == {0}


@pytest.mark.parametrize("signature", ["by_old", "old", "none"])
async def test_nobody_hands_over_a_key_that_is_not_theirs(place: Place, signature: str) -> None:
    lines, checkpoints = await exported(place)
    key, name = checkpoints.key(TENANT), checkpoints.key(TENANT).name
    thief = load_key(place.folder / "elsewhere")
    body = handed_over(load_key(place.folder), thief, name)
    if signature == "by_old":
        body |= {"by_old": body["by_new"]}
    elif signature == "old":
        body = handed_over(thief, load_key(place.folder / "third"), name)
    else:
        del body["by_old"]
    database = place.opened()
    await database.write(lambda link: log_rotation(link, TENANT, "eve", NOW, body))
    by_thief = NoteKey(name, thief.public_key().public_bytes_raw())
    tree = await database.read(lambda link: tree_of(link, TENANT, name))
    note = sign(checkpoint_text(tree), by_thief, thief)
    await database.write(lambda link: _keep(link, TENANT, tree, note, by_thief))
    lines = await database.read(lambda link: list(to_lines(of_database(link, TENANT, name))))
    await asyncio.to_thread(database.close)
    assert codes(place, lines, key) == {1}


async def test_what_changed_in_people_s_keys_is_recorded_once(place: Place) -> None:
    ann = Person(name="ann", keys=(Key(public=PUBLIC),))
    revoked = Person(name="ann", keys=(Key(public=PUBLIC, revoked=True),))
    assert (await place.health(people=(ann,)))["people's keys"][0] is Health.ABSENT
    for people, change in (((ann,), ["added"]), ((ann,), []), ((revoked,), ["revoked"]), ((), ["removed"])):
        said = await place.said("people", "--record", people=people)
        assert [one["change"] for one in said] == change
    again = await place.said("people", "--record", people=(ann,))
    assert [one["change"] for one in again] == ["added"]
    assert [(one["person"], one["change"]) for one in await place.events()] == [
        ("ann", "added"),
        ("ann", "revoked"),
        ("ann", "removed"),
        ("ann", "added"),
    ]
    assert "people's keys" not in await place.health(people=(ann,))


async def test_the_doctor_looks_at_key_files(place: Place) -> None:
    await exported(place)
    found = await place.health()
    assert {name for name, (health, _) in found.items() if health is Health.OK} == {
        "key k1",
        "ledger key",
        "checkpoints",
    }
    assert found["key k2"][0] is Health.ABSENT
    os.chmod(place.folder / "keys" / "k1.key", 0o644)
    assert "chmod 600" in (await place.health())["key k1"][1]
    (place.folder / "keys" / "k1.key").write_bytes(b"short")
    os.chmod(place.folder / "keys" / "k1.key", 0o600)
    assert (await place.health())["key k1"][0] is Health.FAILED
    elsewhere = EncryptionSettings(
        enabled=True, keys=(KeySettings(id="k1", file=place.folder.parent / "away.key"),)
    )
    assert (await place.health(encryption=elsewhere))["key k1"][0] is Health.FAILED
    assert (await place.health(encryption=EncryptionSettings()))["encryption"][0] is Health.ABSENT


async def test_a_key_made_in_the_place_of_one_that_is_gone_signs_nothing(place: Place) -> None:
    lines, _ = await exported(place)
    kept = (place.folder / KEY_FILE).read_bytes()
    (place.folder / KEY_FILE).unlink()
    database = place.opened()
    await fill(database, 1, first=2)
    with pytest.raises(LedgerBroken, match="restore"):
        await Checkpoints(database, load_key(place.folder), "countersign").write(TENANT)
    assert (await place.run("ledger", "rotate")).exit_code != 0
    (place.folder / KEY_FILE).write_bytes(kept)
    written = await Checkpoints(database, load_key(place.folder), "countersign").write(TENANT)
    await asyncio.to_thread(database.close)
    assert written is not None and written.size > len(lines) // 2
    assert (await place.run("ledger", "verify")).exit_code == 0


@pytest.mark.parametrize("command", ["key", "verify", "checkpoint", "rotate"])
async def test_no_command_makes_a_key_beside_notes_of_one_that_is_gone(place: Place, command: str) -> None:
    await exported(place)
    (place.folder / KEY_FILE).unlink()
    for tenant in (TENANT, "another"):
        ended = await place.run("ledger", command, tenant=tenant)
        assert ended.exit_code == 2 and "restore it" in ended.stderr
    assert not (place.folder / KEY_FILE).exists()


async def test_no_key_is_made_where_the_database_cannot_say_whether_there_was_one(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "countersign.db").write_bytes(b"this is no database, it only has the name of one" * 99)
    assert (await place.run("ledger", "key")).exit_code != 0
    assert not (tmp_path / KEY_FILE).exists()


async def test_who_runs_since_before_a_rotation_goes_on_signing_with_the_old_key(place: Place) -> None:
    old = load_key(place.folder)
    for _ in range(2):
        await place.said("ledger", "rotate")
    database = place.opened()
    for number, key in enumerate((old, load_key(place.folder), old), 2):
        await fill(database, 1, first=number)
        assert await Checkpoints(database, key, "countersign").write(TENANT) is not None
    await asyncio.to_thread(database.close)
    assert (await place.run("ledger", "verify")).exit_code == 0


async def signed_by(place: Place, database: Database, *keys: Ed25519PrivateKey) -> list[Written]:
    """What each of them signs in turn of a log that grows."""
    made = list[Written]()
    for key in keys:
        event = a_key()
        await LedgerStore(database, lambda: NOW).add("later", asked(event, event))
        late = HandoverLate(place.folder, key, lambda: NOW)
        written = await Checkpoints(database, key, "countersign", late=late).write("later")
        assert written is not None
        made.append(written)
    return made


@pytest.mark.parametrize("is_old_first", [True, False])
async def test_a_log_that_began_during_a_rotation_is_signed_by_the_old_key_and_the_new(
    place: Place, is_old_first: bool
) -> None:
    await exported(place)
    old = load_key(place.folder)
    await place.said("ledger", "rotate")
    new, database = load_key(place.folder), place.opened()
    first, *_ = await signed_by(place, database, *([old, new] if is_old_first else [new, old]), old, new)
    lines = await database.read(lambda link: list(to_lines(of_database(link, "later", "countersign/later"))))
    await asyncio.to_thread(database.close)
    # Who trusts the key that signed first follows it to the other one.
    assert codes(place, lines, first.key) == {0}
    assert sum("key.rotated" in line for line in lines) == 1
    assert (await place.run("ledger", "verify", tenant="later")).exit_code == 0


async def test_keys_belong_together_however_they_came_to_follow_each_other(place: Place) -> None:
    await exported(place)
    keys, database = [load_key(place.folder)], place.opened()
    for _ in range(2):
        await place.said("ledger", "rotate")
        keys.append(load_key(place.folder))
        await signed_by(place, database, keys[0])
    await signed_by(place, database, keys[2], keys[1], keys[2], keys[0], keys[1])
    await asyncio.to_thread(database.close)
    assert (await place.run("ledger", "verify", tenant="later")).exit_code == 0


async def test_no_key_but_one_of_ours_is_handed_over_late(place: Place) -> None:
    await exported(place)
    stranger = load_key(place.folder / "elsewhere")
    database = place.opened()
    await LedgerStore(database, lambda: NOW).add("later", asked("event"))
    await Checkpoints(database, stranger, "countersign").write("later")
    mine = load_key(place.folder)
    signer = Checkpoints(database, mine, "countersign", late=HandoverLate(place.folder, mine, lambda: NOW))
    with pytest.raises(LedgerBroken, match="restore"):
        await signer.write("later")
    await asyncio.to_thread(database.close)


def test_the_disk_is_told_of_a_new_key_before_anything_is_signed_or_sealed_with_it(tmp_path: Path) -> None:
    steps, heard = list[str](), [True]

    def hear(name: str, given: tuple[Any, ...]) -> None:
        # A hook stays for as long as the process.
        if heard and (name == "os.link" or name == "open" and str(given[0]) == str(tmp_path / "keys")):
            steps.append(name)

    sys.addaudithook(hear)
    load_key(tmp_path)
    load_keys(OLD, tmp_path)
    heard.clear()
    assert steps == ["os.link", "open"] * 2


async def test_of_two_rotations_at_once_one_is_refused_and_changes_nothing(place: Place) -> None:
    await exported(place)
    before = load_key(place.folder).private_bytes_raw()
    with rotating(place.folder):
        ended = await place.run("ledger", "rotate")
    assert ended.exit_code == 3 and "another `ledger rotate`" in ended.stderr
    assert load_key(place.folder).private_bytes_raw() == before
    assert await place.events() == []
    await place.said("ledger", "rotate")


async def test_the_doctor_finds_checkpoints_of_another_key(place: Place) -> None:
    await exported(place)
    kept = (place.folder / KEY_FILE).read_bytes()
    (place.folder / KEY_FILE).unlink()
    assert "restore" in (await place.health())["checkpoints"][1]
    load_key(place.folder)
    health, told = (await place.health())["checkpoints"]
    assert health is Health.FAILED and "ledger rotate" in told
    (place.folder / KEY_FILE).write_bytes(kept)
    assert (await place.health())["checkpoints"][0] is Health.OK
    await place.said("ledger", "rotate")
    assert (await place.health())["checkpoints"][0] is Health.OK


def test_the_ui_is_told_of_the_codec_server_where_one_runs(tmp_path: Path) -> None:
    server = CodecServerSettings(port=free_port(), token=SecretStr("a-token-of-the-codec-server"))
    sealed = EncryptionSettings(enabled=True, server=server)
    ports = TemporalSettings(address=f"127.0.0.1:{free_port()}", ui_port=free_port())
    settings = Settings(data=tmp_path, temporal=ports, embeddings=None, encryption=sealed)
    parts = {part.name: part for part in stack.children(settings, tmp_path / "kept.json")}
    assert list(parts)[:2] == ["codec", "temporal"]
    at = parts["temporal"].argv.index("--ui-codec-endpoint")
    assert parts["temporal"].argv[at + 1] == f"http://127.0.0.1:{server.port}"
    assert "encryption.server.port" in [port.setting for port in stack.ports(settings)]
    assert stack.addresses(settings)["sealed payloads"].endswith("/signin")
    for off in (EncryptionSettings(server=server), EncryptionSettings(enabled=True)):
        plain = settings.model_copy(update={"encryption": off})
        names = {part.name: part for part in stack.children(plain, tmp_path / "kept.json")}
        assert "codec" not in names and "--ui-codec-endpoint" not in names["temporal"].argv
    assert "--ui-codec-endpoint" not in dev_server.argv(Path("temporal"), ports, tmp_path)


async def test_the_codec_server_comes_up_with_the_rest(tmp_path: Path) -> None:
    server = CodecServerSettings(port=free_port(), token=SecretStr("a-token-of-the-codec-server"))
    sealed = EncryptionSettings(enabled=True, server=server)
    elsewhere = TemporalSettings(managed=False)
    settings = Settings(data=tmp_path, temporal=elsewhere, embeddings=None, encryption=sealed, roles=())
    async with stack.stack(settings) as running, httpx.AsyncClient(trust_env=False) as client:
        page = await client.get(running.addresses["sealed payloads"])
        assert page.status_code == 200 and "Token" in page.text
        refused = await client.post(f"{stack.codec_address(settings)}/decode", json={"payloads": []})
        assert refused.status_code == 401
