"""Beliefs: no update is lost, no event counts twice, and whoever read an old version finds out."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import select, update
from temporalio.client import WorkflowFailureError

from activities.services.beliefs import SNAPSHOT, TRIES, Beliefs, belief_stream
from activities.services.database import Database
from activities.services.ledger_store import LedgerStore, entries_in
from models.beliefs import (
    STATE_BYTES,
    Belief,
    Change,
    apply,
    difference,
    evidence,
    read_evidence,
    stale_fields,
)
from models.canonical import canonical
from models.errors import InvalidInput, LedgerBroken, LedgerConflict, UnknownName
from models.gate import Kind
from models.loop import Status
from tests.conftest import a_key, note, policy, settings_for, stack_of

NOW = datetime(2026, 5, 1, tzinfo=UTC)
WHO = ("default", "pricing", "sku-1")
NOTHING = Belief(tenant="default", agent="pricing", subject="sku-1")


def change(event: str, removes: tuple[str, ...] = (), subject: str = "sku-1", **sets) -> Change:
    return Change(tenant="default", agent="pricing", subject=subject, event=event, sets=sets, removes=removes)


@pytest.fixture
def beliefs(database: Database) -> Beliefs:
    return Beliefs(database, lambda: NOW)


def test_a_field_remembers_since_when_it_holds():
    first = apply(NOTHING, change("1", price="10", stock=3))
    second = apply(first, change("2", price="10", stock=4))
    assert (second.fields["price"].since, second.fields["stock"].since) == (1, 2)
    assert [delta.text() for delta in difference(first, second)] == ["stock: 3 -> 4"]
    third = apply(second, change("3", removes=("price",), sold=True))
    texts = [delta.text() for delta in difference(second, third)]
    assert texts == ["price: 10 -> nothing", "sold: nothing -> True"]
    assert apply(third, change("4", sold=1)).fields["sold"].since == 4


def test_who_read_an_old_version_is_stale_only_in_what_it_rests_on():
    first = apply(NOTHING, change("1", price="10", stock=3))
    second = apply(first, change("2", stock=4))
    assert stale_fields(1, ("price",), second) == ()
    assert stale_fields(1, ("stock",), second) == ("stock",)
    assert stale_fields(1, (), second) == ("stock",)
    assert stale_fields(2, (), second) == ()
    assert stale_fields(1, ("never",), second) == ("never",)
    gone = apply(second, change("3", removes=("price",)))
    assert stale_fields(2, ("price",), gone) == ("price",)
    assert stale_fields(9, (), second) == ("version",)


def test_evidence_names_subject_version_and_fields():
    belief = apply(NOTHING, change("1", price="10", stock=3))
    one = evidence(belief, "stock", "price")
    assert (one.reference, one.version) == ("belief:sku-1#price,stock", "1")
    assert read_evidence(one) == ("sku-1", 1, ("price", "stock"))
    assert read_evidence(evidence(belief)) == ("sku-1", 1, ())
    assert read_evidence(one.model_copy(update={"reference": "record-7"})) is None
    assert read_evidence(one.model_copy(update={"version": "-1"})) is None


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 1500)), max_size=60))
def test_a_belief_stays_compact_and_folds_what_is_oldest(writes):
    belief = NOTHING
    for number, (key, size) in enumerate(writes):
        belief = apply(belief, change(str(number), **{f"k{key}": "x" * size}))
        assert len(canonical(belief)) <= STATE_BYTES
        assert belief.fields[f"k{key}"].value == "x" * size
        if belief.folded:
            newest = max(belief.folded.values())
            assert newest <= min(known.since for known in belief.fields.values())
        assert not set(belief.folded) & set(belief.fields)


def test_a_folded_field_is_not_stale_for_having_been_folded():
    belief = apply(NOTHING, change("0", first="mine"))
    for number in range(1, 40):
        belief = apply(belief, change(str(number), **{f"k{number}": "x" * 1000}))
    assert "first" in belief.folded
    assert stale_fields(1, ("first",), belief) == ()
    assert apply(belief, change("new", first="other")).fields["first"].since == belief.version + 1


def test_what_is_too_large_or_misspelled_is_refused():
    with pytest.raises(InvalidInput, match="sets"):
        apply(NOTHING, change("1", **{f"k{number}": "x" * 2000 for number in range(9)}))
    for bad in ({"Price": 1}, {"a b": 1}, {"x": "nul\0"}, {"x": 1.5}, {"x": "y" * 2001}):
        with pytest.raises(ValidationError):
            change("1", **bad)
    with pytest.raises(ValidationError):
        change("1", subject="two words")


async def test_versions_stand_for_ever_and_each_is_in_the_ledger(beliefs, database):
    await beliefs.change(change("e1", price="10"))
    await beliefs.change(change("e2", price="12"))
    assert (await beliefs.now(*WHO)).value("price") == "12"
    assert (await beliefs.at(*WHO, 1)).value("price") == "10"
    assert [one.belief.version for one in await beliefs.history(*WHO)] == [1, 2]
    assert await beliefs.subjects("default") == (("pricing", "sku-1", 2),)
    entries = await database.read(lambda c: entries_in(c, "default", belief_stream(*WHO)))
    assert [entry.body["version"] for entry in entries] == [1, 2]
    assert (await LedgerStore(database, lambda: NOW).tail("default", 1))[0].causation_id == "e2"
    with pytest.raises(UnknownName, match="version 3"):
        await beliefs.at(*WHO, 3)
    assert (await beliefs.now("default", "other", "sku-1")).version == 0


async def test_a_second_delivery_of_an_event_changes_nothing(beliefs):
    assert (await beliefs.change(change("e1", price="10"))).won
    again = await beliefs.change(change("e1", price="11"))
    assert (again.won, again.known, again.belief.version) == (False, True, 1)


async def test_a_stale_version_or_a_former_owner_changes_nothing_and_learns_what_stands(beliefs):
    epoch = await beliefs.claim(*WHO, holder="first")
    assert await beliefs.claim(*WHO, holder="first") == epoch
    assert (await beliefs.change(change("e1", price="10"), expected=0, epoch=epoch)).won
    late = await beliefs.change(change("e2", price="9"), expected=0, epoch=epoch)
    assert (late.won, late.belief.value("price")) == (False, "10") and "version 0" in late.reason
    assert await beliefs.claim(*WHO, holder="second") == epoch + 1
    fenced = await beliefs.change(change("e3", price="8"), epoch=epoch)
    assert not fenced.won and "owner epoch" in fenced.reason


class Outrun(Beliefs):
    """Somebody else changes the belief each time it was read."""

    async def now(self, tenant, agent, subject):
        seen = await super().now(tenant, agent, subject)
        await self.change(change(f"other-{seen.version}", others=seen.version + 1))
        return seen


async def test_a_decider_that_loses_to_others_every_time_gets_its_turn_and_sees_what_they_did(database):
    beliefs = Outrun(database, lambda: NOW)
    settled = await beliefs.decide(
        "default", "pricing", "sku-1", lambda seen: change("mine", saw=seen.value("others"))
    )
    assert settled.won
    assert settled.belief.value("saw") == settled.belief.version - 1 == TRIES
    again = await beliefs.decide("default", "pricing", "sku-1", lambda seen: change("mine"))
    assert again.known


async def test_a_decider_who_is_not_the_owner_any_more_learns_it(beliefs):
    epoch = await beliefs.claim("default", "pricing", "sku-1", "first")
    await beliefs.claim("default", "pricing", "sku-1", "second")
    with pytest.raises(LedgerConflict, match="another owner"):
        await beliefs.decide("default", "pricing", "sku-1", lambda seen: change("mine"), epoch)


async def test_a_snapshot_that_was_edited_is_noticed(beliefs, database):
    await beliefs.change(change("e1", price="10"))
    await database.write(lambda c: c.execute(update(SNAPSHOT).values(state=b"{}")))
    with pytest.raises(LedgerBroken, match="sku-1"):
        await beliefs.now(*WHO)


DECIDER = """
import asyncio, sys
from datetime import datetime, timezone
from activities.services.beliefs import Beliefs
from activities.services.database import Database
from models.beliefs import Change
async def decide(beliefs, name, rounds):
    for number in range(rounds):
        event = f"{name}-{number}"
        def think(seen):
            return Change(tenant="default", agent="pricing", subject="sku-1", event=event,
                          sets={"count": int(seen.value("count") or 0) + 1, name: number + 1})
        await beliefs.decide("default", "pricing", "sku-1", think)
        print(event, flush=True)
async def main():
    database = Database(sys.argv[1])
    beliefs = Beliefs(database, lambda: datetime.now(timezone.utc))
    names = [f"{sys.argv[2]}-{n}" for n in range(4)]
    await asyncio.gather(*(decide(beliefs, name, int(sys.argv[3])) for name in names))
    database.close()
asyncio.run(main())
"""


async def test_sixteen_deciders_on_one_subject_lose_nothing_though_some_are_killed(beliefs, database, url):
    """Four processes with four deciders each; one is killed and started again, which repeats its events."""

    def start(name: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", DECIDER, url, name, "5"]
        root = Path(__file__).parents[1]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=root)

    running = {name: start(name) for name in ("a", "b", "c", "d")}
    victim = running["d"]
    assert victim.stdout is not None
    acknowledged = [await asyncio.to_thread(victim.stdout.readline)]
    os.kill(victim.pid, signal.SIGKILL)
    acknowledged += (await asyncio.to_thread(victim.communicate))[0].splitlines()
    running["d"] = start("d")
    outputs = [await asyncio.to_thread(process.communicate) for process in running.values()]
    assert all(process.returncode == 0 for process in running.values())
    acknowledged += [line for output, _ in outputs for line in output.splitlines()]
    events = await database.read(
        lambda c: c.execute(select(SNAPSHOT.c.event_id).order_by(SNAPSHOT.c.version)).scalars().all()
    )
    final = await beliefs.now(*WHO)
    assert len(events) == len(set(events)) == 80 == final.version
    assert set(events) == {f"{p}-{n}-{r}" for p in "abcd" for n in range(4) for r in range(5)}
    assert {line.strip() for line in acknowledged} == set(events)
    assert final.value("count") == 80
    assert all(final.value(f"{p}-{n}") == 5 for p in "abcd" for n in range(4))


async def test_an_approval_of_a_belief_that_changed_is_asked_again_showing_the_difference(stack):
    who = ("default", "external", "sku-1")
    beliefs = Beliefs(stack.database, lambda: datetime.now(UTC))
    first = Change(tenant=who[0], agent=who[1], subject=who[2], event="e1", sets={"price": "10", "stock": 3})
    belief = (await beliefs.change(first)).belief
    rests = evidence(belief, "price").model_dump()
    run = await stack.propose(a_key(), note(), evidence=[rests])
    await beliefs.change(first.model_copy(update={"event": "e2", "sets": {"stock": 2}}))
    digest = await stack.digest(run)
    await beliefs.change(first.model_copy(update={"event": "e3", "sets": {"price": "12"}}))
    await stack.answer(run, Kind.APPROVE, digest)
    again = await stack.digest(run, number=2)
    assert stack.notes() == []
    assert "price: 10 -> 12" in await run.handle.query("card")
    assert (await stack.answer(run, Kind.APPROVE, again)).counted
    assert (await run.handle.result()).status is Status.EXECUTED
    assert len(stack.notes()) == 1


async def test_what_changed_again_while_it_was_asked_again_is_asked_once_more(stack):
    beliefs = Beliefs(stack.database, lambda: datetime.now(UTC))
    first = Change(tenant="default", agent="external", subject="sku-3", event="e1", sets={"price": "10"})
    belief = (await beliefs.change(first)).belief
    run = await stack.propose(a_key(), note(), evidence=[evidence(belief, "price").model_dump()])
    for number, price in enumerate(("12", "14"), 1):
        digest = await stack.digest(run, number)
        await beliefs.change(first.model_copy(update={"event": f"then {number}", "sets": {"price": price}}))
        assert (await stack.answer(run, Kind.APPROVE, digest)).counted
    third = await stack.digest(run, number=3)
    assert "price: 10 -> 14" in await run.handle.query("card")
    await stack.answer(run, Kind.APPROVE, third)
    assert (await run.handle.result()).status is Status.EXECUTED


async def test_where_nobody_is_asked_a_changed_belief_ends_the_run(temporal, tmp_path):
    alone = settings_for(temporal, tmp_path, policy=policy(automatic=True, remind_seconds=None))
    async with stack_of(alone) as stack:
        beliefs = Beliefs(stack.database, lambda: datetime.now(UTC))
        first = Change(tenant="default", agent="external", subject="sku-4", event="e1", sets={"price": "10"})
        belief = (await beliefs.change(first)).belief
        await beliefs.change(first.model_copy(update={"event": "e2", "sets": {"price": "12"}}))
        run = await stack.propose(a_key(), note(), evidence=[evidence(belief, "price").model_dump()])
        with pytest.raises(WorkflowFailureError) as failure:
            await run.handle.result()
        assert "price: 10 -> 12" in str(failure.value.cause)
        assert stack.notes() == []


async def test_an_approval_stands_while_only_other_fields_of_the_belief_changed(stack):
    beliefs = Beliefs(stack.database, lambda: datetime.now(UTC))
    first = Change(tenant="default", agent="external", subject="sku-2", event="e1", sets={"price": "10"})
    belief = (await beliefs.change(first)).belief
    run = await stack.propose(a_key(), note(), evidence=[evidence(belief, "price").model_dump()])
    await beliefs.change(first.model_copy(update={"event": "e2", "sets": {"stock": 2}}))
    await stack.approve(run)
    assert (await run.handle.result()).status is Status.EXECUTED
