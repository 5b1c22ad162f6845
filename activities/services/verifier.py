"""Checking a log from its bytes: hashes, order, root, signatures, and whether every effect was allowed.

What it finds comes first event first. It trusts the keys and notes it is given and nothing in the log.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from sqlalchemy import Connection, func, select

from activities.services import merkle
from activities.services.attested import Attested
from activities.services.checkpoints import CHECKPOINT
from activities.services.conduct import Conduct
from activities.services.cosignatures import WitnessKey, cosigners, forged
from activities.services.envelopes import envelope
from activities.services.erased import Erased
from activities.services.key_life import successor
from activities.services.ledger_export import (
    CHUNK,
    Gone,
    Header,
    IntentBytes,
    Item,
    Leaf,
    Note,
    Unreadable,
    attributes,
    columns,
    of_database,
)
from activities.services.ledger_store import EVENT, HEAD, NODE
from activities.services.notes import NoteKey, Tree, is_signed, read_checkpoint
from activities.services.row_types import misfits
from activities.services.signers import Signers
from models.canonical import sha256
from models.errors import InvalidInput
from models.ledger import Event, EventType
from models.loop import Frozen

MANY = 100
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""What comes of bytes that somebody made up."""


class Finding(Frozen):
    """Something that contradicts what was signed, or what was allowed."""

    seq: int
    """The first event that may be concerned, from 1."""
    event_id: str | None = None
    what: str


class Report(Frozen):
    """What a check came to."""

    status: Literal["sound", "tampered", "incomplete"]
    size: int
    root: str
    signed: int
    """Events covered by the last checkpoint whose signature holds."""
    witnessed: int
    """Events covered by a note that was given from outside the log."""
    cosigned: int = 0
    """Events covered by a checkpoint that enough of the co-signers given have cosigned."""
    signatures: int = 0
    """Answers that call themselves signed, and were held against the signers given."""
    unchecked: int = 0
    """Answers that call themselves signed and stand as they are written, since no signers were given."""
    findings: tuple[Finding, ...] = ()
    gaps: tuple[str, ...] = ()
    """What could not be checked, and why."""

    @property
    def exit_code(self) -> int:
        """0 sound, 1 tampered, 2 incomplete."""
        return {"sound": 0, "tampered": 1, "incomplete": 2}[self.status]


class Verifier:
    """One pass over one log."""

    def __init__(
        self,
        keys: Sequence[NoteKey],
        old: Sequence[str] = (),
        witnesses: Sequence[WitnessKey] = (),
        needed: int | None = None,
        signers: Signers | None = None,
    ) -> None:
        """Take what is trusted.

        Args:
            keys: who may sign checkpoints.
            old: notes kept outside, which the log must continue.
            witnesses: whose cosignatures count.
            needed: how many of them a checkpoint needs; `None` is all.
            signers: whose answers count as signed, and by which keys; `None` looks at no signature.
        """
        self._keys = tuple(keys)
        self._old = [(read_checkpoint(note), note) for note in old]
        self._witnesses = tuple(witnesses)
        self._needed = _of_all(witnesses, needed)
        self._findings = list[Finding]()
        self._gaps = dict[str, None]()
        self._peaks = list[bytes]()
        self._size = 0
        self._signed = self._witnessed = self._cosigned = 0
        self._matched = 0
        self._header: Header | None = None
        self._versions = dict[str, int]()
        self._ids = set[str]()
        self._conduct = Conduct()
        self._erased = Erased()
        self._attested = Attested(signers)

    def check(self, items: Iterable[Item], more: Iterable[Finding] = ()) -> Report:
        """Check all items, and take in what was found elsewhere."""
        for item in items:
            try:
                self._take(item)
            except UNREADABLE as error:
                self._find(f"a line cannot be read: {type(error).__name__}")
        self._end()
        for digest in sorted(self._conduct.missing):
            self._gaps[f"the bytes of intent {digest} are missing, so its gate was not checked"] = None
        self._gaps |= dict.fromkeys(self._attested.gaps)
        self._findings.extend(more)
        self._findings.sort(key=lambda one: one.seq)
        return Report(
            status="tampered" if self._findings else "incomplete" if self._gaps else "sound",
            size=self._size,
            root=merkle.root_of(self._peaks).hex(),
            signed=self._signed,
            witnessed=self._witnessed,
            cosigned=self._cosigned,
            signatures=self._attested.checked,
            unchecked=self._attested.unchecked,
            findings=tuple(self._findings[:MANY]),
            gaps=tuple(self._gaps),
        )

    def _is_signed(self, tree: Tree, note: str) -> bool:
        """Whether a key that counts signed it; a key signs for the log that it is named after alone."""
        return is_signed(note, [key for key in self._keys if key.name == tree.origin])

    def _take(self, item: Item) -> None:
        match item:
            case Header():
                self._open(item)
            case IntentBytes():
                self._intent(item)
            case Leaf():
                self._leaf(item)
            case Note():
                self._note(item.text)
            case Gone():
                self._erased.miss(self._size + 1, item.name, item.key, item.at)
            case Unreadable():
                self._find(f"line {item.line} cannot be read: {item.why}")

    def _find(self, what: str, seq: int | None = None, event_id: str | None = None) -> None:
        seq = self._size + 1 if seq is None else seq
        # Half a character, as a JSON escape can name it, could not be printed.
        what = what.encode(errors="backslashreplace").decode()
        self._findings.append(Finding(seq=seq, event_id=event_id, what=what))

    def _open(self, header: Header) -> None:
        if self._header is not None or self._size:
            self._find("a second beginning stands in the middle")
        self._header = header
        for tree, _ in self._old:
            if tree.origin != header.origin:
                self._find(f"the log calls itself {header.origin}, the note given is of {tree.origin}", seq=0)

    def _intent(self, item: IntentBytes) -> None:
        if sha256(item.data) != item.digest:
            self._find(f"what stands for intent {item.digest} has another digest")
        elif (wrong := self._conduct.know(item.digest, item.data)) is not None:
            self._find(wrong)

    def _leaf(self, leaf: Leaf) -> None:
        seq = self._size + 1
        hashed = merkle.leaf_hash(leaf.envelope)
        self._peaks, _ = merkle.extend(self._size, self._peaks, [hashed])
        try:
            plain = json.loads(leaf.envelope)
            event = Event.model_validate(plain | {"leaf_hash": hashed.hex()})
            # Of two spellings of one event, or of two values of one name, others might read another one.
            if envelope(event.log_id, event, event.seq, event.version, event.recorded_at) != leaf.envelope:
                raise ValueError("it is not written as the ledger writes events")
        except UNREADABLE:
            self._find("the event cannot be read", seq)
        else:
            for what in (*self._beside(leaf, event), *self._order(event), *self._judged(event)):
                self._find(what, seq, event.event_id)
        self._size = seq
        for tree, note in self._old:
            if tree.size == seq:
                if self._matches(tree, "the note given"):
                    self._vouched(tree, note)
                self._witnessed = max(self._witnessed, seq)

    def _beside(self, leaf: Leaf, event: Event) -> Iterator[str]:
        tenant = self._header.tenant if self._header else event.log_id
        expected = attributes(event, tenant) if "specversion" in leaf.beside else columns(event)
        # As they are written: to Python true and 1.0 are 1.
        both = {**expected, **leaf.beside}
        names = [n for n in both if repr(leaf.beside.get(n, ...)) != repr(expected.get(n, ...))]
        if names:
            yield f"{', '.join(sorted(names))} beside the event does not fit its bytes"

    def _order(self, event: Event) -> Iterator[str]:
        if self._header is not None and event.log_id != self._header.tenant:
            yield f"it belongs to log {event.log_id}"
        if event.seq != self._size + 1:
            yield f"it is event {event.seq}, event {self._size + 1} should stand here"
        last = self._versions.get(event.stream, 0)
        if event.version != last + 1:
            yield f"version {event.version} of stream {event.stream} follows version {last}"
        self._versions[event.stream] = event.version
        if event.event_id in self._ids:
            yield "its id stands already"
        self._ids.add(event.event_id)

    def _judged(self, event: Event) -> list[str]:
        try:
            followed = (self._attested, self._conduct, self._erased)
            return [*(what for one in followed for what in one.take(event)), *self._handed_over(event)]
        except UNREADABLE as error:
            return [f"it, or what it rests on, cannot be read: {type(error).__name__}"]

    def _handed_over(self, event: Event) -> Iterator[str]:
        """A key that is trusted may name the one that signs from here on."""
        if event.type is EventType.KEY_ROTATED:
            try:
                follows = successor(event.body, self._keys)
            except InvalidInput as error:
                yield error.message
            else:
                self._keys += (follows,) if follows is not None else ()

    def _note(self, text: str) -> None:
        try:
            tree = read_checkpoint(text)
        except InvalidInput:
            self._find("a checkpoint cannot be read")
            return
        if self._header is not None and tree.origin != self._header.origin:
            self._find(f"a checkpoint of {tree.origin} stands in the log of {self._header.origin}")
        elif tree.size != self._size:
            self._find(f"a checkpoint of {tree.size} events stands where there are {self._size}")
        elif self._keys and not self._is_signed(tree, text):
            self._find(f"the checkpoint of {tree.size} events is signed by none of the keys given")
        elif self._matches(tree, "the checkpoint") and self._keys:
            self._signed = tree.size
            self._vouched(tree, text)

    def _vouched(self, tree: Tree, note: str) -> None:
        """Who else has cosigned it, and who is only said to have."""
        if not self._witnesses:
            return
        for name in forged(note, self._witnesses):
            what = f"{name} did not make the cosignature under the checkpoint of {tree.size} events"
            self._find(what, tree.size)
        if len(cosigners(note, self._witnesses)) >= self._needed:
            self._cosigned = max(self._cosigned, tree.size)

    def _matches(self, tree: Tree, whose: str) -> bool:
        if merkle.root_of(self._peaks) == tree.root:
            self._matched = max(self._matched, tree.size)
            return True
        first = self._matched + 1
        self._find(f"{whose} of {tree.size} events has another root: something from event {first} on", first)
        return False

    def _end(self) -> None:
        for tree, _ in self._old:
            if tree.size > self._size:
                self._find(f"the log ends at {self._size}, the note given covers {tree.size}: it was cut")
        header = self._header
        if header is None:
            self._gaps["the log has no beginning; export it again"] = None
        elif header.size != self._size:
            self._find(f"the log ends at {self._size}, its beginning says {header.size}")
        elif header.root != merkle.root_of(self._peaks):
            self._find("the root is not the one its beginning names", self._matched + 1)
        for seq, what in self._erased.end():
            self._find(what, seq)
        self._lacks()

    def _lacks(self) -> None:
        """What is missing for anybody to vouch for it."""
        if not self._keys:
            self._gaps["no key was given, so nobody vouches for the log"] = None
        elif not all(self._is_signed(tree, note) for tree, note in self._old):
            self._gaps["a note given is signed by none of the keys given, nor by one that follows them"] = (
                None
            )
        elif self._size and not self._signed and not self._witnessed:
            self._gaps["no checkpoint has been signed yet; wait for one"] = None
        if self._witnesses and self._size and not self._cosigned:
            many = f"{self._needed} of the {len(self._witnesses)}"
            self._gaps[f"no checkpoint has cosignatures by {many} co-signers given"] = None


def check_database(
    link: Connection,
    tenant: str,
    origin: str,
    keys: Sequence[NoteKey],
    old: Sequence[str],
    witnesses: Sequence[WitnessKey] = (),
    needed: int | None = None,
    signers: Signers | None = None,
) -> Report:
    """Check a log where it lives, with everything that stands beside its events."""
    verifier = Verifier(keys, old, witnesses, needed, signers)
    if found := [Finding(seq=0, what=what) for what in misfits(link, tenant)]:
        return verifier.check((), found)
    return verifier.check(of_database(link, tenant, origin), check_rows(link, tenant))


def _of_all(witnesses: Sequence[WitnessKey], needed: int | None) -> int:
    """How many must have cosigned; one key under two names is one."""
    there = len({key.public for key in witnesses})
    if needed is not None and not (1 <= needed <= there):
        raise InvalidInput.field("witnesses", needed, f"{there} keys are given; ask for one to all of them")
    return there if needed is None else needed


def check_rows(link: Connection, tenant: str) -> Iterator[Finding]:
    """What the database holds besides the events: subtrees, head and checkpoint columns."""
    last = link.execute(select(func.max(EVENT.c.seq)).where(EVENT.c.log_id == tenant)).scalar_one() or 0
    peaks = list[bytes]()
    for start in range(0, last, CHUNK):
        mine = (EVENT.c.log_id == tenant) & EVENT.c.seq.between(start + 1, start + CHUNK)
        rows = link.execute(select(EVENT.c.leaf_hash).where(mine).order_by(EVENT.c.seq)).scalars()
        try:
            leaves = [bytes.fromhex(row) for row in rows]
        except ValueError:
            return  # The event that it stands beside is named elsewhere.
        peaks, nodes = merkle.extend(start, peaks, leaves)
        yield from _wrong_nodes(link, tenant, start, start + len(leaves), nodes)
        if len(leaves) != min(CHUNK, last - start):
            return  # So is the gap.
    count = link.execute(select(func.count()).where(NODE.c.log_id == tenant)).scalar_one()
    if count != merkle.node_count(last):
        yield Finding(seq=last, what=f"{count} subtrees stand, {merkle.node_count(last)} belong there")
    head = link.execute(select(HEAD.c.size, HEAD.c.peaks).where(HEAD.c.log_id == tenant)).first()
    if head is not None and (head.size, bytes(head.peaks)) != (last, merkle.pack(peaks)):
        yield Finding(seq=last, what="the head of the log is not that of its events")
    yield from _wrong_columns(link, tenant)


def _wrong_nodes(
    link: Connection, tenant: str, start: int, end: int, nodes: Sequence[merkle.Node]
) -> Iterator[Finding]:
    found = dict[tuple[int, int], bytes]()
    for level in range(1, end.bit_length()):
        mine = (NODE.c.log_id == tenant) & (NODE.c.level == level)
        between = NODE.c.idx.between(start >> level, (end >> level) - 1)
        for row in link.execute(select(NODE.c.idx, NODE.c.hash).where(mine, between)):
            found[level, row.idx] = bytes(row.hash)
    for node in nodes:
        if found.get((node.level, node.index)) != node.hash:
            first = (node.index << node.level) + 1
            yield Finding(seq=first, what=f"subtree {node.level}/{node.index} is not that of its leaves")


def _wrong_columns(link: Connection, tenant: str) -> Iterator[Finding]:
    rows: Iterable[Any] = link.execute(select(CHECKPOINT).where(CHECKPOINT.c.log_id == tenant))
    for row in rows:
        try:
            tree = read_checkpoint(row.note)
        except InvalidInput:
            continue
        signers = [line.split(" ")[1] for line in row.note.partition("\n\n")[2].splitlines()]
        if (tree.size, tree.root) != (row.size, bytes(row.root)) or row.key_id.partition("+")[
            0
        ] not in signers:
            yield Finding(seq=row.size, what=f"the row of the checkpoint of {row.size} does not fit its note")
