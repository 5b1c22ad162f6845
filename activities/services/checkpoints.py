"""Signing what the log is: size and root, by a key of ours, handed to witnesses that we cannot make forget.

A checkpoint is signed only if it continues the last one and whatever the witnesses hold; otherwise the
database was rolled back or rewritten, and signing would hide it.
"""

from __future__ import annotations

import fcntl
import logging
import os
from base64 import b64encode
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, select, union

from activities.services import merkle
from activities.services.cosignatures import with_lines
from activities.services.cosigning import Alert, Cosigning, RemoteCosigner, cosignatures
from activities.services.database import Database, insert_for
from activities.services.key_files import private_key
from activities.services.key_life import handed_over, log_rotation, relatives
from activities.services.ledger_store import EVENT, HEAD, NODE
from activities.services.notes import NoteKey, Tree, checkpoint_text, is_signed, read_checkpoint, sign
from activities.services.witnesses import Witness
from models.canonical import sha256
from models.errors import (
    ConnectorUnavailable,
    CountersignError,
    InvalidInput,
    LedgerBroken,
    Unavailable,
    UnknownName,
)
from models.tables import Checkpoint, table

CHECKPOINT = table(Checkpoint)
KEY_FILE = Path("keys") / "ledger.pem"
NEXT_FILE = Path("keys") / "ledger-next.pem"
KEPT_FILES = Path("keys") / "ledger-????????.pem"
Late = Callable[[Connection, str, NoteKey], bool]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint and where it is."""

    note: str
    size: int
    key: NoteKey
    kept_by: tuple[str, ...] = ()
    missed_by: tuple[str, ...] = ()
    cosigned_by: tuple[str, ...] = ()
    alerts: tuple[Alert, ...] = ()
    """What is wrong with co-signers, or what they say is wrong with the log."""


class Checkpoints:
    """Signs the logs of one database."""

    def __init__(
        self,
        database: Database,
        private: Ed25519PrivateKey,
        origin: str,
        witnesses: Sequence[Witness] = (),
        cosigners: Sequence[RemoteCosigner] = (),
        needed: int | None = None,
        late: Late = lambda link, tenant, key: False,
    ) -> None:
        """`origin` and the tenant name the log and its key; see `load_key`.

        Of the co-signers `needed` must have cosigned before what cannot be taken back; `None` is all. `late`
        is asked when another key signed last; see `HandoverLate`.
        """
        self._database = database
        self._private = private
        self._origin = origin
        self._witnesses = tuple(witnesses)
        self._cosigning = Cosigning(database, cosigners)
        self._needed = len(cosigners) if needed is None else needed
        self._late = late
        self._seen = set[str]()

    def key(self, tenant: str) -> NoteKey:
        """What verifies this log's notes."""
        public = self._private.public_key().public_bytes_raw()
        return NoteKey(f"{self._origin}/{tenant}", public)

    async def tenants(self) -> tuple[str, ...]:
        """Whose logs there are, or were: one that is gone is not forgotten with its head."""
        query = union(select(HEAD.c.log_id), select(CHECKPOINT.c.log_id))
        self._seen |= await self._database.read(lambda link: set(link.execute(query).scalars()))
        return tuple(sorted(self._seen))

    async def write(self, tenant: str) -> Written | None:
        """Sign the log as it stands and hand the note to every witness; `None` for an empty log.

        Raises:
            LedgerBroken: the log does not continue what was signed before.
        """
        key = self.key(tenant)
        held, missed = await self._held(key)
        for note in held.values():
            await self._database.read(lambda link, note=note: continues(link, tenant, note))
        made = await self._signed(tenant, key)
        if made is None:
            return None
        tree, note = made
        await self._database.write(lambda link: _keep(link, tenant, tree, note, key))
        kept = tuple([name for name in await self._send(note, held) if name not in missed])
        missed = tuple(one.name for one in self._witnesses if one.name not in kept)
        alerts = await self._cosign(tenant, key, tree, note)
        cosigned = {one.name for one in self._cosigning.cosigners} - {one.witness for one in alerts}
        if cosigned:
            lines = await self._database.read(lambda link: cosignatures(link, tenant, tree.size))
            note = with_lines(note, lines.get(tree.size, ()))
        return Written(note, tree.size, key, kept, missed, tuple(sorted(cosigned)), tuple(alerts))

    async def newest_witnessed(self, tenant: str) -> tuple[str, ...]:
        """What the witnesses that answer hold of a log."""
        held, _ = await self._held(self.key(tenant))
        return tuple(held.values())

    async def before_effect(self, tenant: str) -> None:
        """Let the witnesses see the log before something happens that cannot be taken back.

        Raises:
            ConnectorUnavailable: one of them does not have it; nothing may happen yet.
        """
        written = await self.write(tenant)
        if written is not None and written.missed_by:
            missed = ", ".join(written.missed_by)
            raise ConnectorUnavailable(
                f"ledger.witnesses: {missed} has not the checkpoint; mend it, or take it out of the settings"
            )
        if written is not None and len(written.cosigned_by) < self._needed:
            why = "; ".join(map(str, written.alerts))
            raise ConnectorUnavailable(f"ledger.cosigners: {self._needed} have to cosign first; {why}")

    async def _cosign(self, tenant: str, key: NoteKey, tree: Tree, note: str) -> list[Alert]:
        if not self._cosigning.cosigners:
            return []

        async def proof(old: int, new: int) -> Sequence[bytes]:
            return await self._database.read(
                lambda link: merkle.consistency_proof(old, new, subtrees(link, tenant))
            )

        async def again() -> tuple[Tree, str]:
            made = await self._database.read(lambda link: self._sign(link, tenant, key))
            newer, signed = made if made is not None else (tree, note)
            await self._database.write(lambda link: _keep(link, tenant, newer, signed, key))
            return newer, signed

        return await self._cosigning.collect(tenant, tree, note, proof, again)

    async def _signed(self, tenant: str, key: NoteKey) -> tuple[Tree, str] | None:
        try:
            return await self._database.read(lambda link: self._sign(link, tenant, key))
        except LedgerBroken:
            if not await self._database.write(lambda link: self._late(link, tenant, key)):
                raise
        return await self._database.read(lambda link: self._sign(link, tenant, key))

    def _sign(self, link: Connection, tenant: str, key: NoteKey) -> tuple[Tree, str] | None:
        last = last_note(link, tenant)
        tree = tree_of(link, tenant, key.name)
        if tree.size == 0:
            return None
        if last is not None:
            continues(link, tenant, last)
            if is_signed(last, [key]):
                if read_checkpoint(last) == tree:
                    return tree, last
            elif not is_signed(last, relatives(link, tenant, key)):
                raise LedgerBroken(
                    f"log {tenant} was signed by another key than {key}, and nothing says that this one "
                    f"follows; restore {KEY_FILE} from its backup and restart, nothing is signed until then"
                )
        return tree, sign(checkpoint_text(tree), key, self._private)

    async def _held(self, key: NoteKey) -> tuple[dict[str, str], tuple[str, ...]]:
        """The newest note of each witness, and who does not answer."""
        found, missed = dict[str, str](), list[str]()
        for witness in self._witnesses:
            try:
                note = await witness.newest(key.name)
                if note is not None:
                    read_checkpoint(note)
            except (CountersignError, OSError) as error:
                log.warning("witness %s does not answer: %s", witness.name, error)
                missed.append(witness.name)
                continue
            if note is not None:
                found[witness.name] = note
        return found, tuple(missed)

    async def _send(self, note: str, held: dict[str, str]) -> list[str]:
        kept = list[str]()
        for witness in self._witnesses:
            try:
                if held.get(witness.name) != note:
                    await witness.keep(note)
            except (CountersignError, OSError) as error:
                log.warning("witness %s did not take the checkpoint: %s", witness.name, error)
                continue
            kept.append(witness.name)
        return kept


@dataclass(frozen=True, slots=True)
class HandoverLate:
    """Hands a log that began during a rotation over, from whichever of this installation's keys came first.

    A process from before the rotation signs with the old key until it ends, and in a log that was not there
    to be handed over nothing says that the two belong together.
    """

    data: Path
    private: Ed25519PrivateKey = field(repr=False)
    clock: Callable[[], datetime]

    def __call__(self, link: Connection, tenant: str, key: NoteKey) -> bool:
        """Whether that was what kept this key from signing."""
        last = last_note(link, tenant)
        if last is None or is_signed(last, [key, *relatives(link, tenant, key)]):
            return False
        continues(link, tenant, last)
        for path in (self.data / KEY_FILE, *sorted(self.data.glob(str(KEPT_FILES)))):
            with suppress(InvalidInput, ValueError, OSError):
                other = private_key(path)
                if is_signed(last, [NoteKey(key.name, other.public_key().public_bytes_raw())]):
                    body = handed_over(other, self.private, key.name)
                    name = f"{body['old']} {body['new']}"
                    log_rotation(link, tenant, "checkpoints", self.clock(), body, name, kind="system")
                    return True
        return False


def load_key(data: Path) -> Ed25519PrivateKey:
    """The signing key of this installation; made on first use, readable by its owner only.

    Raises:
        InvalidInput: others may read it, or it is no Ed25519 key.
    """
    return private_key(data / KEY_FILE)


def next_key(data: Path) -> Ed25519PrivateKey:
    """The key that is to sign after this one; the same until it takes over, however often it is asked for."""
    return private_key(data / NEXT_FILE)


@contextmanager
def rotating(data: Path) -> Generator[None]:
    """Keep the keys for one rotation: of two, the slower would hand over from a key that is none any more.

    Raises:
        Unavailable: somebody else rotates.
    """
    folder = os.open(data / KEY_FILE.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(
                "key: another `ledger rotate` is under way; see `ledger key` after it"
            ) from None
        yield
    finally:
        os.close(folder)


def take_over(data: Path) -> Path:
    """Let the next key sign from now on; returns where the old one is kept."""
    old = load_key(data).public_key().public_bytes_raw()
    kept = data / KEY_FILE.with_name(f"ledger-{sha256(old)[:8]}.pem")
    with suppress(FileExistsError):
        os.link(data / KEY_FILE, kept)
    os.replace(data / NEXT_FILE, data / KEY_FILE)
    return kept


def tree_of(link: Connection, tenant: str, origin: str) -> Tree:
    """The log as its head says it stands."""
    row = link.execute(select(HEAD.c.size, HEAD.c.peaks).where(HEAD.c.log_id == tenant)).first()
    size, peaks = (0, b"") if row is None else (row.size, row.peaks)
    try:
        return Tree(origin, size, merkle.root_of(merkle.unpack(size, peaks)))
    except ValueError as error:
        raise LedgerBroken(f"the head of log {tenant}: {error}; restore the database") from None


def last_note(link: Connection, tenant: str) -> str | None:
    """The newest checkpoint in the database."""
    mine = CHECKPOINT.c.log_id == tenant
    query = select(CHECKPOINT.c.note).where(mine).order_by(CHECKPOINT.c.size.desc()).limit(1)
    return link.execute(query).scalar_one_or_none()


def continues(link: Connection, tenant: str, note: str) -> None:
    """Check that the log as it stands begins with what a note says.

    Raises:
        LedgerBroken: it does not.
    """
    old = read_checkpoint(note)
    now = tree_of(link, tenant, old.origin)
    if old.size > now.size:
        raise LedgerBroken(
            f"log {tenant} has {now.size} events, {old.size} were signed; it was cut: stop all workers, "
            "restore the database"
        )
    path = merkle.consistency_proof(old.size, now.size, subtrees(link, tenant)) if old.size else []
    if old.size and not merkle.is_consistent(old.size, old.root, now.size, now.root, path):
        raise LedgerBroken(
            f"log {tenant} does not continue the {old.size} events that were signed; "
            "`countersign ledger verify` says where; stop all workers, restore the database"
        )


def subtrees(link: Connection, tenant: str) -> merkle.Subtree:
    """Look complete subtrees up, leaves included."""

    def leaf(index: int) -> bytes | None:
        mine = (EVENT.c.log_id == tenant) & (EVENT.c.seq == index + 1)
        found = link.execute(select(EVENT.c.leaf_hash).where(mine)).scalar_one_or_none()
        return None if found is None else bytes.fromhex(found)

    def node(level: int, index: int) -> bytes | None:
        mine = (NODE.c.log_id == tenant) & (NODE.c.level == level) & (NODE.c.idx == index)
        return link.execute(select(NODE.c.hash).where(mine)).scalar_one_or_none()

    def subtree(level: int, index: int) -> bytes:
        found = node(level, index) if level else leaf(index)
        if found is None:
            raise LedgerBroken(f"log {tenant} lacks subtree {level}/{index}; restore the database")
        return bytes(found)

    return subtree


def proof_of(link: Connection, tenant: str, event_id: str, note: str, key: NoteKey) -> dict[str, Any]:
    """What shows that an event stands in the log that a note signs, to somebody who has only the key.

    Raises:
        UnknownName: there is no such event.
        InvalidInput: the note does not cover it yet.
    """
    query = select(EVENT.c.seq, EVENT.c.envelope).where(
        EVENT.c.log_id == tenant, EVENT.c.event_id == event_id
    )
    row = link.execute(query).first()
    if row is None:
        raise UnknownName(f"event: {event_id!r} is not in the log of {tenant}; see `countersign ledger tail`")
    size = read_checkpoint(note).size
    if row.seq > size:
        raise InvalidInput.field(
            "event", event_id, "it is not signed yet; run `countersign ledger checkpoint`"
        )
    path = merkle.inclusion_proof(row.seq - 1, size, subtrees(link, tenant))
    return {
        "envelope_b64": b64encode(row.envelope).decode(),
        "leaf_index": row.seq - 1,
        "tree_size": size,
        "path": [b64encode(one).decode() for one in path],
        "checkpoint_note": note,
        "key": str(key),
    }


def _keep(link: Connection, tenant: str, tree: Tree, note: str, key: NoteKey) -> None:
    insert = insert_for(link.dialect.name)
    row = {"log_id": tenant, "size": tree.size, "root": tree.root, "note": note, "key_id": key.key_id}
    link.execute(insert(CHECKPOINT).values(**row).on_conflict_do_nothing())
