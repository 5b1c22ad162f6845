"""Beliefs in SQL: immutable snapshots, and one head per tenant, agent and subject.

A change is one transaction: the event's id is looked up, version and epoch are compared, snapshot, head and
ledger event are written. Whoever lost reads again and decides again; nothing is merged behind anybody's back.
With encryption on columns, streams and leases call a subject by an opaque name; only the sealed state
says who it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, select, update

from activities.services.database import Database, from_micros, insert_for, to_micros
from activities.services.discreet import called_in, is_sealed, open_bytes, seal_bytes
from activities.services.leases import check_in, seize_in
from activities.services.ledger_store import add_in
from models.beliefs import (
    Belief,
    Change,
    Delivered,
    Delivery,
    Handled,
    Mail,
    Owning,
    Settled,
    apply,
    difference,
    owner_lease,
    read_evidence,
    stale_fields,
)
from models.canonical import canonical, derived_id, sha256
from models.errors import InvalidInput, LedgerBroken, LedgerConflict, UnknownName
from models.ledger import Draft, EventType
from models.loop import Evidence, Intent, Proposal
from models.tables import BeliefHead, BeliefSnapshot, table

HEAD = table(BeliefHead)
SNAPSHOT = table(BeliefSnapshot)
TRIES = 20
"""How often a decider may lose to others; then it holds them off while it thinks, and cannot lose again."""
logger = logging.getLogger(__name__)


class Beliefs:
    """The beliefs of all agents."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        """The clock stamps snapshots and events."""
        self._database = database
        self._clock = clock

    async def now(self, tenant: str, agent: str, subject: str) -> Belief:
        """What is believed; version 0 when nothing is yet."""
        return await self._database.read(lambda link: belief_in(link, tenant, agent, subject))

    async def at(self, tenant: str, agent: str, subject: str, version: int) -> Belief:
        """What was believed at a version.

        Raises:
            UnknownName: there is no such version.
        """
        return await self._database.read(lambda link: belief_in(link, tenant, agent, subject, version))

    async def history(self, tenant: str, agent: str, subject: str, limit: int = 50) -> tuple[Settled, ...]:
        """The newest versions, oldest first, with when they came to stand."""

        def read(link: Connection) -> tuple[Settled, ...]:
            mine = mine_in(link, SNAPSHOT, tenant, agent, subject)
            wanted = select(SNAPSHOT).where(*mine).order_by(SNAPSHOT.c.version.desc()).limit(limit)
            rows = reversed(link.execute(wanted).all())
            return tuple(Settled(won=True, belief=_read(link, row), **_when(row)) for row in rows)

        return await self._database.read(read)

    async def subjects(self, tenant: str) -> tuple[tuple[str, str, int], ...]:
        """Agent, subject and version of every belief."""
        heads = select(HEAD.c.agent, HEAD.c.subject, HEAD.c.version).where(HEAD.c.tenant == tenant)

        def read(link: Connection) -> list[tuple[str, str, int]]:
            rows = link.execute(heads).all()
            return [(row.agent, _spelled(link, tenant, row), row.version) for row in rows]

        found = await self._database.read(read)
        return tuple(sorted(found, key=lambda one: (one[1], one[0])))

    async def agents(self, tenant: str, subject: str) -> tuple[str, ...]:
        """Whoever believes something about a subject."""

        def read(link: Connection) -> tuple[str, ...]:
            named = HEAD.c.tenant == tenant, HEAD.c.subject.in_(called_in(link, tenant, subject))
            query = select(HEAD.c.agent).where(*named).distinct().order_by(HEAD.c.agent)
            return tuple(link.execute(query).scalars())

        return await self._database.read(read)

    async def called(self, tenant: str, subject: str) -> str:
        """What the owner's workflow id calls a subject: itself, or with encryption on an opaque name."""
        return await self._database.write(lambda link: called_in(link, tenant, subject)[0])

    async def claim(self, tenant: str, agent: str, subject: str, holder: str) -> int:
        """Become the owner; the epoch fences off whoever was it before. The same holder keeps its epoch."""
        return await self._database.write(lambda link: _claim(link, tenant, agent, subject, holder))

    async def change(self, change: Change, expected: int | None = None, epoch: int | None = None) -> Settled:
        """Make the next version if `expected` and `epoch` still stand; without them, on whatever stands.

        Raises:
            InvalidInput: what is set is too large.
        """
        now = self._clock()
        settled = await self._database.write(lambda link: change_in(link, change, expected, epoch, now))
        if settled.reason:
            logger.info("a belief was not changed: %s", settled.reason)
        return settled

    async def own(self, owning: Owning) -> int:
        """Become the owner of a subject; the epoch fences off the run that was it before."""
        now, lease = self._clock(), (owning.tenant, owning.subject)
        return await self._database.write(
            lambda link: seize_in(link, _lease(link, *lease), owning.holder, now)
        )

    async def deliver(self, delivery: Delivery) -> Delivered:
        """Handle mail in order and in one commit; an event that was handled before changes nothing.

        Raises:
            LedgerConflict: another run owns the subject by now; nothing was handled.
        """
        now = self._clock()
        return await self._database.write(lambda link: _deliver(link, delivery, now))

    async def decide(
        self,
        tenant: str,
        agent: str,
        subject: str,
        think: Callable[[Belief], Change],
        epoch: int | None = None,
    ) -> Settled:
        """Read, think and compare-and-set until it fits; at last while nobody else can write.

        Raises:
            LedgerConflict: another owner has taken over.
        """
        for _ in range(TRIES):
            seen = await self.now(tenant, agent, subject)
            settled = await self.change(think(seen), seen.version, epoch)
            if settled.won or settled.known or settled.belief.version == seen.version:
                break
        else:
            settled = await self._decide_alone(tenant, agent, subject, think, epoch)
        if settled.won or settled.known:
            return settled
        raise LedgerConflict(f"belief: {subject} has another owner by now ({settled.reason}); read it anew")

    async def _decide_alone(
        self, tenant: str, agent: str, subject: str, think: Callable[[Belief], Change], epoch: int | None
    ) -> Settled:
        now = self._clock()

        def work(link: Connection) -> Settled:
            head = _head(link, tenant, agent, subject)
            return change_in(link, think(belief_in(link, tenant, agent, subject)), head.version, epoch, now)

        return await self._database.write(work)


def change_in(
    connection: Connection, change: Change, expected: int | None, epoch: int | None, now: datetime
) -> Settled:
    """Make the next version inside a transaction that is under way."""
    return _change(connection, change, expected, epoch, now)


def _change(
    connection: Connection,
    change: Change,
    expected: int | None,
    epoch: int | None,
    now: datetime,
    owner: Delivery | None = None,
) -> Settled:
    head = _head(connection, change.tenant, change.agent, change.subject)
    standing = belief_in(connection, change.tenant, change.agent, change.subject)
    mine = _mine(SNAPSHOT, change.tenant, change.agent, head.subject)
    known = connection.execute(select(SNAPSHOT.c.version).where(*mine, SNAPSHOT.c.event_id == change.event))
    if known.first() is not None:
        return Settled(won=False, known=True, belief=standing)
    if epoch is not None and epoch != head.epoch:
        return Settled(won=False, belief=standing, reason=f"owner epoch {epoch} was followed by {head.epoch}")
    if expected is not None and expected != head.version:
        return Settled(
            won=False, belief=standing, reason=f"version {expected} was followed by {head.version}"
        )
    made = apply(standing, change)
    _store(connection, made, change.event, head, now, owner)
    return Settled(won=True, belief=made, at=now)


def _deliver(connection: Connection, delivery: Delivery, now: datetime) -> Delivered:
    lease = _lease(connection, delivery.tenant, delivery.subject)
    check_in(connection, lease, delivery.epoch, delivery.holder)
    return Delivered(handled=tuple(_handle(connection, delivery, mail, now) for mail in delivery.mails))


def _handle(connection: Connection, delivery: Delivery, mail: Mail, now: datetime) -> Handled:
    content = mail.model_dump(include={"agent", "event", "sets", "removes", "memories"})
    change = Change(tenant=delivery.tenant, subject=delivery.subject, **content)
    try:
        done = _change(connection, change, mail.expected, None, now, delivery)
    except InvalidInput as error:
        standing = belief_in(connection, change.tenant, change.agent, change.subject)
        done = Settled(won=False, belief=standing, reason=error.message)
    return Handled(
        event=mail.event,
        agent=mail.agent,
        # A commit whose answer was lost is asked again; it has won all the same.
        won=done.won or done.known,
        known=done.known,
        version=_version_of(connection, change) if done.known else done.belief.version,
        reason=done.reason,
    )


def _version_of(connection: Connection, change: Change) -> int:
    mine = mine_in(connection, SNAPSHOT, change.tenant, change.agent, change.subject)
    query = select(SNAPSHOT.c.version).where(*mine, SNAPSHOT.c.event_id == change.event)
    return int(connection.execute(query).scalar_one())


def belief_in(
    connection: Connection, tenant: str, agent: str, subject: str, version: int | None = None
) -> Belief:
    """A version of a belief, or the one that stands.

    Raises:
        UnknownName: there is no such version.
    """
    mine = mine_in(connection, SNAPSHOT, tenant, agent, subject)
    wanted = select(SNAPSHOT).where(*mine).order_by(SNAPSHOT.c.version.desc()).limit(1)
    row = connection.execute(
        wanted if version is None else wanted.where(SNAPSHOT.c.version == version)
    ).first()
    if row is not None:
        return _read(connection, row)
    if version:
        raise UnknownName(f"version: {subject} has no version {version}; `countersign beliefs history` lists")
    return Belief(tenant=tenant, agent=agent, subject=subject)


def stale_in(connection: Connection, intent: Intent) -> str | None:
    """Which belief an intent rests on that has changed since, and how; `None` if all stand."""
    proposal = intent.proposal
    changed = (_since(connection, intent.tenant, intent.proposer, one) for one in proposal.evidence)
    return next((text for _, text in changed if text), None)


def renewed_in(connection: Connection, tenant: str, proposal: Proposal) -> tuple[Proposal, tuple[str, ...]]:
    """A proposal that rests on beliefs as they stand now, and in words what has changed in them."""
    seen = [_since(connection, tenant, proposal.agent, one) for one in proposal.evidence]
    evidence = tuple(
        one.model_copy(update={"version": str(now)}) if text else one
        for one, (now, text) in zip(proposal.evidence, seen, strict=True)
    )
    return proposal.model_copy(update={"evidence": evidence}), tuple(text for _, text in seen if text)


def _since(connection: Connection, tenant: str, agent: str, one: Evidence) -> tuple[int, str]:
    """The version that stands of a belief that is evidence, and what has changed in it; else nothing."""
    if (read := read_evidence(one)) is None:
        return 0, ""
    subject, version, fields = read
    now = belief_in(connection, tenant, agent, subject)
    changed = stale_fields(version, fields, now)
    return now.version, _told(connection, now, version, changed) if changed else ""


def _told(connection: Connection, now: Belief, version: int, changed: tuple[str, ...]) -> str:
    try:
        then = belief_in(connection, now.tenant, now.agent, now.subject, version)
    except UnknownName:
        return f"what was believed about {now.subject} is not known any more"
    deltas = [delta.text() for delta in difference(then, now) if delta.key in changed]
    return f"belief about {now.subject} changed since version {version}: {'; '.join(deltas) or changed}"


def mine_in(connection: Connection, of: Any, tenant: str, agent: str, subject: str) -> tuple[Any, ...]:
    """The conditions for rows of one belief, whatever they call its subject."""
    return _mine(of, tenant, agent, _standing(connection, tenant, agent, subject))


def _mine(of: Any, tenant: str, agent: str, name: str) -> tuple[Any, ...]:
    return of.c.tenant == tenant, of.c.agent == agent, of.c.subject == name


def _standing(connection: Connection, tenant: str, agent: str, subject: str) -> str:
    """What its rows call a subject: from before encryption was switched on they spell it."""
    names = called_in(connection, tenant, subject)
    if len(names) == 1:
        return subject
    either = HEAD.c.tenant == tenant, HEAD.c.agent == agent, HEAD.c.subject.in_(names)
    there = set(connection.execute(select(HEAD.c.subject).where(*either)).scalars())
    return subject if there == {subject} else names[0]


def _head(connection: Connection, tenant: str, agent: str, subject: str) -> Row[Any]:
    """The head row, held until the transaction ends."""
    kind, name = insert_for(connection.dialect.name), called_in(connection, tenant, subject)[0]
    if name != subject and _standing(connection, tenant, agent, subject) == subject:
        for of in (HEAD, SNAPSHOT):
            connection.execute(update(of).where(*_mine(of, tenant, agent, subject)).values(subject=name))
    blank = dict(tenant=tenant, agent=agent, subject=name, version=0, epoch=0, holder="")
    connection.execute(kind(HEAD).values(**blank).on_conflict_do_nothing())
    return connection.execute(select(HEAD).where(*_mine(HEAD, tenant, agent, name)).with_for_update()).one()


def _lease(connection: Connection, tenant: str, subject: str) -> str:
    return owner_lease(tenant, called_in(connection, tenant, subject)[0])


def _claim(connection: Connection, tenant: str, agent: str, subject: str, holder: str) -> int:
    head = _head(connection, tenant, agent, subject)
    if head.holder == holder:
        return int(head.epoch)
    mine = _mine(HEAD, tenant, agent, head.subject)
    connection.execute(update(HEAD).where(*mine).values(holder=holder, epoch=head.epoch + 1))
    return int(head.epoch) + 1


def _store(
    connection: Connection,
    made: Belief,
    event: str,
    head: Row[Any],
    now: datetime,
    owner: Delivery | None = None,
) -> None:
    kept = seal_bytes(connection, made.tenant, canonical(made), made.subject)
    key = dict(tenant=made.tenant, agent=made.agent, subject=head.subject, version=made.version)
    epoch = owner.epoch if owner is not None else head.epoch
    # Of what is stored, so that once it is erased nobody can guess what was believed and test the guess.
    facts = dict(event_id=event, epoch=epoch, state=kept, digest=sha256(kept))
    connection.execute(SNAPSHOT.insert().values(**key, **facts, recorded_at=to_micros(now)))
    moved = connection.execute(
        update(HEAD)
        .where(*_mine(HEAD, made.tenant, made.agent, head.subject))
        .where(HEAD.c.version == made.version - 1, HEAD.c.epoch == head.epoch)
        .values(version=made.version)
    )
    if moved.rowcount != 1:
        raise LedgerConflict(f"belief: {made.subject} changed meanwhile; read it and decide again")
    stream = belief_stream(made.tenant, made.agent, head.subject)
    add_in(connection, made.tenant, _event(made, stream, event, facts["digest"], owner), now)


def belief_stream(tenant: str, agent: str, subject: str) -> str:
    """The ledger stream of a belief; subjects may be people, so it does not spell what they are called."""
    return f"belief/{derived_id('belief', tenant, agent, subject)}"


def _event(made: Belief, stream: str, event: str, digest: Any, owner: Delivery | None) -> Draft:
    by = {"owner": owner.holder, "epoch": owner.epoch} if owner is not None and owner.holder else {}
    return Draft(
        # After an erasure versions begin anew; the event that changes it does not.
        event_id=derived_id("event", made.tenant, stream, EventType.BELIEF, made.version, event),
        stream=stream,
        type=EventType.BELIEF,
        actor_kind="agent",
        actor_ref=made.agent,
        correlation_id=stream,
        causation_id=event,
        body={"version": made.version, "state": digest, **by},
    )


def _when(row: Row[Any]) -> dict[str, Any]:
    return {"at": from_micros(row.recorded_at), "reason": row.event_id}


def _read(connection: Connection, row: Row[Any]) -> Belief:
    stored = bytes(row.state)
    state = open_bytes(connection, row.tenant, stored)
    # What was sealed by earlier releases is named by what it says.
    if row.digest not in (sha256(stored), sha256(state)):
        raise LedgerBroken(f"belief about {row.subject} version {row.version} does not hash to its name")
    return Belief.model_validate(json.loads(state))


def _spelled(connection: Connection, tenant: str, head: Any) -> str:
    """The subject of a head row as people call it; one nothing was believed of yet has only its name."""
    newest = select(SNAPSHOT).where(*_mine(SNAPSHOT, tenant, head.agent, head.subject))
    row = connection.execute(newest.where(SNAPSHOT.c.version == head.version)).first()
    return head.subject if row is None or not is_sealed(row.state) else _read(connection, row).subject
