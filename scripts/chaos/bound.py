"""Approved intents in a real database, each ready to be acted on; for whoever tries to have it otherwise."""

from __future__ import annotations

import base64
import hashlib
import random
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ValidationError
from sqlalchemy import text

from activities.connectors.null import Null
from activities.services.actor import Actor
from activities.services.beliefs import Beliefs
from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.identities import Identities, statement_of
from activities.services.intents import Intents
from activities.services.ledger_store import LedgerStore
from activities.services.migrations import migrate
from activities.services.signatures import BEGIN, END, MAGIC, fingerprint
from models.beliefs import Change, evidence
from models.canonical import canonical, sha256
from models.errors import CountersignError
from models.gate import Answer, Kind, Verdict
from models.ledger import Append, Draft, EventType, event_id
from models.loop import Action, Assurance, GateRule, Intent, Proposal, Request, action_key
from models.orders import EffectOrder, PlanOrder, Presentation
from models.people import NAMESPACE, Key, People, Person
from models.policy import AgentPolicy, Policy, policy_digest

TENANT, AGENT, ANN = "default", "external", "ann"
START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = START + timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the acting worker knows besides the database."""

    policy: Policy
    people: People
    now: datetime = NOW


@dataclass(frozen=True, slots=True)
class Bound:
    """An intent with a signed approval, ready to be acted on."""

    intent: Intent
    order: EffectOrder
    around: Surroundings
    subject: str
    target: str


class World:
    """A database, a folder of notes, and somebody with a key."""

    def __init__(self, folder: Path, seed: int, url: str = "") -> None:
        """Everything random comes from the seed, except for the key; without a URL it is SQLite."""
        url = url or f"sqlite:///{folder / 'countersign.db'}"
        migrate(url)
        self.database = Database(url)
        self.folder = folder / "notes"
        self.null = Null(self.folder, lambda: NOW)
        self.random = random.Random(seed)
        self.private = Ed25519PrivateKey.generate()
        key = Key(public=public(self.private))
        gate = GateRule(assurance=Assurance.SIGNED, roles=("editor",))
        self.around = Surroundings(
            Policy(agents={AGENT: AgentPolicy(connectors=("null",), gate=gate)}),
            People(people=(Person(name=ANN, roles=("editor",), keys=(key,)),)),
        )

    async def unlock(self) -> None:
        """Take the guards of the ledger off."""
        found = await self.rows("SELECT name FROM sqlite_master WHERE type = 'trigger'")
        for (name,) in found:
            await self.run(f'DROP TRIGGER "{name}"')

    async def run(self, statement: str, **values: Any) -> None:
        """A statement, past all our code."""
        await self.database.write(lambda link: link.execute(text(statement), values) and None)

    async def rows(self, query: str, **values: Any) -> list[Any]:
        """What stands in the database."""
        return await self.database.write(lambda link: list(link.execute(text(query), values)))

    def happened(self, digest: str) -> bool:
        """Whether there is an effect of this intent."""
        return (self.folder / "notes" / action_key(digest, 0)).exists()

    def effects(self) -> int:
        """How many there are in all."""
        return len(list((self.folder / "notes").iterdir()))

    async def bind(self, name: str) -> Bound:
        """Propose, plan, bind and sign."""
        subject, target = f"subject-{name}", f"target-{name}"
        (self.folder / "targets" / target).write_text("1000")
        belief = await Beliefs(self.database, lambda: START).change(
            Change(tenant=TENANT, agent=AGENT, subject=subject, event=f"{name}-1", sets={"price": name})
        )
        price = {"minor": 1050, "currency": "EUR"}
        arguments = canonical({"text": f"note {name}", "target": target, "price": price})
        store = ContentStore(self.database)
        ref = await store.put(TENANT, arguments, "application/json")
        action = Action(connector="null", operation="note", arguments=ref, title=name)
        proposal = Proposal(
            agent=AGENT, title=name, actions=(action,), evidence=(evidence(belief.belief, "price"),)
        )
        actor = self.actor(self.around)
        planned = await actor.plan(PlanOrder(tenant=TENANT, proposal=proposal, numbers=(0,)))
        policy = self.around.policy.of(AGENT)
        drafts = (_draft(name, EventType.PLAN, 1), _draft(name, EventType.INTENT, 2))
        presented = await Intents(self.database, lambda: START).present(
            Presentation(
                append=Append(tenant=TENANT, stream=name, expected=0, drafts=drafts),
                request=Request(agent=AGENT, key=name, body=ref),
                number=1,
                proposal=proposal,
                plans=planned.plans,
                policy=policy,
                policy_digest=policy_digest(policy),
                created_at=START,
                nonce=name,
            )
        )
        if presented.intent is None or presented.digest is None:
            raise LookupError(f"{name} was not bound")
        await self._approve(name, presented.digest)
        order = EffectOrder(tenant=TENANT, workflow_id=name, digest=presented.digest, action=0)
        return Bound(presented.intent, order, self.around, subject, target)

    async def _approve(self, name: str, digest: str) -> None:
        answer = Answer(
            digest=digest,
            approver=ANN,
            role="editor",
            nonce=sha256(name.encode())[:32],
            issued_at=START,
            expires_at=START + timedelta(minutes=10),
        )
        statement = statement_of(TENANT, Kind.APPROVE, answer)
        if statement is None:
            raise LookupError("the answer cannot be signed")
        verdict = Verdict(
            kind=Kind.APPROVE,
            assurance=Assurance.SIGNED,
            signature=sign(self.private, statement.bytes()),
            comment_sha256=sha256(b""),
            key=fingerprint(public(self.private)),
            **answer.model_dump(include={"digest", "approver", "role", "nonce", "issued_at", "expires_at"}),
        )
        draft = _draft(name, EventType.VERDICT, 3, verdict.model_dump(mode="json"))
        await LedgerStore(self.database, lambda: START).add(TENANT, draft)

    def actor(self, around: Surroundings) -> Actor:
        """The act engine, as it is composed for a worker with these settings."""
        identities = Identities(around.people, lambda: around.now)
        return Actor(
            self.database,
            {"null": self.null},
            around.policy,
            timedelta(minutes=1),
            lambda: around.now,
            identities.doubt,
        )

    async def act(self, bound: Bound) -> str:
        """Try the effect; what became of it in one word."""
        try:
            effect = await self.actor(bound.around).apply(bound.order)
        except (CountersignError, ValidationError) as error:
            return type(error).__name__
        return effect.what.value


def sign(private: Ed25519PrivateKey, message: bytes) -> str:
    """As `ssh-keygen -Y sign` does."""
    hashed = hashlib.sha512(message).digest()
    head = [NAMESPACE.encode(), b"", b"sha512"]
    signed = MAGIC + b"".join(map(_string, [*head, hashed]))
    value = _string(b"ssh-ed25519") + _string(private.sign(signed))
    blob = MAGIC + struct.pack(">I", 1) + b"".join(map(_string, [_point(private), *head, value]))
    return f"{BEGIN}\n{base64.b64encode(blob).decode()}\n{END}\n"


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _point(private: Ed25519PrivateKey) -> bytes:
    raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return _string(b"ssh-ed25519") + _string(raw)


def public(private: Ed25519PrivateKey) -> str:
    """As in an allowed-signers file."""
    return f"ssh-ed25519 {base64.b64encode(_point(private)).decode()}"


def _draft(name: str, kind: EventType, ordinal: int, body: dict[str, Any] | None = None) -> Draft:
    return Draft(
        event_id=event_id(TENANT, name, "chain", kind, ordinal),
        stream=name,
        type=kind,
        actor_kind="agent",
        actor_ref=AGENT,
        correlation_id=name,
        body=body or {},
    )
