from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from temporalio import activity
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from activities.actions import Actions
from activities.connectors.null import Null
from activities.external import External as Reading
from activities.ledger import Ledger
from activities.notices import Reminders
from activities.services.actor import Actor
from activities.services.intents import Intents
from activities.services.notices import Email, Notice, Terminal, Webhook, letter, signature
from activities.services.requests import Requests
from models.business_hours import next_open
from models.channels import EmailSettings, TerminalSettings, WebhookSettings
from models.errors import ConnectorRejected, CountersignError, CredentialsRejected, RateLimited, Unavailable
from models.gate import Kind
from models.loop import GateRule, Hours, Intent, Ref, Rung, Status
from models.notices import NoticeOrder, Told, heard_by
from models.orders import Pace
from models.policy import AgentPolicy, Policy
from models.progress import Progress
from models.settings import Settings, TemporalSettings
from models.visibility import Queue
from tests.conftest import a_key, note, settings_for, stack_of
from tests.intents import DAY as ONE
from tests.intents import START, a_stream, an_intent
from tests.test_expiry import Room, skipping
from workflows.agents.external import External

__all__ = ["skipping"]

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
DIGEST, CARD = "a" * 64, "b" * 64
BERLIN = Hours(zone="Europe/Berlin")
KEY = SecretStr("0123456789abcdef")
HOOK = WebhookSettings(name="hook", kind="webhook", url="https://hook.test/x", token=KEY)
DAY = 86_400


def a_notice(title: str = "Do it", number: int = 0) -> Notice:
    order = NoticeOrder(tenant="default", workflow_id="run-1", digest=DIGEST, channel="hook", round=number)
    return Notice(order, title, "### What is proposed", CARD, NOW + timedelta(days=1))


def policy(**gate: Any) -> Policy:
    rule = GateRule(**({"remind_seconds": None} | gate))
    return Policy(agents={"external": AgentPolicy(connectors=("null",), gate=rule)})


# Business hours.


@pytest.mark.parametrize(
    ("moment", "opens"),
    [
        ("2026-11-24T12:00:00+00:00", "2026-11-24T12:00:00+00:00"),
        ("2026-11-24T07:59:00+00:00", "2026-11-24T08:00:00+00:00"),
        ("2026-11-24T16:00:00+00:00", "2026-11-25T08:00:00+00:00"),
        ("2026-11-27T17:00:00+01:00", "2026-11-30T08:00:00+00:00"),
        ("2026-12-24T20:00:00+00:00", "2026-12-28T08:00:00+00:00"),
        ("2026-03-27T20:00:00+00:00", "2026-03-30T07:00:00+00:00"),
    ],
)
def test_people_are_at_work_again_when_their_own_clock_says_so(moment: str, opens: str) -> None:
    hours = BERLIN.model_copy(update={"closed": (date(2026, 12, 25),)})
    assert next_open(hours, datetime.fromisoformat(moment)) == datetime.fromisoformat(opens)


@given(st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1), timezones=st.just(UTC)))
def test_the_next_opening_is_never_earlier_and_is_its_own_next_opening(moment: datetime) -> None:
    found = next_open(BERLIN, moment)
    assert found >= moment
    assert next_open(BERLIN, found) == found
    assert found - moment < timedelta(days=4)


def test_hours_that_never_come_are_refused() -> None:
    with pytest.raises(ValidationError, match="turn them round"):
        Hours(zone="Europe/Berlin", opens="17:00", closes="09:00")
    one_day = Hours(zone="Europe/Berlin", days=("mon",), closed=tuple(_mondays(60)))
    with pytest.raises(ValueError, match="holidays"):
        next_open(one_day, NOW)


def _mondays(count: int) -> list[date]:
    return [date(2026, 11, 23) + timedelta(weeks=number) for number in range(count)]


# Policy and settings.


def test_each_round_goes_to_everybody_of_that_rung_once() -> None:
    rule = GateRule(
        channels=("inbox", "mail"),
        notify=("desk",),
        ladder=(Rung(after=2, notify=("boss", "mail")), Rung(after=3, notify=("owner",))),
    )
    assert heard_by(rule, 0) == ("mail", "desk")
    assert heard_by(rule, 2) == ("mail", "desk", "boss")
    assert heard_by(rule, 9) == ("mail", "desk", "boss", "owner")


@pytest.mark.parametrize(
    ("gate", "names", "says"),
    [
        ({"notify": ("mail",)}, ("desk",), "no channel"),
        ({"ladder": ({"after": 1, "notify": ("boss",)},)}, ("desk",), "no channel"),
        ({"hours": {"zone": "Europe/Atlantis"}}, (), "time zone"),
        ({}, ("desk", "desk"), "differ"),
        ({}, ("inbox",), "differ"),
    ],
)
def test_settings_whose_channels_do_not_fit_the_policy_are_refused(
    gate: dict[str, Any], names: tuple[str, ...], says: str
) -> None:
    channels = tuple(TerminalSettings(name=name, kind="terminal") for name in names)
    with pytest.raises(ValidationError, match=says):
        Settings(policy=policy(**gate), channels=channels)


def test_expiry_runs_from_the_first_delivery_on_a_channel_that_policy_requires() -> None:
    intent = an_intent(GateRule(channels=("mail",)))
    progress = Progress()
    body = {"digest": DIGEST, "number": 1}
    inbox = {"channel": "inbox", "at": START.isoformat(), "digest": DIGEST}
    failed = {"channel": "mail", "round": 0, "reason": "away", "digest": DIGEST}
    progress.take(a_stream(("intent", body), ("delivery", inbox), ("notice_failed", failed)))
    assert progress.closes_at(intent) == intent.expires_at
    mail = inbox | {"channel": "mail", "round": 1, "at": (START + ONE).isoformat()}
    progress.take(a_stream(("delivery", mail)))
    assert progress.closes_at(intent) == START + 8 * ONE
    assert progress.notices == {(0, "mail"), (1, "mail")}


# Channels.


async def test_a_webhook_carries_digests_and_a_signature_over_time_and_body_and_no_text() -> None:
    seen: list[httpx.Request] = []

    def take(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(202)

    async with httpx.AsyncClient(transport=httpx.MockTransport(take)) as client:
        got = await Webhook(HOOK, client).send(a_notice("A secret title"), NOW)
    [request] = seen
    stamp = request.headers["Countersign-Timestamp"]
    wanted = hmac.new(KEY.get_secret_value().encode(), f"{stamp}.".encode() + request.content, hashlib.sha256)
    assert request.headers["Countersign-Signature"] == f"v1={wanted.hexdigest()}"
    assert int(stamp) == int(NOW.timestamp())
    body = json.loads(request.content)
    assert (body["digest"], body["card"]) == (DIGEST, CARD)
    assert "secret" not in request.content.decode()
    assert got == Told(at=NOW, reference=f"{DIGEST}.hook.0")
    assert signature(KEY, "1", b"x") != signature(KEY, "2", b"x")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (503, Unavailable),
        (408, Unavailable),
        (429, RateLimited),
        (401, CredentialsRejected),
        (404, ConnectorRejected),
        (302, ConnectorRejected),
    ],
)
async def test_a_webhook_that_did_not_take_it_is_no_delivery(
    status: int, error: type[CountersignError]
) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(status))
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(error):
            await Webhook(HOOK, client).send(a_notice(), NOW)


def test_a_title_cannot_put_headers_into_a_mail() -> None:
    settings = EmailSettings(name="m", kind="email", host="h", sender="a@b.test", to=("c@d.test",))
    mail = letter(a_notice("Hi\r\nBcc: eve@example.test\x00\u202e"), settings)
    assert mail["Bcc"] is None
    assert "\n" not in mail["Subject"]
    assert mail["Message-ID"] == f"<{DIGEST}.hook.0@countersign>"
    text = mail.get_content()
    assert "### What is proposed" in text
    assert f"countersign approve run-1 --digest {DIGEST}" in text


@asynccontextmanager
async def smtp(answers: dict[str, str]) -> AsyncIterator[tuple[int, list[str]]]:
    """A mail server that says yes, except to the words given."""
    said: list[str] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 here\r\n")
        in_text = False
        while line := (await reader.readline()).decode():
            said.append(line.rstrip("\r\n"))
            word = line.strip().split(":")[0].upper()
            if in_text and line != ".\r\n":
                continue
            in_text = word == "DATA" and word not in answers
            word = "MAIL FROM" if word.startswith("MAIL FROM") else word
            writer.write(f"{answers.get(word, '354 go on' if in_text else '250 yes')}\r\n".encode())
            if word == "QUIT":
                break
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], said


def email_to(port: int) -> Email:
    to = ("boss@example.test",)
    return Email(
        EmailSettings(
            name="mail", kind="email", host="127.0.0.1", port=port, sender="desk@example.test", to=to
        )
    )


async def test_a_mail_is_delivered_when_the_server_took_it() -> None:
    async with smtp({}) as (port, said):
        got = await email_to(port).send(a_notice(number=2), NOW)
    assert got == Told(at=NOW, reference=f"<{DIGEST}.hook.2@countersign>")
    assert any("Reminder 2" in line for line in said)


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"RCPT TO": "550 nobody"}, ConnectorRejected),
        ({"RCPT TO": "451 later"}, Unavailable),
        ({"MAIL FROM": "553 no"}, ConnectorRejected),
        ({"DATA": "452 full"}, Unavailable),
    ],
)
async def test_a_mail_that_was_refused_says_whether_to_try_again(
    answers: dict[str, str], error: type[CountersignError]
) -> None:
    async with smtp(answers) as (port, _):
        with pytest.raises(error):
            await email_to(port).send(a_notice(), NOW)


async def test_a_terminal_gets_one_file_for_one_notice(tmp_path: Path) -> None:
    channel = Terminal(tmp_path / "desk")
    for _ in range(2):
        got = await channel.send(a_notice(), NOW)
    [path] = (tmp_path / "desk").iterdir()
    assert (got.reference, path.read_text()) == (path.name, a_notice().text())
    assert a_notice().body() == a_notice().body()


# In a run.


@asynccontextmanager
async def answering(status: int) -> AsyncIterator[str]:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


async def bodies(stack: Any, run: Any, kind: str, channel: str) -> list[dict[str, Any]]:
    while True:
        events = [event.body for event in await stack.events(run) if event.type.value == kind]
        if found := [body for body in events if body["channel"] == channel]:
            return found
        await asyncio.sleep(0.02)


async def test_a_delivery_is_receipted_and_a_failed_one_is_an_alert_that_holds_nothing_up(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    async with answering(410) as url:
        settings = settings_for(
            temporal,
            tmp_path,
            policy=policy(channels=("desk",), notify=("hook",)),
            channels=(
                TerminalSettings(name="desk", kind="terminal"),
                WebhookSettings(name="hook", kind="webhook", url=url, token=KEY),
            ),
        )
        async with stack_of(settings) as stack:
            run = await stack.propose(a_key(), note())
            digest = await stack.digest(run)
            [delivered] = await bodies(stack, run, "delivery", "desk")
            [failed] = await bodies(stack, run, "notice_failed", "hook")
            assert (delivered["digest"], delivered["round"]) == (digest, 0)
            assert "410" in failed["reason"]
            file = tmp_path / "notices" / "desk" / delivered["reference"]
            assert f"countersign approve {run.workflow_id} --digest {digest}" in file.read_text()
            card = await stack.content.text("default", await card_of(stack, digest))
            assert card in file.read_text()
            assert (await stack.answer(run, Kind.APPROVE, digest)).counted
            assert (await run.handle.result()).status is Status.EXECUTED


async def card_of(stack: Any, digest: str) -> Ref:
    data = await stack.content.get("default", Ref(digest=digest, size=0))
    return Ref(digest=Intent.model_validate_json(data).card_digest, size=0)


class Loud(Room):
    """Channels that take a notice from a given round on, on a server whose clock jumps."""

    def __init__(
        self,
        environment: WorkflowEnvironment,
        data: Path,
        gate: GateRule,
        takes: Callable[[NoticeOrder], bool],
    ) -> None:
        data.mkdir(exist_ok=True)
        super().__init__(environment, data, gate)
        self.told: list[tuple[int, str, datetime]] = []
        self._takes = takes

    @activity.defn(name="notify")
    async def notify(self, order: NoticeOrder) -> Told:
        if not self._takes(order):
            raise ConnectorRejected("gone")
        at = await self.environment.get_current_time()
        self.told.append((order.round, order.channel, at))
        return Told(at=at, reference="x")

    async def to_the_end(self) -> tuple[Any, Any]:
        requests = Requests(self.database, self.policy, Pace(), self.clock)
        ledger = Ledger(requests, self.ledger, Intents(self.database, self.clock))
        null = Null(self.folder, self.clock)
        actor = Actor(self.database, {"null": null}, self.policy, timedelta(seconds=30), self.clock)
        decide = Worker(
            self.client,
            task_queue=Queue.DECIDE,
            workflows=[External],
            activities=[
                *(ledger.admit, ledger.record, ledger.present, ledger.conclude),
                *(Reading(self.content).read_proposal, Reminders().remind_at),
            ],
        )
        actions = [Actions(actor, self.clock).plan, self.notify]
        act = Worker(self.client, task_queue=Queue.ACT, activities=actions)
        async with decide, act:
            handle = await self.start()
            outcome = await handle.result()
        await self.catch_up()
        return handle, outcome


async def lived(handle: Any) -> timedelta:
    """By the server's clock, which may run on once nobody waits."""
    found = await handle.describe()
    return found.close_time - found.start_time


@pytest.mark.asyncio(loop_scope="module")
async def test_while_nobody_answers_more_people_hear_of_it_and_only_when_they_are_at_work(
    skipping: WorkflowEnvironment, tmp_path: Path
) -> None:
    gate = GateRule(
        expire_seconds=10 * DAY,
        remind_seconds=DAY,
        hours=BERLIN,
        notify=("mail",),
        ladder=(Rung(after=2, notify=("boss",)),),
    )
    room = Loud(skipping, tmp_path, gate, lambda order: True)
    handle, outcome = await room.to_the_end()
    assert outcome.status is Status.EXPIRED
    rounds = [(number, channel) for number, channel, _ in room.told]
    assert rounds[:2] == [(0, "mail"), (1, "mail")]
    assert sorted(rounds[2:4]) == [(2, "boss"), (2, "mail")]
    slack = timedelta(minutes=1)
    assert all(at - next_open(BERLIN, at) <= slack for number, _, at in room.told if number)
    assert all(next_open(BERLIN, at) == at for number, _, at in room.told if number)
    reminders = await room.bodies(handle, "reminder")
    deliveries = [body for body in await room.bodies(handle, "delivery") if body["channel"] != "inbox"]
    assert 6 <= len(reminders) <= 9
    assert len(deliveries) == len(room.told)
    room.database.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_expiry_waits_for_a_required_channel_and_the_absolute_limit_does_not(
    skipping: WorkflowEnvironment, tmp_path: Path
) -> None:
    gate = {"expire_seconds": 2 * DAY, "absolute_seconds": 20 * DAY, "channels": ("mail",)}
    late = Loud(
        skipping, tmp_path / "late", GateRule(**gate, remind_seconds=5 * DAY), lambda order: order.round >= 1
    )
    handle, outcome = await late.to_the_end()
    assert outcome.status is Status.EXPIRED
    assert timedelta(days=7) <= await lived(handle) < timedelta(days=7, minutes=5)
    never = Loud(skipping, tmp_path / "never", GateRule(**gate, remind_seconds=None), lambda order: False)
    handle, outcome = await never.to_the_end()
    assert outcome.status is Status.EXPIRED
    assert timedelta(days=20) <= await lived(handle) < timedelta(days=20, minutes=5)
    assert [body["reason"] for body in await never.bodies(handle, "notice_failed")] == ["gone"]
    late.database.close()
    never.database.close()
