from __future__ import annotations

import asyncio
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, select

from activities.connectors.null import Null
from activities.services.actor import Actor
from activities.services.alarms import Alarms
from activities.services.checkpoints import CHECKPOINT, Checkpoints, load_key
from activities.services.database import Database
from activities.services.git import Git
from activities.services.notes import NoteKey, Tree, checkpoint_text, is_signed, read_checkpoint, sign
from activities.services.scrubbing import Scrub
from activities.services.watching import keep_watch
from activities.services.witnesses import BRANCH, FileWitness, GitWitness, witnesses
from models.errors import ConnectorUnavailable, InvalidInput, LedgerBroken
from models.loop import GateRule, Reversibility
from models.orders import EffectOrder
from models.policy import AgentPolicy, Policy
from tests.ledgers import NOW, PRIVATE, TENANT, fill, intent_of, record, whole, wipe

KEY = NoteKey("countersign/default", PRIVATE.public_key().public_bytes_raw())
TREE = Tree("countersign/default", 7, bytes(32))


def clock() -> datetime:
    return datetime(2026, 5, 1, tzinfo=UTC)


def signer(database: Database, *kept_by: FileWitness | GitWitness) -> Checkpoints:
    return Checkpoints(database, PRIVATE, "countersign", kept_by)


async def signed(database: Database) -> list[str]:
    """All checkpoints, smallest first."""
    query = select(CHECKPOINT.c.note).order_by(CHECKPOINT.c.size)
    return await database.read(lambda link: list(link.execute(query).scalars()))


class Deaf:
    """A witness that cannot be reached."""

    name = "deaf"

    async def newest(self, origin: str) -> str | None:
        raise OSError("no route")

    async def keep(self, note: str) -> None:
        raise OSError("no route")


def test_a_note_has_the_published_form() -> None:
    note = sign(checkpoint_text(TREE), KEY, PRIVATE)
    first, second, third, blank, signature, end = note.split("\n")
    assert (first, second, third) == ("countersign/default", "7", "A" * 43 + "=")
    assert (blank, end) == ("", "")
    assert signature.startswith("— countersign/default ")
    assert read_checkpoint(note) == TREE
    assert is_signed(note, [KEY])


def test_the_published_example_of_a_note_verifies() -> None:
    # golang.org/x/mod/sumdb/note, package documentation.
    key = NoteKey.parse("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    note = (
        "If you think cryptography is the answer to your problem,\n"
        "then you don't know what your problem is.\n"
        "\n"
        "— PeterNeumann "
        "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
    )
    assert is_signed(note, [key])
    assert not is_signed(note.replace("problem is", "problem was"), [key])


def test_any_changed_character_of_a_note_is_seen() -> None:
    note = sign(checkpoint_text(TREE), KEY, PRIVATE)
    for place, character in enumerate(note):
        for other in {"A", "B", "9", "=", "\n", " "} - {character}:
            assert not is_signed(note[:place] + other + note[place + 1 :], [KEY]), (place, other)


def test_a_key_is_written_and_read_back() -> None:
    assert NoteKey.parse(str(KEY)) == KEY
    with pytest.raises(InvalidInput, match="key: "):
        NoteKey.parse(str(KEY).replace("+", "-", 1))
    with pytest.raises(InvalidInput, match="key: "):
        NoteKey.parse(f"other{KEY}")


@pytest.mark.parametrize(
    "note", ["", "a\nb\nc\n", "o\n1\nAAAA\n\n", "o\n01\n" + "A" * 43 + "=\n\n", "o\n-1\n\n"]
)
def test_what_is_no_checkpoint_is_refused(note: str) -> None:
    with pytest.raises(InvalidInput, match="checkpoint: "):
        read_checkpoint(note)


def test_the_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    first = load_key(tmp_path)
    assert load_key(tmp_path).private_bytes_raw() == first.private_bytes_raw()
    path = tmp_path / "keys" / "ledger.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(InvalidInput, match="others can read it"):
        load_key(tmp_path)


async def test_an_empty_log_gets_no_checkpoint(database: Database) -> None:
    assert await signer(database).write(TENANT) is None


async def test_a_checkpoint_is_kept_once_and_handed_to_every_witness(
    database: Database, tmp_path: Path
) -> None:
    kept_by = FileWitness(tmp_path / "file"), GitWitness(tmp_path / "git", clock)
    checkpoints = signer(database, *kept_by)
    await fill(database, 2)
    first = await checkpoints.write(TENANT)
    again = await checkpoints.write(TENANT)
    await fill(database, 1, first=2)
    second = await checkpoints.write(TENANT)
    assert first is not None and second is not None and again is not None
    assert (first.size, again.note, second.size) == (14, first.note, 21)
    assert first.kept_by == tuple(one.name for one in kept_by)
    assert await signed(database) == [first.note, second.note]
    for witness in kept_by:
        assert await witness.newest("countersign/default") == second.note
        assert await witness.newest("countersign/other") is None
    assert (tmp_path / "file" / "countersign_default.notes").read_text() == f"{first.note}\n{second.note}\n"


def note_of(size: int) -> str:
    return sign(checkpoint_text(Tree(KEY.name, size, bytes([size]) * 32)), KEY, PRIVATE)


async def test_what_was_left_of_a_note_spoils_no_other_one(tmp_path: Path) -> None:
    witness, (first, torn, later) = FileWitness(tmp_path), (note_of(size) for size in (3, 5, 7))
    await witness.keep(first)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for end in range(len(torn.encode()) + 1):
        path.write_bytes(whole + torn.encode()[:end])
        # Without its last line end a note is whole.
        assert await witness.newest(KEY.name) == (first if end < len(torn.encode()) - 1 else torn), end
        await witness.keep(later)
        assert await witness.newest(KEY.name) == later, end


@pytest.mark.parametrize("kind", ["file", "git"])
async def test_of_two_that_wrote_past_each_other_the_larger_log_is_the_newest(
    tmp_path: Path, kind: str
) -> None:
    (witness,) = witnesses((f"{kind}:w",), tmp_path, clock)
    smaller, larger = (note_of(size) for size in (5, 7))
    await witness.keep(larger)
    await witness.keep(smaller)
    assert await witness.newest(KEY.name) == larger


class Babbling(Deaf):
    """A witness that holds something else than notes."""

    name = "babbling"

    async def newest(self, origin: str) -> str | None:
        return "no note"

    async def keep(self, note: str) -> None:
        return None


async def test_a_witness_that_holds_no_note_stops_no_checkpoint_and_vouches_for_none(
    database: Database,
) -> None:
    await fill(database, 1)
    checkpoints = Checkpoints(database, PRIVATE, "countersign", (Babbling(),))
    written = await checkpoints.write(TENANT)
    assert written is not None and (written.size, written.missed_by) == (7, ("babbling",))
    with pytest.raises(ConnectorUnavailable, match="babbling has not the checkpoint"):
        await checkpoints.before_effect(TENANT)


async def test_a_disk_that_does_not_answer_holds_up_one_thread_and_no_checkpoint(
    database: Database, tmp_path: Path
) -> None:
    silent = tmp_path / "countersign_default.notes"
    os.mkfifo(silent)  # Who opens it to read waits until somebody writes.
    checkpoints = signer(database, FileWitness(tmp_path, seconds=0.01))
    await fill(database, 1)
    for _ in range(3):
        written = await checkpoints.write(TENANT)
        assert written is not None and written.missed_by == (f"file:{tmp_path}",)
    [waiting] = [one for one in threading.enumerate() if one.name == "witness"]
    os.close(os.open(silent, os.O_WRONLY))
    waiting.join()
    silent.unlink()
    written = await signer(database, FileWitness(tmp_path)).write(TENANT)
    assert written is not None and written.kept_by == (f"file:{tmp_path}",)


async def test_a_git_witness_that_holds_no_text_stops_no_checkpoint(
    database: Database, tmp_path: Path
) -> None:
    checkpoints, git = signer(database, GitWitness(tmp_path / "git", clock)), Git(tmp_path / "git", clock)
    await fill(database, 1)
    await checkpoints.write(TENANT)
    head, entry = await git.head(BRANCH), await git.store(b"\xff\xfe\n")
    assert head is not None
    commit = await git.commit(head, {"countersign_default.note": entry}, "no note", clock())
    assert await git.swap(BRANCH, commit, head)
    written = await checkpoints.write(TENANT)
    assert written is not None and written.missed_by == (f"git:{tmp_path}/git",)


async def test_a_cut_log_is_not_signed_again(database: Database, tmp_path: Path) -> None:
    checkpoints = signer(database, FileWitness(tmp_path / "file"))
    await fill(database, 2)
    await checkpoints.write(TENANT)
    with database.engine.begin() as link:
        wipe(link)
    await fill(database, 1)
    with pytest.raises(LedgerBroken, match="has 7 events, 14 were signed"):
        await checkpoints.write(TENANT)


async def test_a_rewritten_log_is_not_signed_again(database: Database, tmp_path: Path) -> None:
    checkpoints = signer(database, FileWitness(tmp_path / "file"))
    await fill(database, 2)
    await checkpoints.write(TENANT)
    with database.engine.begin() as link:
        wipe(link)
    await fill(database, 3, first=1)
    with pytest.raises(LedgerBroken, match="does not continue the 14 events"):
        await checkpoints.write(TENANT)


async def test_an_effect_beyond_recall_waits_for_every_witness(database: Database, tmp_path: Path) -> None:
    file = FileWitness(tmp_path / "file")
    await fill(database, 1)
    await signer(database, file).before_effect(TENANT)
    assert await file.newest("countersign/default") is not None
    with pytest.raises(ConnectorUnavailable, match="deaf has not the checkpoint"):
        await Checkpoints(database, PRIVATE, "countersign", (file, Deaf())).before_effect(TENANT)


async def test_signing_goes_on_while_a_witness_is_away(database: Database) -> None:
    await fill(database, 1)
    written = await Checkpoints(database, PRIVATE, "countersign", (Deaf(),)).write(TENANT)
    assert written is not None
    assert (written.kept_by, written.missed_by) == ((), ("deaf",))


async def test_the_last_events_are_signed_when_a_process_ends(database: Database) -> None:
    stop = asyncio.Event()
    task = asyncio.create_task(keep_watch(signer(database), Scrub(database), Alarms({}, clock), 3600, stop))
    await fill(database, 1)
    stop.set()
    await task
    assert len(await signed(database)) == 1


def test_witnesses_are_named_in_settings(tmp_path: Path) -> None:
    file, git = witnesses(("file:w", "git:g.git"), tmp_path, clock)
    assert (file.name, git.name) == (f"file:{tmp_path}/w", f"git:{tmp_path}/g.git")
    with pytest.raises(InvalidInput, match="write file:FOLDER or git:BARE_REPOSITORY"):
        witnesses(("carrier pigeon",), tmp_path, clock)


@pytest.mark.parametrize(("kind", "shown"), [("irreversible", True), ("reversible", False)])
async def test_only_what_cannot_be_taken_back_waits_for_witnesses(
    database: Database, tmp_path: Path, kind: str, shown: bool
) -> None:
    seen = list[str]()

    async def witness(tenant: str) -> None:
        seen.append(tenant)

    def bind(link: Connection) -> str:
        _, digest = intent_of(link, "run", GateRule(), Reversibility(kind))
        record(link, "run", digest, whole(digest, "run")[:4])
        return digest

    digest = await database.write(bind)
    connectors = {"null": Null(tmp_path / "notes", clock)}
    policy = Policy(agents={"external": AgentPolicy(connectors=("null",))})
    actor = Actor(database, connectors, policy, timedelta(seconds=5), lambda: NOW, witness=witness)
    await actor.apply(EffectOrder(tenant=TENANT, workflow_id="run", digest=digest, action=0))
    await actor.apply(EffectOrder(tenant=TENANT, workflow_id="run", digest="f" * 64, action=0))
    assert seen == [TENANT] * shown
