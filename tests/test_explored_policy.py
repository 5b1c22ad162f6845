"""Changes of policy, and the acts that rest on it, that overlap in every order up to a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from activities.connectors.gate_policy import GatePolicy
from activities.connectors.null import Null
from activities.services.actor import Actor
from activities.services.amendments import InForce
from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.intents import Intents
from activities.services.ledger_export import of_database
from activities.services.ledger_store import LedgerStore, entries_in
from activities.services.verifier import Verifier
from models.amendments import OPERATION, Amendment, Autonomy, base_of
from models.canonical import canonical, sha256
from models.errors import CountersignError
from models.gate import Kind, Verdict
from models.ledger import Append, Draft, EventType, act_stream, event_id, policy_stream
from models.loop import Action, Assurance, Exemption, GateRule, Proposal, Request
from models.orders import Effected, EffectOrder, PlanOrder, Presentation
from models.policy import GATE_POLICY, POLICY_AGENT, AgentPolicy, Policy, policy_digest
from scripts.chaos.explorer import Choices, Clocked, Move, Ran, Stage, every
from scripts.chaos.overlaps import NOW, Stepped
from tests.databases import migrated

Standing = tuple[Stepped, Path, dict[str, EffectOrder]]
TENANT, AGENT = "default", "external"
OWNERS = GateRule(roles=("owner",), assurance=Assurance.SIGNED)
POLICY = Policy(
    agents={
        AGENT: AgentPolicy(connectors=("null",)),
        POLICY_AGENT: AgentPolicy(connectors=(GATE_POLICY,), gate=OWNERS),
    }
)
LAST = Exemption(
    name="last",
    connector="null",
    operations=("note",),
    targets=("null:*",),
    max_uses=1,
    valid_until=NOW + timedelta(days=1),
)


def draft(stream: str, kind: EventType, ordinal: int, body: dict[str, Any]) -> Draft:
    return Draft(
        event_id=event_id(TENANT, stream, "chain", kind, ordinal),
        stream=stream,
        type=kind,
        actor_kind="workflow",
        actor_ref=AGENT,
        correlation_id=stream,
        body=body,
    )


class Office:
    """A company whose policy may be changed, with notes as its only other target."""

    def __init__(self, database: Database, folder: Path, clock: Any) -> None:
        self.database, self.clock = database, clock
        self.force = InForce(POLICY)
        self.policy = GatePolicy(database, self.force, clock)
        self.null = Null(folder / "notes", clock)
        self.intents = Intents(database, clock, self.force)
        self.ledger = LedgerStore(database, clock, self.force.heed)
        self.actor = Actor(
            database,
            {GATE_POLICY: self.policy, "null": self.null},
            POLICY,
            timedelta(minutes=1),
            clock,
            in_force=self.force.of,
        )

    async def planned(self, name: str, agent: str, operation: str, arguments: Any) -> Presentation:
        connector = GATE_POLICY if agent == POLICY_AGENT else "null"
        ref = await ContentStore(self.database).put(TENANT, canonical(arguments), "application/json")
        action = Action(connector=connector, operation=operation, arguments=ref, title=name)
        proposal = Proposal(agent=agent, title=name, actions=(action,))
        planned = await self.actor.plan(PlanOrder(tenant=TENANT, proposal=proposal, numbers=(0,)))
        drafts = (draft(name, EventType.PLAN, 1, {}), draft(name, EventType.INTENT, 2, {}))
        policy = POLICY.of(agent)
        return Presentation(
            append=Append(tenant=TENANT, stream=name, expected=0, drafts=drafts),
            request=Request(agent=agent, key=name, body=ref, requester="bob"),
            number=1,
            proposal=proposal,
            plans=planned.plans,
            policy=policy,
            policy_digest=policy_digest(policy),
            created_at=self.clock(),
            nonce=name,
        )

    async def bind(self, name: str, agent: str, operation: str, arguments: Any) -> EffectOrder:
        presented = await self.intents.present(await self.planned(name, agent, operation, arguments))
        assert presented.intent is not None and presented.digest is not None
        verdict = Verdict(
            kind=Kind.APPROVE,
            assurance=Assurance.SIGNED,
            digest=presented.digest,
            approver="ann",
            role="owner",
            comment_sha256=sha256(b""),
        )
        await self.ledger.add(TENANT, draft(name, EventType.VERDICT, 3, verdict.model_dump(mode="json")))
        return EffectOrder(tenant=TENANT, workflow_id=name, digest=presented.digest, action=0)

    async def change(self, name: str, **autonomy: Any) -> EffectOrder:
        wanted = Amendment(agent=AGENT, base=base_of(POLICY), autonomy=Autonomy(**autonomy))
        return await self.bind(name, POLICY_AGENT, OPERATION, wanted.model_dump(mode="json"))

    async def ends(self, order: EffectOrder, kind: EventType, body: dict[str, Any]) -> None:
        """Its run says so, wherever its stream is."""
        entries = await self.database.read(lambda link: entries_in(link, TENANT, order.workflow_id))
        one = draft(order.workflow_id, kind, 9, {"digest": order.digest} | body)
        wish = Append(tenant=TENANT, stream=order.workflow_id, expected=len(entries), drafts=(one,))
        await self.ledger.append(wish)


class Played:
    """Everything of one run, on a database where a change is in force and three intents wait."""

    def __init__(
        self, database: Stepped, folder: Path, orders: dict[str, EffectOrder], choices: Choices
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Clocked)
        loop.now = NOW
        self.stage = Stage(loop, choices, self.state, list[Move], list)
        self.database, self.orders = database, orders
        self.office = Office(database, folder, self.stage.clock)
        self.heard = list[tuple[str, str]]()
        self.wrong = list[str]()
        self.planned = dict[str, Presentation]()
        database.stage = self.stage

    def state(self) -> object:
        rows = self.database.rows("SELECT key, state, epoch FROM effect")
        heads = self.database.rows("SELECT size, peaks FROM log_head")
        uses = self.database.rows("SELECT name, used FROM grant_use")
        return tuple(tuple(map(tuple, some)) for some in (rows, heads, uses))

    async def call(self, word: str) -> None:
        step, _, name = word.partition(" ")
        try:
            if step == "fails":
                await self.office.ends(self.orders[name], EventType.OUTCOME, {"status": "failed"})
            elif step == "binds":
                bound = await self.office.intents.present(self.planned[name])
                self.heard.append((name, "alone" if bound.intent and bound.intent.use else "asks"))
            elif step == "acts":
                bound = await self.office.intents.present(self.planned[name])
                assert bound.digest is not None
                order = EffectOrder(tenant=TENANT, workflow_id=name, digest=bound.digest, action=0)
                self.heard.append((word, (await self.office.actor.apply(order)).what.value))
            else:
                if step == "undo":
                    reason = {"actions": [0], "reason": "why"}
                    await self.office.ends(self.orders[name], EventType.COMPENSATION, reason)
                effect = await getattr(self.office.actor, step)(self.orders[name])
                self.heard.append((word, effect.what.value))
        except CountersignError as error:
            self.heard.append((word, type(error).__name__))

    async def play(self, *words: str) -> None:
        for name in ("one", "two", "once"):
            self.planned[name] = await self.office.planned(name, AGENT, "note", {"text": name})
        await self.stage.run([(word, lambda word=word: self.call(word)) for word in words])
        report = Verifier(()).check(of_database(self.database.link, TENANT, "explored"))
        self.wrong += [one.what for one in report.findings]
        self._each_change_follows_the_one_before()
        self._nothing_begins_under_another_policy()
        if len({name for name, how in self.heard if how == "alone"}) > LAST.max_uses:
            self.wrong.append("more passed alone than a grant has uses")

    def entries(self, stream: str) -> Sequence[Any]:
        return entries_in(self.database.link, TENANT, stream)

    def _each_change_follows_the_one_before(self) -> None:
        changed = [one for one in self.entries(policy_stream(AGENT)) if one.type is EventType.POLICY_CHANGED]
        if len({one.body["key"] for one in changed}) != len(changed):
            self.wrong.append("one key changed the policy twice")
        made = {one.body["digest"] for one in changed if "withdraws" not in one.body}
        if {self.orders["change1"].digest, self.orders["change2"].digest} <= made:
            self.wrong.append("two changes were made that were planned against one policy")
        for word, what in self.heard:
            order = self.orders.get(word.removeprefix("apply "))
            if word.startswith("apply change") and order is not None:
                was = order.digest in made
                if was != (what == "applied") and not what.startswith("Connector"):
                    self.wrong.append(f"{word} was told {what}, and the policy was changed: {was}")

    def _nothing_begins_under_another_policy(self) -> None:
        """In the order of the log: an act begins only while what it was bound under is in force."""
        places = self.database.rows("SELECT seq, stream, type FROM event ORDER BY seq")
        moved = [seq for seq, stream, _ in places if stream == policy_stream(AGENT)]
        for name in ("acts", "once"):
            own = [seq for seq, stream, kind in places if (stream, kind) == (name, "intent")]
            begun = [seq for seq, stream, kind in places if (stream, kind) == (act_stream(name), "apply")]
            if begun and any(own[0] < seq < begun[0] for seq in moved):
                self.wrong.append(f"{name} began under a policy that was no longer in force")


@pytest.fixture(scope="module")
def office(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Stepped, Path, dict[str, EffectOrder]]]:
    folder = tmp_path_factory.mktemp("office")
    url = migrated(f"sqlite:///{folder / 'countersign.db'}")

    async def made() -> dict[str, EffectOrder]:
        database = Database(url)
        office = Office(database, folder, lambda: NOW)
        first = await office.change("first", automatic=True, grants=(LAST,))
        assert (await office.actor.apply(first)).what is Effected.APPLIED
        orders = {"first": first, "acts": await office.bind("acts", AGENT, "note", {"text": "acts"})}
        orders["other"] = await office.bind("other", AGENT, "note", {"text": "other"})
        orders["change1"] = await office.change("change1", automatic=True, automatic_up_to="read_only")
        orders["change2"] = await office.change("change2", automatic=False, grants=(LAST,))
        database.close()
        return orders

    orders = asyncio.run(made())
    stepped = Stepped(url)
    yield stepped, folder, orders
    stepped.close()


@pytest.mark.parametrize(
    "words",
    [
        ("apply change1", "apply change1"),
        ("apply change1", "apply change2"),
        ("apply acts", "apply change1"),
        ("apply acts", "undo first"),
        ("apply change1", "fails other"),
    ],
    ids=" and ".join,
)
def test_policy_changes_once_and_nothing_begins_under_another(
    office: Standing, words: tuple[str, ...]
) -> None:
    count, wrong = explored(office, words)
    assert wrong is None
    assert count > 3


def test_of_two_intents_that_take_the_last_use_of_a_grant_at_once_one_asks(office: Standing) -> None:
    count, wrong = explored(office, ("binds one", "binds two", "binds two"), "change2")
    assert wrong is None
    assert count > 3


def test_what_a_withdrawn_grant_let_pass_is_not_begun(office: Standing) -> None:
    count, wrong = explored(office, ("acts once", "undo change2"), "change2")
    assert wrong is None
    assert count > 2


def explored(office: Standing, words: tuple[str, ...], first: str = "") -> tuple[int, Ran | None]:
    """All orders with at most one surprise, once `first` has been applied."""
    database, folder, orders = office

    async def run(choices: Choices) -> tuple[list[str], list[str]]:
        with database.forgetting():
            for path in (folder / "notes" / "notes").iterdir():
                path.unlink()
            played = Played(database, folder, orders, choices)
            if first:
                assert (await played.office.actor.apply(orders[first])).what is Effected.APPLIED
            await played.play(*words)
            return [*played.stage.told, *map(str, played.heard)], played.wrong

    with closing(Clocked(NOW)) as loop:
        return loop.run_until_complete(every(run, 1))
