"""The desk's pages and its way to answer, over real HTTP beside a real run."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast
from unittest.mock import ANY

import httpx
import pytest
from pydantic import SecretStr, ValidationError
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from activities.services import pages
from activities.services.notices import Notice
from models.canonical import sha256
from models.channels import DeskSettings
from models.errors import InvalidInput
from models.gate import Kind
from models.loop import GateRule, Status
from models.notices import NoticeOrder
from models.people import Person
from models.policy import AgentPolicy, Policy
from models.settings import Settings, TemporalSettings
from scripts.commands.session import Session
from scripts.stack import addresses, ports
from temporal.client import Started
from temporal.desk import Desk
from tests.conftest import Stack, a_key, note, settings_for, stack_of

TOKEN = "a-token-of-the-desk-0123456789"
PAGE = {"Accept": "text/html"}
ANN = "ann@example.test"
HOSTILE = (
    "<script>alert(1)</script> [click](https://evil.example) ![x](https://evil.example/x.png) &lt;\u202egnp"
)


def desk_of(stack: Stack, **changes: Any) -> Desk:
    settings = DeskSettings(**{"port": 0, "token": SecretStr(TOKEN)} | changes)
    runs = Session(stack.settings, stack.database).runs
    return Desk(stack.client, runs, stack.ledger, "default", settings, ["ann", "bob"])


@pytest.fixture
async def desk(stack: Stack) -> AsyncIterator[Desk]:
    made = desk_of(stack)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def anybody(desk: Desk) -> AsyncIterator[httpx.AsyncClient]:
    address = f"http://127.0.0.1:{desk.port}"
    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture
async def program(anybody: httpx.AsyncClient) -> httpx.AsyncClient:
    anybody.headers["Authorization"] = f"Bearer {TOKEN}"
    return anybody


@pytest.fixture
async def browser(anybody: httpx.AsyncClient) -> httpx.AsyncClient:
    anybody.headers.update(PAGE)
    anybody.headers["Origin"] = str(anybody.base_url).rstrip("/")
    assert (await anybody.post("/signin", data={"token": TOKEN})).status_code == 303
    return anybody


class Elements(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def path(run: Started, *more: str) -> str:
    return "/".join(["/runs", run.workflow_id, *more])


async def waiting(stack: Stack, text: str = "hello") -> tuple[Started, str]:
    run = await stack.propose(a_key(), note(text))
    return run, await stack.digest(run)


async def test_the_card_a_program_reads_is_byte_for_byte_the_one_that_was_bound(
    stack: Stack, program: httpx.AsyncClient
) -> None:
    run, digest = await waiting(stack, HOSTILE)
    shown = (await program.get(path(run))).json()
    [intent] = [event.body for event in await stack.events(run) if event.type.value == "intent"]
    assert (shown["waiting"], sha256(shown["card"].encode())) == (digest, intent["card"])


async def test_an_approval_that_is_posted_counts_once_and_has_its_effect(
    stack: Stack, program: httpx.AsyncClient
) -> None:
    run, digest = await waiting(stack)
    message = {"digest": digest, "approver": ANN}
    judged = await program.post(path(run, "approve"), json=message)
    assert (judged.status_code, judged.json()["counted"]) == (200, True)
    assert (await run.handle.result()).status is Status.EXECUTED
    late = await program.post(path(run, "reject"), json=message)
    assert (late.status_code, late.json()["field"]) == (409, "ID")
    assert "ended as executed" in late.json()["remedy"]
    assert (await stack.types(run))[-1] == "refusal"
    assert len(stack.notes()) == 1


async def test_a_person_reads_the_page_and_answers_with_its_form(
    stack: Stack, browser: httpx.AsyncClient
) -> None:
    run, digest = await waiting(stack)
    page = Elements((await browser.get(path(run))).text)
    hidden = {one["name"]: one["value"] for one in page.of("input") if one.get("type") == "hidden"}
    assert hidden == {"digest": digest}
    actions = [str(one["formaction"]) for one in page.of("button")]
    assert actions == [path(run, kind.value) for kind in Kind]
    sent = await browser.post(actions[1], data=hidden | {"approver": ANN, "comment": "not now", "to": ""})
    assert sent.status_code == 200
    assert "Counted" in sent.text
    assert (await run.handle.result()).status is Status.REJECTED
    again = await browser.get(actions[1], follow_redirects=True)
    assert again.url.path == path(run)
    assert Elements(again.text).of("form") == []


async def test_an_answer_to_another_digest_is_refused_on_the_page_with_what_to_do(
    stack: Stack, browser: httpx.AsyncClient
) -> None:
    run, digest = await waiting(stack)
    sent = await browser.post(path(run, "approve"), data={"digest": "0" * 64, "approver": ANN})
    assert sent.status_code == 409
    assert "Not counted: digest" in sent.text
    assert digest in sent.text
    assert stack.notes() == []


async def test_nothing_that_a_stranger_wrote_becomes_an_element_or_a_link(
    stack: Stack, browser: httpx.AsyncClient
) -> None:
    run = await stack.propose(a_key(), note(HOSTILE) | {"title": HOSTILE}, title=HOSTILE)
    await stack.digest(run)
    seen = await browser.get(path(run))
    page = Elements(seen.text)
    assert "alert(1)" in seen.text
    assert "\u202e" not in seen.text
    assert page.of("script") == page.of("img") == []
    assert [one["href"] for one in page.of("a")] == ["/"]
    assert "evil.example/x.png" not in " ".join(str(one) for _, one in page.found)
    assert seen.headers["Content-Security-Policy"] == pages.POLICY
    assert "script" not in pages.POLICY and "unsafe" not in pages.POLICY


async def test_what_waits_is_listed_for_people_and_for_programs(
    stack: Stack, program: httpx.AsyncClient
) -> None:
    run, digest = await waiting(stack)
    while not (rows := [r for r in (await program.get("/")).json() if r["workflow_id"] == run.workflow_id]):
        pass  # Temporal's own list follows a little later.
    assert rows[0]["digest"] == digest
    links = Elements((await program.get("/", headers=PAGE)).text).of("a")
    assert path(run) in [one["href"] for one in links]


async def test_who_has_no_token_reads_nothing_and_answers_nothing(
    stack: Stack, anybody: httpx.AsyncClient
) -> None:
    run, digest = await waiting(stack)
    message = {"digest": digest, "approver": ANN}
    for token in ("none", "wrong", TOKEN[:-1]):
        anybody.headers["Authorization"] = f"Bearer {token}"
        for got in (
            await anybody.get("/"),
            await anybody.get(path(run)),
            await anybody.post(path(run, "approve"), json=message),
            await anybody.post("/signin", data={"token": token}),
        ):
            assert got.status_code == 401
            assert "default" not in got.text
    assert "refusal" not in await stack.types(run)
    assert stack.notes() == []


async def test_another_sites_page_gets_nothing_even_with_the_cookie(
    stack: Stack, browser: httpx.AsyncClient
) -> None:
    run, digest = await waiting(stack)
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        form = {"digest": digest, "approver": ANN}
        sent = await browser.post(path(run, "approve"), data=form, headers={"Origin": origin})
        assert sent.status_code == 403
    assert stack.notes() == []


async def test_a_browser_is_taken_back_to_the_page_it_came_for_and_nowhere_else(
    stack: Stack, anybody: httpx.AsyncClient
) -> None:
    run, _ = await waiting(stack)
    asked = await anybody.get(path(run), headers=PAGE)
    assert asked.status_code == 303
    [hidden] = [
        one
        for one in Elements((await anybody.get(asked.headers["Location"], headers=PAGE)).text).of("input")
        if one.get("name") == "next"
    ]
    for wanted, got in (
        (hidden["value"], path(run)),
        ("https://evil.example", "/"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("/\t/evil.example", "/"),
        ("/\r\nX: y", "/"),
    ):
        signed = await anybody.post("/signin", data={"token": TOKEN, "next": wanted}, headers=PAGE)
        assert (signed.status_code, signed.headers["Location"]) == (303, got)
        cookie = signed.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and TOKEN not in cookie


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (b"", 400, "one JSON object"),
        (b"[1]", 400, "one JSON object"),
        (b'{"approver": "ann"}', 422, "digest"),
        (b'{"digest": "x", "approver": "ann"}', 422, "digest"),
        (b"\xff\xfe", 400, "one JSON object"),
        (b"[" * 60_000, 400, "one JSON object"),
        (b'"' + b"x" * 100_000 + b'"', 413, ""),
    ],
)
async def test_what_is_no_answer_is_refused_with_the_field_and_the_run_goes_on(
    stack: Stack, program: httpx.AsyncClient, sent: bytes, status: int, words: str
) -> None:
    run, _ = await waiting(stack)
    headers = {"Content-Type": "application/json"}
    got = await program.post(path(run, "approve"), content=sent, headers=headers)
    assert got.status_code == status
    assert words in got.json()["error"]
    assert (await stack.approve(run)).counted


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("application/x-www-form-urlencoded", b"token=\xff\xfe"),
        ("application/x-www-form-urlencoded; charset=nope", b"token=x"),
        ("multipart/form-data; boundary=x", b"junk"),
        ("multipart/form-data", b"junk"),
    ],
)
async def test_a_form_that_cannot_be_read_is_refused_with_a_reason(
    program: httpx.AsyncClient, kind: str, sent: bytes
) -> None:
    for place in ("/signin", "/runs/content-nothing/approve"):
        got = await program.post(place, content=sent, headers={"Content-Type": kind})
        assert got.status_code == 400 and "cannot be read" in got.json()["error"]


async def test_unknown_runs_and_unknown_answers_are_not_found(program: httpx.AsyncClient) -> None:
    message = {"digest": "0" * 64, "approver": ANN}
    for got in (
        await program.get("/runs/content-nothing"),
        await program.post("/runs/content-nothing/approve", json=message),
        await program.post("/runs/content-nothing/bless", json=message),
        await program.get("/elsewhere"),
    ):
        assert got.status_code == 404
        assert got.json()["error"]


async def test_the_runs_of_another_tenant_are_neither_shown_nor_answered(stack: Stack) -> None:
    run, digest = await waiting(stack)
    other = Session(stack.settings.model_copy(update={"tenant": "acme"}), stack.database)
    made = Desk(stack.client, other.runs, stack.ledger, "acme", DeskSettings(port=0, token=SecretStr(TOKEN)))
    await made.start()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{made.port}", headers=headers) as client:
        message = {"digest": digest, "approver": ANN}
        for got in (await client.get(path(run)), await client.post(path(run, "approve"), json=message)):
            assert got.status_code == 404
        assert run.workflow_id not in (await client.get("/")).text
    await made.close()
    assert "verdict" not in await stack.types(run)
    assert (await stack.approve(run)).counted


class Silent:
    """A Temporal that does not answer."""

    async def list_workflows(self, query: str) -> AsyncIterator[Any]:
        raise RPCError("no connection", RPCStatusCode.UNAVAILABLE, b"")
        yield


async def test_without_temporal_the_desk_says_so(stack: Stack) -> None:
    runs = Session(stack.settings, stack.database).runs
    settings = DeskSettings(port=0, token=SecretStr(TOKEN))
    made = Desk(cast(Client, Silent()), runs, stack.ledger, "default", settings)
    await made.start()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{made.port}", headers=headers) as client:
        got = await client.get("/")
        assert (got.status_code, got.json()) == (503, {"error": ANY})
    await made.close()


async def test_where_answers_must_be_signed_the_page_says_how_and_has_no_form(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    rule = GateRule(assurance="signed", remind_seconds=None)
    policy = Policy(agents={"external": AgentPolicy(connectors=("null",), gate=rule)})
    settings = settings_for(temporal, tmp_path, policy=policy, people=(Person(name="ann"),))
    async with stack_of(settings) as stack:
        run, digest = await waiting(stack)
        reading = await Session(stack.settings, stack.database).runs.read(run.workflow_id)
        text = pages.run_page(reading, ["ann"])
        assert f"--digest {digest} --as YOUR-NAME --sign KEY" in text
        assert Elements(text).of("form") == []


def test_without_a_token_there_is_no_desk_and_with_one_it_is_named_among_the_addresses() -> None:
    without, with_one = Settings(), Settings(desk=DeskSettings(token=SecretStr(TOKEN)))
    assert "desk" not in addresses(without)
    assert "desk.port" not in {port.setting for port in ports(without)}
    assert addresses(with_one)["desk"] == "http://127.0.0.1:8236"
    assert "desk.port" in {port.setting for port in ports(with_one)}


def test_a_token_that_can_be_guessed_is_refused_by_the_name_of_its_setting() -> None:
    with pytest.raises(InvalidInput, match=r"desk\.token.*COUNTERSIGN_DESK__TOKEN"):
        Desk(None, None, None, "default", DeskSettings(token=SecretStr("short")))  # type: ignore[arg-type]


def test_an_address_is_a_place_without_a_path() -> None:
    for wrong in ("desk.example.com", "https://desk.example.com/", "javascript:alert(1)"):
        with pytest.raises(ValidationError):
            DeskSettings(address=wrong)


def test_notices_name_the_page_where_there_is_a_desk() -> None:
    order = NoticeOrder(
        tenant="default", workflow_id="external-1/ä", digest="0" * 64, channel="mail", round=0
    )
    notice = Notice(
        order, "t", "card", "1" * 64, datetime(2026, 1, 1, tzinfo=UTC), "https://desk.example.com"
    )
    address = "https://desk.example.com/runs/external-1%2F%C3%A4"
    assert f"Its page: {address}\n" in notice.text()
    assert json.loads(notice.body())["page"] == address
    bare = Notice(order, "t", "card", "1" * 64, datetime(2026, 1, 1, tzinfo=UTC))
    assert "page" not in bare.text()
    assert json.loads(bare.body())["page"] == ""
