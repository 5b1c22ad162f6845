"""Sealed payloads: the codec, the server that opens them for the UI, and a search for what leaked."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from pydantic import SecretStr
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.client import Client
from temporalio.worker import Replayer

from activities.services.vault import Keys
from activities.tiers.scripted import Scripted
from models.content import ContentSettings
from models.errors import InvalidInput, KeyMissing
from models.gate import Kind
from models.loop import Status
from models.settings import (
    CodecServerSettings,
    EncryptionSettings,
    SiteSettings,
    TemporalSettings,
    TierSettings,
)
from models.visibility import Role
from temporal.codec_server import LIMIT_BYTES, CodecServer, origins_of
from temporal.converter import SealingCodec, codec_of, data_converter, is_sealed
from temporal.plugin import CountersignPlugin
from tests.conftest import ROLES, Stack, a_key, free_port, note, settings_for, stack_of
from tests.test_agents_content import BRIEF, copywriter, draft
from workers import registry
from workers.compose import Parts
from workflows.unknown import Unknown

ON = EncryptionSettings(enabled=True)
MARKS = {
    "body": "Zwiebelmann-4711",
    "title": "Quastenflosser-4712",
    "comment": "Muckefuck-4713",
    "feedback": "Kaltmamsell-4714",
    "reasons": "Tohuwabohu-4715",
}
TOKEN = "a-token-of-the-codec-server"
UI = "http://127.0.0.1:8233"


def codec(*ids: str) -> SealingCodec:
    return SealingCodec(Keys(ids[-1], {name: name.encode().ljust(32, b".") for name in ids}))


async def test_a_value_comes_back_and_nothing_of_it_shows() -> None:
    [sealed] = await data_converter(codec("k1")).encode([{"name": "Ann"}])
    assert b"Ann" not in sealed.SerializeToString() and b"json" not in sealed.SerializeToString()
    assert sealed.metadata["encryption-key-id"] == b"k1"
    assert await data_converter(codec("k1")).decode([sealed]) == [{"name": "Ann"}]


async def test_after_a_rotation_old_payloads_open_and_new_ones_take_the_new_key() -> None:
    [old] = await codec("k1").encode([Payload(data=b"x")])
    rotated = codec("k1", "k2")
    [new] = await rotated.encode([Payload(data=b"x")])
    assert new.metadata["encryption-key-id"] == b"k2"
    assert await rotated.decode([old, new]) == [Payload(data=b"x"), Payload(data=b"x")]


async def test_two_seals_of_one_value_differ_and_sealing_twice_is_once() -> None:
    first, second = await codec("k1").encode([Payload(data=b"x"), Payload(data=b"x")])
    assert first.data != second.data
    assert await codec("k1").encode([first]) == [first]


@pytest.mark.parametrize("change", ["key", "data", "cipher text cut"])
async def test_what_does_not_open_is_named_when_it_is_read(change: str) -> None:
    [sealed] = await data_converter(codec("k1")).encode([1])
    if change == "key":
        sealed.metadata["encryption-key-id"] = b"k9"
    elif change == "data":
        sealed.data = sealed.data[:-1] + bytes([sealed.data[-1] ^ 1])
    else:
        sealed.data = sealed.data[:5]
    with pytest.raises(KeyMissing, match=r"'k[19]'.*encryption\.keys"):
        await data_converter(codec("k1")).decode([sealed], [int])


async def test_what_came_in_clear_is_read_as_it_is() -> None:
    [plain] = await data_converter().encode(["typed by a person"])
    assert await data_converter(codec("k1")).decode([plain]) == ["typed by a person"]


async def test_failure_messages_and_stack_traces_are_sealed() -> None:
    from temporalio.api.failure.v1 import Failure

    failure, converter = Failure(), data_converter(codec("k1"))
    try:
        raise InvalidInput.field("name", "Ann", "write another")
    except InvalidInput as error:
        await converter.encode_failure(error, failure)
    assert b"Ann" not in failure.SerializeToString() and failure.stack_trace == ""
    assert failure.application_failure_info.type == "InvalidInput"
    assert "Ann" in str(await converter.decode_failure(failure))


def test_there_is_no_codec_while_encryption_is_off(tmp_path: Path) -> None:
    assert codec_of(EncryptionSettings(), tmp_path) is None
    assert data_converter().payload_codec is None


@pytest.fixture
async def server() -> AsyncIterator[CodecServer]:
    settings = CodecServerSettings(port=0, token=SecretStr(TOKEN))
    made = CodecServer(codec("k1"), settings, origins_of(settings, 8233))
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def browser(server: CodecServer) -> AsyncIterator[httpx.AsyncClient]:
    address = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(base_url=address, trust_env=False, headers={"Origin": UI}) as client:
        yield client


BEARER = {"Authorization": f"Bearer {TOKEN}"}


async def sealed_body() -> dict[str, Any]:
    payloads = await data_converter(codec("k1")).encode(["secret of Ann"])
    return MessageToDict(Payloads(payloads=payloads))


async def test_the_server_opens_and_seals_for_a_bearer_in_the_shape_of_temporal(
    browser: httpx.AsyncClient,
) -> None:
    opened = await browser.post("/decode", json=await sealed_body(), headers=BEARER)
    shown = ParseDict(opened.json(), Payloads()).payloads
    assert shown[0].data == b'"secret of Ann"' and shown[0].metadata["encoding"] == b"json/plain"
    assert opened.headers["Access-Control-Allow-Origin"] == UI
    assert opened.headers["Cache-Control"] == "no-store"
    sealed = await browser.post("/encode", json=opened.json(), headers=BEARER)
    assert is_sealed(ParseDict(sealed.json(), Payloads()).payloads[0])


async def test_who_signed_in_is_known_by_a_cookie_that_is_not_the_token(browser: httpx.AsyncClient) -> None:
    own = {"Origin": str(browser.base_url).rstrip("/")}
    assert "password" in (await browser.get("/signin", headers=own)).text
    assert (await browser.post("/signin", data={"token": "wrong"}, headers=own)).status_code == 401
    signed = await browser.post("/signin", data={"token": TOKEN}, headers=own)
    cookie = signed.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
    assert (await browser.post("/decode", json=await sealed_body())).status_code == 200
    value = signed.cookies["countersign_codec"]
    browser.cookies.clear()
    wrong = {"Authorization": f"Bearer {value}"}
    assert (await browser.post("/decode", json=await sealed_body(), headers=wrong)).status_code == 401


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN])
@pytest.mark.parametrize("path", ["/decode", "/encode", "/elsewhere"])
async def test_nobody_else_gets_anything(browser: httpx.AsyncClient, path: str, header: str) -> None:
    answer = await browser.post(path, json=await sealed_body(), headers={"Authorization": header})
    assert answer.status_code == 401 and "Ann" not in answer.text


async def test_pages_of_other_origins_are_refused_even_with_the_token(browser: httpx.AsyncClient) -> None:
    for method in ("POST", "OPTIONS"):
        for origin in ("https://evil.example", "http://127.0.0.1:8234", "null", UI + ".evil.example"):
            headers = BEARER | {"Origin": origin}
            answer = await browser.request(method, "/decode", json=await sealed_body(), headers=headers)
            assert answer.status_code == 403
            assert "Access-Control-Allow-Origin" not in answer.headers


async def test_the_ui_may_ask_beforehand_and_programs_need_no_origin(browser: httpx.AsyncClient) -> None:
    before = await browser.options("/decode", headers={"Access-Control-Request-Method": "POST"})
    assert before.status_code == 204
    assert before.headers["Access-Control-Allow-Credentials"] == "true"
    del browser.headers["Origin"]
    answer = await browser.post("/decode", json=await sealed_body(), headers=BEARER)
    assert answer.status_code == 200 and "Access-Control-Allow-Origin" not in answer.headers


async def test_what_is_too_large_or_no_payloads_is_refused(browser: httpx.AsyncClient) -> None:
    async def status(**body: Any) -> int:
        return (await browser.post("/decode", headers=BEARER, **body)).status_code

    assert await status(content=b"x" * (LIMIT_BYTES + 1)) == 413
    assert await status(json={"payloads": [{}] * 2001}) == 413
    for bad in (b"", b"[]", b"{", b'{"payloads": 1}', b'{"other": []}', b"\xff"):
        assert await status(content=bad) == 400


async def test_what_does_not_open_is_shown_sealed(browser: httpx.AsyncClient) -> None:
    payloads = await data_converter(codec("k9")).encode([1])
    body = MessageToDict(Payloads(payloads=payloads))
    assert (await browser.post("/decode", json=body, headers=BEARER)).json() == body


@pytest.mark.parametrize("token", [None, "short"])
def test_the_server_wants_a_token_that_cannot_be_guessed(token: str | None) -> None:
    settings = CodecServerSettings(token=SecretStr(token) if token else None)
    with pytest.raises(InvalidInput, match="COUNTERSIGN_ENCRYPTION__SERVER__TOKEN"):
        CodecServer(codec("k1"), settings, ())


async def loop(stack: Stack) -> str:
    """A marked proposal, revised, refused in part, approved with a comment, and failed once; its history."""
    text = note(f"dear {MARKS['body']}") | {"title": f"Write to {MARKS['title']}"}
    more = {"title": f"For {MARKS['title']}", "reasons": f"because of {MARKS['reasons']}"}
    run = await stack.propose(a_key(), text, **more)
    first = await stack.digest(run)
    bad = {"digest": "0" * 64, "approver": "ann@example.test", "comment": MARKS["comment"]}
    await run.handle.signal("approve", bad)
    comment = f"yes, says {MARKS['comment']}"
    assert (await stack.answer(run, Kind.APPROVE, first, comment=comment)).counted
    assert (await run.handle.result()).status is Status.EXECUTED
    return (await run.handle.fetch_history()).to_json()


async def article(stack: Stack) -> str:
    """A brief with a marked fact becomes an article, is sent back with feedback, and is refused."""
    brief = BRIEF.replace("In winter people", f"{MARKS['body']} said so. In winter people")
    run = await draft(stack, brief.replace("Winter hours of", f"Winter hours of {MARKS['title']},"))
    first = await stack.digest(run)
    await stack.answer(run, Kind.REVISE, first, comment=f"mention {MARKS['feedback']}")
    second = await stack.digest(run, 2)
    await stack.answer(run, Kind.REJECT, second, comment=MARKS["comment"])
    assert (await run.handle.result()).status is Status.REJECTED
    return (await run.handle.fetch_history()).to_json()


def found(*texts: bytes) -> set[str]:
    """Which marks stand somewhere."""
    return {name for name, mark in MARKS.items() if any(mark.encode() in text for text in texts)}


def tables_with_marks(file: Path) -> set[str]:
    """Tables of a SQLite database with a mark in any column."""
    hit: set[str] = set()
    with sqlite3.connect(file) as link:
        link.text_factory = bytes
        names = [row[0].decode() for row in link.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        for name in names:
            rows = link.execute(f'SELECT * FROM "{name}"')
            cells = (cell for row in rows for cell in row if isinstance(cell, bytes))
            if any(found(cell) for cell in cells):
                hit.add(name)
    link.close()
    return hit


def temporal_files(factory: pytest.TempPathFactory) -> list[bytes]:
    """The dev server's database, its write-ahead log, and what it logged."""
    files = [path for path in factory.getbasetemp().glob("temporal*/*") if path.is_file()]
    assert {"temporal.db", "temporal.db-wal", "log"} <= {path.name for path in files}
    return [path.read_bytes() for path in files]


def sealed_settings(temporal: TemporalSettings, folder: Path, encryption: EncryptionSettings) -> Any:
    tier = TierSettings(name="large", kind="llama_cpp", url="http://127.0.0.1:9")
    where = SiteSettings(
        name="site",
        repository=Path("site.git"),
        build=Path("site"),
        address=f"http://127.0.0.1:{free_port()}",
        engine="plain",
    )
    limits = ContentSettings(min_words=10)
    made = settings_for(temporal, folder, tiers=(tier,), sites=(where,), content=limits)
    return made.model_copy(update={"encryption": encryption, "probe": False})


PARTS = Parts(endpoints={"large": Scripted("large", copywriter)})


async def test_with_encryption_on_a_marked_datum_stands_in_no_file(
    temporal: TemporalSettings,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    log: io.StringIO,
) -> None:
    settings = sealed_settings(temporal, tmp_path, ON)
    async with stack_of(settings, PARTS, (*ROLES, Role.DESK)) as stack:
        histories = [await loop(stack)]
        assert tables_with_marks(tmp_path / "countersign.db") == set()
        histories.append(await article(stack))
        databases = [path.read_bytes() for path in tmp_path.glob("countersign.db*")]
        assert len(databases) >= 2
        standing = tables_with_marks(tmp_path / "countersign.db")
    assert found(*temporal_files(tmp_path_factory)) == set()
    assert found(log.getvalue().encode(), *(history.encode() for history in histories)) == set()
    assert "OutputInvalid" in log.getvalue()
    assert standing == set() and found(*databases) == set()


async def test_without_encryption_the_same_search_finds_the_datum(
    temporal: TemporalSettings, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async with stack_of(sealed_settings(temporal, tmp_path, EncryptionSettings()), PARTS) as stack:
        await loop(stack)
        assert "blob" in tables_with_marks(tmp_path / "countersign.db")
        assert {"title", "comment"} <= found(*temporal_files(tmp_path_factory))


async def test_sealed_histories_replay_with_the_key_and_stop_without_it(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    async with stack_of(sealed_settings(temporal, tmp_path, ON), PARTS) as stack:
        run = await stack.propose(a_key(), note("hello"))
        await stack.approve(run)
        await run.handle.result()
        history = await run.handle.fetch_history()
    flows = [*registry.agents(), Unknown]
    with_key = CountersignPlugin(codec_of(ON, tmp_path))
    await Replayer(workflows=flows, plugins=[with_key]).replay_workflow(history)
    without = Replayer(workflows=flows, plugins=[CountersignPlugin(codec("k9"))])
    with pytest.raises(Exception) as stopped:
        await without.replay_workflow(history)
    assert "nondeterm" not in str(stopped.value).lower()


async def test_a_stranger_s_sealed_rubbish_leaves_the_loop_undisturbed(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    async with stack_of(sealed_settings(temporal, tmp_path, ON), PARTS) as stack:
        run = await stack.propose(a_key(), note("hello"))
        await stack.digest(run)
        stranger = await stranger_of(temporal)
        await stranger.get_workflow_handle(run.workflow_id).signal("approve", {"digest": "x"})
        await stack.approve(run)
        assert (await run.handle.result()).status is Status.EXECUTED
        assert (await stack.types(run)).count("refusal") == 1


async def stranger_of(temporal: TemporalSettings) -> Client:
    """A client whose key is not ours."""
    return await Client.connect(temporal.address, plugins=[CountersignPlugin(codec("foreign"))])
