"""`python -m scripts.chaos.mutations`: change one thing that was signed or bound, and nothing may happen.

Every case has a twin that nobody touches, which must happen exactly once. The act engine, the ledger and the
database are the real ones; the ledger's own guards are taken off first, as somebody with the file could.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from activities.services.beliefs import Beliefs
from activities.services.content import ContentStore
from activities.services.merkle import leaf_hash
from activities.services.signatures import BEGIN, END
from models.beliefs import Change
from models.canonical import canonical
from models.ledger import EventType
from models.loop import Assurance, BreakGlass, Limits, Reversibility
from models.orders import Effected
from models.people import Key, People
from models.policy import AgentPolicy, Policy
from scripts.chaos.bound import AGENT, NOW, TENANT, Bound, World, public

AT_ONCE = 64
Mutation = Callable[[World, Bound], Awaitable[Bound]]


# What can be changed. Each takes an untouched case and returns it as somebody left it.


def _flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _blob(which: Callable[[Bound], str]) -> Mutation:
    async def change(world: World, bound: Bound) -> Bound:
        digest = which(bound)
        [(data,)] = await world.rows("SELECT data FROM blob WHERE digest = :digest", digest=digest)
        new = _flipped(bytes(data), world.random)
        await world.run("UPDATE blob SET data = :new WHERE digest = :digest", new=new, digest=digest)
        return bound

    return change


def _lost(which: Callable[[Bound], str]) -> Mutation:
    async def change(world: World, bound: Bound) -> Bound:
        await world.run("DELETE FROM blob WHERE digest = :digest", digest=which(bound))
        return bound

    return change


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [
            found for key, item in cast(dict[str, Any], value).items() for found in _paths(item, (*path, key))
        ]
    if isinstance(value, list) and value:
        return [
            found for at, item in enumerate(cast(list[Any], value)) for found in _paths(item, (*path, at))
        ]
    return [path]


def _other(value: Any, rng: random.Random) -> Any:
    """Something else in place of a value."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1, 1000))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return (
            value[:at] + rng.choice([one for one in "0123456789abcdef" if one != value[at]]) + value[at + 1 :]
        )
    return rng.choice((1, "x", [1], True))


def _changed(
    plain: dict[str, Any], rng: random.Random, path: tuple[Any, ...] | None = None
) -> dict[str, Any]:
    plain = json.loads(json.dumps(plain))
    *parents, last = path or rng.choice(_paths(plain))
    here: Any = plain
    for part in parents:
        here = here[part]
    here[last] = _other(here[last], rng)
    return plain


async def _field_in_place(world: World, bound: Bound) -> Bound:
    data = canonical(_changed(bound.intent.model_dump(mode="json"), world.random))
    await world.run(
        "UPDATE blob SET data = :data WHERE digest = :digest", data=data, digest=bound.order.digest
    )
    return bound


async def _field_under_its_own_digest(world: World, bound: Bound) -> Bound:
    data = canonical(_changed(bound.intent.model_dump(mode="json"), world.random))
    ref = await ContentStore(world.database).put(TENANT, data, "application/json")
    return replace(bound, order=bound.order.model_copy(update={"digest": ref.digest}))


async def _row(world: World, bound: Bound, kind: EventType) -> tuple[int, bytes, str]:
    query = "SELECT seq, envelope, leaf_hash FROM event WHERE stream = :stream AND type = :type"
    [row] = await world.rows(query, stream=bound.order.workflow_id, type=kind.value)
    return int(row[0]), bytes(row[1]), str(row[2])


async def _write(world: World, seq: int, envelope: bytes, leaf: str) -> None:
    await world.run(
        "UPDATE event SET envelope = :envelope, leaf_hash = :leaf WHERE seq = :seq",
        envelope=envelope,
        leaf=leaf,
        seq=seq,
    )


def _event_bit(kind: EventType) -> Mutation:
    async def change(world: World, bound: Bound) -> Bound:
        seq, envelope, leaf = await _row(world, bound, kind)
        await _write(world, seq, _flipped(envelope, world.random), leaf)
        return bound

    return change


def _leaf_digit(kind: EventType) -> Mutation:
    async def change(world: World, bound: Bound) -> Bound:
        seq, envelope, leaf = await _row(world, bound, kind)
        await _write(world, seq, envelope, str(_other(leaf, world.random)))
        return bound

    return change


def _rewritten(kind: EventType, paths: Sequence[tuple[str, ...]]) -> Mutation:
    """A field of an event, with the leaf made anew so that the row fits itself."""

    async def change(world: World, bound: Bound) -> Bound:
        seq, envelope, _ = await _row(world, bound, kind)
        new = canonical(_changed(json.loads(envelope), world.random, world.random.choice(paths)))
        await _write(world, seq, new, leaf_hash(new).hex())
        return bound

    return change


async def _signature_bit(world: World, bound: Bound) -> Bound:
    seq, envelope, _ = await _row(world, bound, EventType.VERDICT)
    plain = json.loads(envelope)
    blob = base64.b64decode(plain["body"]["signature"][len(BEGIN) : -len(END) - 1])
    shown = base64.b64encode(_flipped(blob, world.random)).decode()
    plain["body"]["signature"] = f"{BEGIN}\n{shown}\n{END}\n"
    new = canonical(plain)
    await _write(world, seq, new, leaf_hash(new).hex())
    return bound


async def _recorded_too_late(world: World, bound: Bound) -> Bound:
    seq, envelope, _ = await _row(world, bound, EventType.VERDICT)
    late = bound.intent.expires_at + timedelta(seconds=world.random.randrange(1, 10**6))
    new = canonical(json.loads(envelope) | {"recorded_at": late.isoformat()})
    await _write(world, seq, new, leaf_hash(new).hex())
    return bound


def _gone(kind: EventType) -> Mutation:
    async def change(world: World, bound: Bound) -> Bound:
        seq, _, _ = await _row(world, bound, kind)
        await world.run("DELETE FROM event WHERE seq = :seq", seq=seq)
        return bound

    return change


async def _target(world: World, bound: Bound) -> Bound:
    path = world.folder / "targets" / bound.target
    path.write_bytes(_flipped(path.read_bytes(), world.random))
    return bound


async def _belief(world: World, bound: Bound) -> Bound:
    change = Change(
        tenant=TENANT,
        agent=AGENT,
        subject=bound.subject,
        event=f"{bound.order.workflow_id}-2",
        sets={"price": str(world.random.random())},
    )
    await Beliefs(world.database, lambda: NOW).change(change)
    return bound


def other_policy(policy: AgentPolicy, rng: random.Random) -> AgentPolicy:
    """The policy with one value changed to another that is allowed."""
    gate: dict[str, Any] = {
        "automatic": True,
        "approvals": rng.randrange(2, 20),
        "roles": (rng.choice(("owner", "legal")),),
        "assurance": rng.choice((Assurance.CLAIMED, Assurance.PRINCIPAL)),
        "hardware": True,
        "self_approval": True,
        "expire_seconds": rng.randrange(1, 600_000),
        "absolute_seconds": rng.randrange(1, 2_000_000),
        "keep_partial": True,
        "automatic_within": Limits(at_most_permille=rng.randrange(1000)),
        "break_glass": BreakGlass(classes=(Reversibility.REVERSIBLE,), roles=("editor",), alarm=("boss",)),
    }
    name = rng.choice([*gate, "connectors", "max_revisions"])
    if name in gate:
        return policy.model_copy(update={"gate": policy.gate.model_copy(update={name: gate[name]})})
    rest: dict[str, Any] = {"connectors": ("null", "site"), "max_revisions": rng.randrange(49)}
    return policy.model_copy(update={name: rest[name]})


async def _policy(world: World, bound: Bound) -> Bound:
    changed = other_policy(bound.around.policy.of(AGENT), world.random)
    return replace(bound, around=replace(bound.around, policy=Policy(agents={AGENT: changed})))


async def _person(world: World, bound: Bound) -> Bound:
    """A key or a role that was taken away after the answer."""
    [ann] = bound.around.people.people
    past = NOW - timedelta(seconds=world.random.randrange(1, 10_000))
    key: dict[str, Any] = world.random.choice(
        ({"revoked": True}, {"valid_before": past}, {"valid_after": NOW + (NOW - past)})
    )
    changes: dict[str, Any] = world.random.choice(
        (
            {"roles": ()},
            {"name": "anna"},
            {"keys": ()},
            {"keys": (Key(public=public(Ed25519PrivateKey.generate())),)},
            {"keys": (ann.keys[0].model_copy(update=key),)},
        )
    )
    people = People(people=(ann.model_copy(update=changes),))
    return replace(bound, around=replace(bound.around, people=people))


async def _order(world: World, bound: Bound) -> Bound:
    name = world.random.choice(("digest", "action", "workflow_id"))
    new = _other(getattr(bound.order, name), world.random)
    new = abs(new) + 1 if isinstance(new, int) else new
    return replace(bound, order=bound.order.model_copy(update={name: new}))


SIGNED = tuple(
    ("body", name)
    for name in (
        *("digest", "approver", "role", "kind", "nonce", "issued_at", "expires_at", "until", "to"),
        *("comment_sha256", "key", "assurance", "break_glass", "review"),
    )
)
MUTATIONS: dict[str, Mutation] = {
    "intent_bit": _blob(lambda bound: bound.order.digest),
    "intent_field": _field_in_place,
    "intent_field_under_its_own_digest": _field_under_its_own_digest,
    "intent_lost": _lost(lambda bound: bound.order.digest),
    "arguments_bit": _blob(lambda bound: bound.intent.proposal.actions[0].arguments.digest),
    "arguments_lost": _lost(lambda bound: bound.intent.proposal.actions[0].arguments.digest),
    "card_bit": _blob(lambda bound: bound.intent.card_digest),
    "card_lost": _lost(lambda bound: bound.intent.card_digest),
    "target_version": _target,
    "belief": _belief,
    "policy": _policy,
    "person": _person,
    "order": _order,
    "verdict_bit": _event_bit(EventType.VERDICT),
    "verdict_leaf": _leaf_digit(EventType.VERDICT),
    "verdict_field": _rewritten(EventType.VERDICT, SIGNED),
    "verdict_signature": _signature_bit,
    "verdict_too_late": _recorded_too_late,
    "verdict_gone": _gone(EventType.VERDICT),
    "intent_event_bit": _event_bit(EventType.INTENT),
    "intent_event_leaf": _leaf_digit(EventType.INTENT),
    "intent_event_digest": _rewritten(EventType.INTENT, (("body", "digest"),)),
    "intent_event_gone": _gone(EventType.INTENT),
}


@dataclass(slots=True)
class Tally:
    """What came of all cases."""

    mutations: Counter[str]
    answers: Counter[str]
    executed: list[str]
    """Mutated cases that happened all the same."""
    failed: list[str]
    """Twins that did not happen exactly once."""
    effects: int = 0


async def run(folder: Path, count: int, seed: int) -> Tally:
    """That many single changes, and that many twins."""
    world = World(folder, seed)
    try:
        await world.unlock()
        tally = Tally(Counter(), Counter(), [], [])
        names = [*MUTATIONS] * (count // len(MUTATIONS) + 1)
        names = names[: len(MUTATIONS)] + world.random.sample(
            names[len(MUTATIONS) :], k=len(names) - len(MUTATIONS)
        )
        for first in range(0, count, AT_ONCE):
            part = range(first, min(first + AT_ONCE, count))
            await asyncio.gather(*(_case(world, tally, number, names[number]) for number in part))
        tally.effects = await asyncio.to_thread(world.effects)
        return tally
    finally:
        await asyncio.to_thread(world.database.close)


async def _case(world: World, tally: Tally, number: int, name: str) -> None:
    touched, twin = await world.bind(f"run-{number}-a"), await world.bind(f"run-{number}-b")
    mutated = await MUTATIONS[name](world, touched)
    answer = await world.act(mutated)
    tally.mutations[name] += 1
    tally.answers[answer] += 1
    if (
        answer == Effected.APPLIED
        or world.happened(touched.order.digest)
        or world.happened(mutated.order.digest)
    ):
        tally.executed.append(f"{number} {name}: {answer}")
    again = [await world.act(twin), await world.act(twin)]
    if again != [Effected.APPLIED, Effected.APPLIED] or not world.happened(twin.order.digest):
        tally.failed.append(f"{number} {name}: {again}")


def main() -> int:
    """Print a summary; 0 when nothing mutated happened and every twin did, once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tally = asyncio.run(run(Path(folder), options.count, options.seed))
    summary = {
        "mutations": options.count,
        "mutated_and_executed": tally.executed,
        "twins": options.count,
        "twins_not_executed_once": tally.failed,
        "effects": tally.effects,
        "by_kind": dict(tally.mutations),
        "answers": dict(tally.answers),
        "seed": options.seed,
        "seconds": round(time.monotonic() - began, 1),
    }
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")
    return 1 if tally.executed or tally.failed or tally.effects != options.count else 0


if __name__ == "__main__":
    sys.exit(main())
