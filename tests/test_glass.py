from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from activities.services.identities import statement_of
from activities.services.notices import Notice
from models.canonical import canonical, digest_of
from models.channels import TerminalSettings
from models.gate import Answer, Identity, Kind, Refusal, Standing, Verdict, judge, may_act, standing
from models.ledger import Entry, EventType
from models.loop import Assurance, BreakGlass, GateRule, Intent, Request, Reversibility, Status
from models.notices import FIRST_ROUND, NoticeOrder, named_in, told_of
from models.people import Key, Person
from models.policy import AgentPolicy, Policy
from models.progress import Progress
from models.settings import Settings, TemporalSettings
from scripts import verify_ledger
from scripts.commands.answer import signed
from scripts.commands.start import begin
from scripts.exits import Exit
from temporal.client import Started, submit
from tests.audits import audited
from tests.conftest import Stack, a_key, note, settings_for, stack_of
from tests.intents import DAY, START, a_stream, a_verdict, an_intent
from tests.test_cli import command
from tests.test_people import public
from tests.test_signatures import make_key
from tests.variants import AGENTS
from workers.compose import Parts

GLASS = BreakGlass(classes=("reversible",), alarm=("boss",), notify=("desk",))
RULE = GateRule(approvals=2, assurance="signed", roles=("editor",), break_glass=GLASS, remind_seconds=None)
SIGNED = Identity(assurance=Assurance.SIGNED, roles=("break_glass", "editor"), key="SHA256:x")
LIMIT = 60
in_the_room = pytest.mark.asyncio(loop_scope="module")


# The rule.


def judged(intent: Intent, *before: Verdict, identity: Identity = SIGNED, **more: Any) -> Verdict | Refusal:
    fields: dict[str, Any] = {
        "digest": digest_of(intent),
        "approver": "ann",
        "role": "break_glass",
        "comment": "the shop is down",
        "break_glass": True,
    }
    kind = more.pop("kind", Kind.APPROVE)
    answer = Answer(**(fields | more))
    return judge(kind, answer, intent, fields["digest"], before, START + DAY, START, identity)


def broken(intent: Intent, **more: Any) -> Verdict:
    fields = {"assurance": Assurance.SIGNED, "role": "break_glass", "break_glass": True}
    return a_verdict(Kind.APPROVE, digest_of(intent), **(fields | more))


def test_one_signed_answer_goes_ahead_without_the_others() -> None:
    intent = an_intent(RULE)
    verdict = judged(intent)
    assert isinstance(verdict, Verdict), verdict
    assert verdict.break_glass
    assert standing(intent, [verdict]) is Standing.PASSED


def test_it_goes_over_a_delegation_and_may_come_from_whoever_asked() -> None:
    intent = an_intent(RULE, requester="ann")
    handed = a_verdict(Kind.DELEGATE, digest_of(intent), "eve", to="bob", assurance=Assurance.SIGNED)
    assert isinstance(judged(intent, handed), Verdict)
    rejected = a_verdict(Kind.REJECT, digest_of(intent), "eve")
    assert isinstance(judged(intent, rejected), Refusal)


@pytest.mark.parametrize(
    ("rule", "kinds", "more", "field"),
    [
        (GateRule(), ("reversible",), {}, "break_glass"),
        (RULE, ("irreversible",), {}, "break_glass"),
        (RULE, ("reversible", "correctable"), {}, "break_glass"),
        (RULE, ("reversible",), {"kind": Kind.REJECT}, "break_glass"),
        (RULE, ("reversible",), {"role": "editor"}, "role"),
        (RULE, ("reversible",), {"role": None}, "role"),
        (RULE, ("reversible",), {"comment": "  "}, "comment"),
        (RULE, ("reversible",), {"approver": "External"}, "approver"),
        (RULE, ("reversible",), {"identity": Identity(roles=("break_glass",))}, "signature"),
        (RULE, ("reversible",), {"identity": Identity(assurance="signed", roles=("editor",))}, "role"),
        (
            RULE.model_copy(update={"assurance": Assurance.CLAIMED}),
            ("reversible",),
            {"identity": Identity(roles=("break_glass",))},
            "signature",
        ),
    ],
)
def test_the_glass_is_broken_as_policy_says_or_not_at_all(
    rule: GateRule, kinds: tuple[str, ...], more: dict[str, Any], field: str
) -> None:
    intent = an_intent(rule, tuple(Reversibility(kind) for kind in kinds))
    ruling = judged(intent, **more)
    assert isinstance(ruling, Refusal), ruling
    assert ruling.field == field


@pytest.mark.parametrize(
    "changed",
    [{"assurance": Assurance.CLAIMED}, {"role": "editor"}, {"role": None}, {"approver": "EXTERNAL"}],
)
def test_the_worker_does_not_believe_a_record_that_could_not_have_counted(changed: dict[str, Any]) -> None:
    intent = an_intent(RULE)
    digest = digest_of(intent)

    def why(verdict: Verdict) -> str | None:
        entries = a_stream(
            (EventType.INTENT, {"digest": digest}), (EventType.VERDICT, verdict.model_dump(mode="json"))
        )
        return may_act(entries, intent, digest, START)

    assert why(broken(intent)) is None
    assert "waiting" in str(why(broken(intent, **changed)))


def test_it_counts_as_no_ordinary_approval() -> None:
    rule = RULE.model_copy(update={"break_glass": None, "approvals": 1, "roles": ()})
    intent = an_intent(rule)
    assert standing(intent, [broken(intent)]) is Standing.WAITING


def test_what_is_signed_says_so_and_what_was_signed_before_stays_as_it_was() -> None:
    parts = {"nonce": "a" * 32, "issued_at": START, "expires_at": START + DAY}
    plain = Answer(digest="0" * 64, approver="ann", **parts)
    statements = [
        statement_of("default", Kind.APPROVE, plain.model_copy(update=more))
        for more in ({}, {"break_glass": True}, {"review": True})
    ]
    said = [one.bytes() for one in statements if one is not None]
    assert len(set(said)) == 3
    assert b"break_glass" not in said[0]
    assert b"review" not in said[0]
    assert said[0] == canonical(json.loads(said[0]))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("approve", "approve", "reject", "delegate")),
            st.sampled_from(("ann", "bob", "external")),
            st.sampled_from(("claimed", "signed")),
            st.sampled_from(("break_glass", "editor", None)),
            st.booleans(),
        ),
        max_size=4,
    ),
    st.sampled_from(tuple(Reversibility)),
    st.booleans(),
)
def test_the_one_file_verifier_lets_pass_what_the_worker_does(
    said: list[tuple[str, str, str, str | None, bool]], kind: Reversibility, may: bool
) -> None:
    rule = RULE.model_copy(update={"assurance": Assurance.CLAIMED, "break_glass": GLASS if may else None})
    intent = an_intent(rule, (kind,))
    digest = digest_of(intent)
    verdicts = [
        a_verdict(Kind(word), digest, who, assurance=sure, role=role, break_glass=glass, to="bob")
        for word, who, sure, role, glass in said
    ]
    plain = [(one.model_dump(mode="json"), START.isoformat()) for one in verdicts]
    passed = verify_ledger.passed(intent.model_dump(mode="json"), plain)
    assert passed is (standing(intent, verdicts) is Standing.PASSED)


# Who hears of it, and until when.


def test_a_review_is_open_until_enough_others_have_spoken() -> None:
    intent = an_intent(RULE)
    two = GLASS.model_copy(update={"reviewers": 2})
    right = a_verdict(Kind.APPROVE, digest_of(intent), "bob", review=True)
    wrong = a_verdict(Kind.REJECT, digest_of(intent), "eve", review=True)

    def after(*reviews: Verdict) -> bool:
        progress = Progress()
        told = [(EventType.INTENT, {"digest": digest_of(intent), "number": 1})]
        told += [(EventType.VERDICT, broken(intent).model_dump(mode="json"))]
        told += [(EventType.REVIEW, one.model_dump(mode="json")) for one in reviews]
        progress.take(a_stream(*told))
        return progress.reviewing(two)

    assert after()
    assert after(right)
    assert not after(right, right)
    assert not after(wrong)
    assert not Progress().reviewing(two)


def test_an_alarm_is_no_reminder() -> None:
    progress = Progress()
    body = {"digest": "0" * 64, "alarm": 3}
    progress.take([Entry(version=1, type=EventType.REMINDER, body=body, recorded_at=START)])
    assert (progress.alarms, progress.reminders) == (3, 0)


def test_at_once_and_when_it_is_late_other_channels_hear_of_it() -> None:
    assert told_of(GLASS, 0) == ("desk",)
    assert told_of(GLASS, 1) == ("desk", "boss")
    assert set(named_in(RULE)) == {"desk", "boss"}


@pytest.mark.parametrize(("number", "late"), [(FIRST_ROUND, False), (FIRST_ROUND + 2, True)])
def test_a_notice_says_that_it_was_done_and_how_to_review_it(number: int, late: bool) -> None:
    order = NoticeOrder(tenant="default", workflow_id="r", digest="0" * 64, channel="desk", round=number)
    text = Notice(order, "Do it", "### card", "1" * 64, START).text()
    assert ("ALARM" in text) is late
    assert f"countersign approve r --review --digest {'0' * 64}" in text
    assert "Open until" not in text


def test_settings_want_the_channels_and_the_role_to_exist() -> None:
    policy = Policy(agents={"external": AgentPolicy(connectors=("null",), gate=RULE)})
    named = (Person(name="ann", roles=("break_glass",)),)
    channels = tuple(TerminalSettings(name=name, kind="terminal") for name in ("desk", "boss"))
    assert Settings(policy=policy, people=named, channels=channels).policy == policy
    with pytest.raises(ValidationError, match="boss, which is no channel"):
        Settings(policy=policy, people=named, channels=channels[:1])
    with pytest.raises(ValidationError, match="role break_glass to start, cancel or break the glass"):
        Settings(policy=policy, channels=channels)
    with pytest.raises(ValidationError):
        BreakGlass(classes=("reversible",), alarm=())


# A run.


@dataclass
class Room:
    stack: Stack
    keys: dict[str, Path]

    async def start(self, agent: str = "external", **body: Any) -> tuple[Started, str]:
        request = self.request(agent, **body)
        run = await submit(self.stack.client, request, self.stack.settings.temporal)
        return run, await self.stack.digest(run)

    def request(self, agent: str = "external", **more: Any) -> Request:
        body = json.dumps({"title": "t", "actions": [note(a_key())]} | more)
        return Request(agent=agent, key=a_key(), body=body, requester="ines")

    async def says(self, run: Started, who: str, kind: Kind, **more: Any) -> Any:
        key = self.keys[who]
        message = await signed("default", kind, {"approver": who} | more, key)
        return await self.stack.answer(run, kind, **message)

    async def breaks(self, run: Started, digest: str) -> None:
        said = {"digest": digest, "role": "break_glass", "comment": "now", "break_glass": True}
        assert (await self.says(run, "ann", Kind.APPROVE, **said)).counted

    async def state(self, run: Started, wanted: str) -> None:
        async with asyncio.timeout(LIMIT):
            while (await run.handle.query("status"))["state"] != wanted:
                await asyncio.sleep(0.01)

    async def body(self, run: Started, kind: EventType, **wanted: Any) -> dict[str, Any]:
        async with asyncio.timeout(LIMIT):
            while True:
                for event in await self.stack.events(run):
                    if event.type is kind and wanted.items() <= event.body.items():
                        return event.body
                await asyncio.sleep(0.01)


def room_settings(temporal: TemporalSettings, folder: Path, keys: dict[str, Path]) -> Settings:
    people = tuple(
        Person(name=name, roles=("break_glass", "editor"), keys=(Key(public=public(key)),))
        for name, key in keys.items()
    )
    hasty = RULE.model_copy(update={"break_glass": GLASS.model_copy(update={"review_seconds": 1})})
    gates = {"external": RULE, "pair": hasty}
    agents = {name: AgentPolicy(connectors=("null",), gate=gate) for name, gate in gates.items()}
    channels = tuple(TerminalSettings(name=name, kind="terminal") for name in ("desk", "boss"))
    data = folder / "data"
    data.mkdir(exist_ok=True)
    return settings_for(temporal, data, policy=Policy(agents=agents), people=people, channels=channels)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def room(temporal: TemporalSettings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Room]:
    folder = tmp_path_factory.mktemp("glass")
    keys = {name: make_key(folder, name) for name in ("ann", "bob", "eve", "ines")}
    async with stack_of(room_settings(temporal, folder, keys), Parts(agents=AGENTS)) as stack:
        yield Room(stack, keys)


@in_the_room
async def test_the_command_goes_ahead_alone_and_others_review_it(room: Room, tmp_path: Path) -> None:
    run, digest = await room.start()
    here = ("--digest", digest, "--as", "ann", "--role", "break_glass", "--break-glass")
    words = ("approve", run.workflow_id, *here, "--sign", str(room.keys["ann"]))
    silent = await command(room.stack, *words)
    assert silent.exit_code == Exit.GATE
    assert "say why" in silent.stderr
    unsigned = await command(room.stack, "approve", run.workflow_id, *here, "--reason", "x")
    assert unsigned.exit_code == Exit.GATE
    done = await command(room.stack, *words, "--reason", "the shop is down")
    assert done.exit_code == Exit.DONE, done.stderr
    await room.state(run, "reviewing")
    outcome = await room.body(run, EventType.OUTCOME)
    assert outcome["status"] == Status.EXECUTED
    shown = await command(room.stack, "show", run.workflow_id)
    assert "approve by ann (signed), breaking the glass" in shown.stdout
    assert f"countersign approve {run.workflow_id} --review" in shown.stdout
    await room.body(run, EventType.DELIVERY, channel="desk", round=FIRST_ROUND)
    async with asyncio.timeout(LIMIT):
        # Visibility follows a moment later.
        while run.workflow_id not in await for_review(room):
            pass
    review = ("approve", run.workflow_id, "--review", "--digest", digest)
    own = await command(room.stack, *review, "--as", "ann", "--sign", str(room.keys["ann"]))
    assert own.exit_code == Exit.GATE
    assert "broke the glass cannot review it" in own.stderr
    other = await command(room.stack, *review, "--as", "bob", "--sign", str(room.keys["bob"]))
    assert other.exit_code == Exit.DONE, other.stderr
    assert (await run.handle.result()).status is Status.EXECUTED
    told = await room.body(run, EventType.REVIEW)
    assert (told["approver"], told["kind"], told["assurance"]) == ("bob", "approve", "signed")
    after = await command(room.stack, "show", run.workflow_id)
    assert "review   approve by bob (signed)" in after.stdout
    assert "--review" not in after.stdout
    report = await audited(room.stack, tmp_path)
    assert (report["findings"], report["signatures"] >= 2) == ([], True)


async def for_review(room: Room) -> list[str]:
    listed = json.loads((await command(room.stack, "pending", "--json")).stdout)
    return [row["workflow_id"] for row in listed if row["for"] == "review"]


@in_the_room
async def test_only_a_review_is_taken_for_one(room: Room) -> None:
    run, digest = await room.start()
    early = await room.says(run, "bob", Kind.APPROVE, digest=digest, review=True)
    assert (early.counted, early.field) == (False, "review")
    await room.breaks(run, digest)
    await room.state(run, "reviewing")
    refused = [
        ("bob", Kind.APPROVE, {"role": "editor"}, "has ended"),
        ("ines", Kind.APPROVE, {"review": True}, "cannot review"),
        ("ann", Kind.REJECT, {"review": True}, "cannot review"),
        ("bob", Kind.REVISE, {"review": True, "comment": "x"}, "approve it if it was right"),
        ("bob", Kind.APPROVE, {"review": True, "digest": "0" * 64}, "not what was done"),
    ]
    for who, kind, more, why in refused:
        judged_ = await room.says(run, who, kind, **({"digest": digest} | more))
        assert not judged_.counted, (who, more)
        assert why in judged_.remedy
    unsigned = await room.stack.answer(run, Kind.APPROVE, digest, approver="bob", review=True)
    assert unsigned.field == "signature"
    plain = await signed("default", Kind.APPROVE, {"approver": "bob", "digest": digest}, room.keys["bob"])
    turned = await room.stack.answer(run, Kind.APPROVE, **(plain | {"review": True}))
    assert "does not fit" in turned.remedy
    await room.state(run, "reviewing")
    wrong = await room.says(run, "eve", Kind.REJECT, digest=digest, review=True, comment="it could wait")
    assert (wrong.counted, wrong.state) == (True, "reviewed")
    assert (await run.handle.result()).status is Status.EXECUTED


@in_the_room
async def test_an_ordinary_answer_cannot_be_made_to_break_the_glass(room: Room) -> None:
    run, digest = await room.start()
    message = {"approver": "ann", "digest": digest, "role": "break_glass", "comment": "now"}
    plain = await signed("default", Kind.APPROVE, message, room.keys["ann"])
    turned = await room.stack.answer(run, Kind.APPROVE, **(plain | {"break_glass": True}))
    assert (turned.counted, turned.field) == (False, "signature")
    await room.says(run, "bob", Kind.REJECT, digest=digest)
    assert (await run.handle.result()).status is Status.REJECTED


@in_the_room
async def test_neither_cancelling_nor_terminating_does_away_with_a_review(room: Room) -> None:
    request = room.request()
    run = await submit(room.stack.client, request, room.stack.settings.temporal)
    digest = await room.stack.digest(run)
    await room.breaks(run, digest)
    await room.state(run, "reviewing")
    notes = room.stack.notes()
    await run.handle.cancel()
    await room.state(run, "reviewing")
    await run.handle.terminate()
    started = await begin(room.stack.settings, request, b"{}", "", wait=False)
    assert started["was"] == "started"
    again = await submit(room.stack.client, request, room.stack.settings.temporal)
    await room.state(again, "reviewing")
    assert (await room.says(again, "bob", Kind.APPROVE, digest=digest, review=True)).counted
    assert (await again.handle.result()).status is Status.EXECUTED
    ended = await begin(room.stack.settings, request, b"{}", "", wait=False)
    assert ended["was"] == "ended earlier"
    assert room.stack.notes() == notes


@in_the_room
async def test_what_was_broken_is_reviewed_though_another_intent_followed_it(room: Room) -> None:
    name = a_key()
    run, digest = await room.start(actions=[note("drift", target=name)])
    (room.stack.settings.data / "notes" / "targets" / name).write_text("changed meanwhile")
    await room.breaks(run, digest)
    after = await room.stack.digest(run, 2)
    await room.says(run, "bob", Kind.REJECT, digest=after)
    await room.state(run, "reviewing")
    shown = await command(room.stack, "show", run.workflow_id)
    (line,) = [line for line in shown.stdout.splitlines() if "--review" in line]
    words = shlex.split(line.partition("countersign ")[2].replace("YOUR-NAME", "eve"))
    done = await command(room.stack, *words, "--sign", str(room.keys["eve"]))
    assert done.exit_code == Exit.DONE, done.stderr
    assert (await run.handle.result()).status is Status.REJECTED


@in_the_room
async def test_an_alarm_is_raised_until_a_late_review_is_there(room: Room) -> None:
    run, digest = await room.start("pair")
    await room.breaks(run, digest)
    alarm = await room.body(run, EventType.REMINDER)
    assert alarm["alarm"] >= 1
    told = await room.body(run, EventType.DELIVERY, channel="boss")
    assert told["round"] > FIRST_ROUND
    notice = room.stack.settings.data / "notices" / "boss" / told["reference"]
    assert "ALARM: its review is late" in notice.read_text()
    assert (await room.says(run, "bob", Kind.APPROVE, digest=digest, review=True)).counted
    assert (await run.handle.result()).status is Status.EXECUTED
