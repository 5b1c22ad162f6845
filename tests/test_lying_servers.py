"""Model servers that lie, over real sockets: an answer or an error of ours, in little memory."""

import asyncio
import gzip
import json
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from activities.services.questions import schema_objections
from activities.tiers.embeddings import Embeddings
from activities.tiers.kinds import chat_endpoint
from activities.tiers.schema import holds
from activities.tiers.wire import http_client
from models.errors import CredentialsRejected, MemoryUnavailable, RateLimited, TierUnavailable
from models.inference import Ending, Message, Prompt, attempt_of
from models.memory import EmbeddingSettings
from models.settings import TierSettings

ANSWER = "The door code is 4711."
ASKED = Prompt(messages=(Message(role="user", content="What is the code?"),), max_tokens=32)
FACTS = {
    "/apply-template": {"prompt": "templated"},
    "/tokenize": {"tokens": [1, 2, 3], "count": 3},
}
STREAM = "content-type: text/event-stream\r\n"


class Liar:
    """Answers facts as it should, and everything else with the very bytes it was given."""

    def __init__(self, raw: bytes, name: str = "m") -> None:
        self.raw = raw
        self.facts = FACTS | {"/v1/models": {"data": [{"id": name}]}, "/info": {"model_id": name}}
        self.heads: list[str] = []

    async def __call__(self, reader, writer) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            for line in head.lower().splitlines():
                if line.startswith("content-length:"):
                    await reader.readexactly(int(line.partition(":")[2]))
            fact = self.facts.get(head.split(" ")[1])
            whole = json.dumps(fact).encode()
            writer.write(http(whole, "content-type: application/json\r\n") if fact else self.raw)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


def http(body: bytes, headers: str = "", status: str = "200 OK", length: int | None = None) -> bytes:
    said = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {said}\r\n{headers}\r\n"
    return head.encode("latin-1") + body


def sse(*events) -> bytes:
    parts = [event if isinstance(event, bytes) else json.dumps(event).encode() for event in events]
    return b"".join(b"data: " + part + b"\n\n" for part in parts) + b"data: [DONE]\n\n"


def words(text: str, finish=None, **more) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish} | more]}


def usage(prompt=5, answer=3, **more) -> dict:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": answer}, **more}


GOOD = sse(words(ANSWER, "stop"), usage())


@asynccontextmanager
async def lying(raw: bytes, kind: str = "llama_cpp", name: str = "m"):
    liar = Liar(raw, name)
    async with await asyncio.start_server(liar, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        settings = TierSettings(name="edge", kind=kind, url=url)
        async with http_client(settings) as client:
            yield chat_endpoint(settings, client), liar


async def failure(raw: bytes, error=TierUnavailable, kind: str = "llama_cpp"):
    async with lying(raw, kind) as (tier, _):
        with pytest.raises(error) as caught:
            await tier.complete(ASKED)
    assert "4711" not in str(caught.value)
    assert attempt_of(caught.value) is not None
    return caught.value


async def answer(raw: bytes, kind: str = "llama_cpp"):
    async with lying(raw, kind) as (tier, _):
        return await tier.complete(ASKED)


NO_HTTP = {
    "no status line": GOOD,
    "a status that is none": b"HTTP/1.1 abc OK\r\n\r\n" + GOOD,
    "a length below nothing": http(GOOD, STREAM, length=-5),
    "two lengths": http(GOOD, STREAM + "content-length: 5\r\n"),
    "a length and chunks": http(GOOD, STREAM + "transfer-encoding: chunked\r\n"),
    "a header without end": http(GOOD, f"x: {'4711' * 4096}\r\n"),
    "bytes that are no header": http(GOOD, "x: \xff\x00 4711\r\n"),
    "a chunk of no size": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz4711\r\n",
}


@pytest.mark.parametrize("kind", ["llama_cpp", "tgi", "openai_compatible"])
@pytest.mark.parametrize("what", NO_HTTP)
async def test_bytes_that_are_no_http_are_an_outage_and_are_not_quoted(kind, what):
    error = await failure(NO_HTTP[what], kind=kind)
    assert attempt_of(error).ending is Ending.BACKEND_FAULT
    assert attempt_of(error).sent


async def test_a_frame_that_breaks_after_the_first_token_is_an_answer_cut_off():
    part = sse(words("The door code is 4711"))
    broken = f"HTTP/1.1 200 OK\r\n{STREAM}transfer-encoding: chunked\r\n\r\n{len(part):x}\r\n".encode()
    for after in (b"\r\nnonsense\r\n", b"\r\n-5\r\n", b""):
        error = await failure(broken + part + after)
        assert attempt_of(error).ending in (Ending.INCOMPLETE, Ending.BACKEND_FAULT)


async def test_an_answer_shorter_than_its_length_is_whole_only_when_it_says_so():
    assert (await answer(http(GOOD, STREAM, length=len(GOOD) + 99))).text == ANSWER
    cut = GOOD[: GOOD.index(b"data: [DONE]")]
    assert attempt_of(await failure(http(cut, STREAM, length=len(GOOD)))).ending is Ending.INCOMPLETE


async def test_nothing_packed_is_asked_for_or_unpacked():
    bomb = gzip.compress(gzip.compress(bytes(8 * 2**20)))
    for packing in ("gzip, gzip", "gzip", "br", "zstd", "deflate"):
        for status in ("200 OK", "500 no"):
            await failure(http(bomb, f"{STREAM}content-encoding: {packing}\r\n", status))
    async with lying(http(GOOD, STREAM + "content-encoding: identity\r\n")) as (tier, liar):
        assert (await tier.complete(ASKED)).text == ANSWER
    assert all("accept-encoding: identity\r\n" in head.lower() for head in liar.heads)


async def test_a_redirect_is_not_followed():
    for status in ("301 Moved", "302 Found", "307 Temporary", "308 Permanent"):
        async with lying(http(b"", "location: http://169.254.169.254/\r\n", status)) as (tier, liar):
            with pytest.raises(TierUnavailable):
                await tier.complete(ASKED)
            assert len(liar.heads) == 2


@pytest.mark.parametrize(("status", "error"), [("429 Full", RateLimited), ("401 No", CredentialsRejected)])
@pytest.mark.parametrize(
    "page",
    [
        lambda status: http(b"<p>4711</p>" * 9000, "retry-after: 3\r\n", status),
        lambda status: http(b"4711", "retry-after: 3\r\n", status, length=999),
        lambda status: http(gzip.compress(b"4711"), "content-encoding: gzip\r\nretry-after: 3\r\n", status),
    ],
)
async def test_a_refusal_goes_by_its_status_whatever_its_page_is_like(status, error, page):
    assert (await failure(page(status), error)).next_retry_delay == timedelta(seconds=3)


@pytest.mark.parametrize(
    ("wish", "wait"),
    [
        ("-5", None),
        ("1e5", None),
        ("nan", None),
        ("\xff\xfe", None),
        ("9" * 5000, 3600),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
        ("Mon, 01 Jan 2027 00:00:00 +99999999999999999999", None),
        ("99 Foo 2027 99:99:99", None),
    ],
)
async def test_an_absurd_wish_to_be_left_alone_is_no_error_of_its_own(wish, wait):
    error = await failure(http(b"", f"retry-after: {wish}\r\n", "429 Full"), RateLimited)
    assert error.next_retry_delay == (None if wait is None else timedelta(seconds=wait))


@pytest.mark.parametrize("wrong", [-1, 2**31, 2**63, 10**400, True, 1.5, "7", None, [1]])
async def test_what_is_no_count_is_none(wrong):
    for said in (usage(prompt=wrong), usage(answer=wrong)):
        await failure(http(sse(words(ANSWER, "stop"), said), STREAM))


async def test_a_text_written_in_no_tokens_is_counted_and_not_free():
    said = await answer(http(sse(words(ANSWER, "stop"), usage(0, 0)), STREAM))
    assert (said.usage, said.prompt_tokens, said.completion_tokens) == ("counted", 3, 3)


@pytest.mark.parametrize(
    "wrong", [b"1e400", b"-1e400", b"NaN", b"Infinity", b"1" + b"0" * 400, b'"x"', b"[]"]
)
async def test_timings_that_are_none_are_left_out(wrong):
    told = b'{"choices":[],"timings":{"prompt_ms":%b,"predicted_per_token_ms":%b},"usage":%b}' % (
        wrong,
        wrong,
        json.dumps(usage()["usage"]).encode(),
    )
    assert (await answer(http(sse(words(ANSWER, "stop"), told), STREAM))).text == ANSWER
    whole = usage() | {"choices": [{"message": {"content": ANSWER}, "finish_reason": "stop"}]}
    headers = (
        f"content-type: application/json\r\nx-queue-time: {wrong.decode()}\r\nx-time-per-token: 1e999\r\n"
    )
    assert (await answer(http(json.dumps(whole).encode(), headers), "tgi")).text == ANSWER


@pytest.mark.parametrize("wrong", [b"1e400", b"-1e400", b"NaN", b"1" + b"0" * 400, b"null"])
async def test_chances_that_are_no_numbers_are_no_answer(wrong):
    chance = b'{"token":"a","logprob":%b,"top_logprobs":[{"logprob":%b},{"logprob":-3}]}' % (wrong, wrong)
    event = b'{"choices":[{"delta":{"content":"a"},"finish_reason":"stop","logprobs":{"content":[%b]}}]}'
    await failure(http(sse(event % chance, usage()), STREAM))


async def test_half_a_character_is_no_text_and_two_halves_are_one():
    halves = (b'{"choices":[{"delta":{"content":"a\\ud83d"}}]}', words("\ude00", "stop"))
    assert (await answer(http(sse(*halves, usage()), STREAM))).text == "a\U0001f600"
    await failure(http(sse(halves[0], words(" 4711", "stop"), usage()), STREAM))


@pytest.mark.parametrize(
    "text",
    [
        '{"price": 1, "price": 2}',
        '{"price": 1, "in": {"a": 1, "a": 1}}',
        '{"price": 1e400}',
        '{"price": -1e400}',
        '{"price": NaN}',
        '{"price": 1, "name": "\\ud800"}',
        '{"price": 1, "\\udc00": 1}',
        '{"price": 1, "in": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"price": ' + "9" * 5000 + "}",
    ],
)
def test_json_that_readers_may_take_differently_or_cannot_keep_is_none(text):
    schema = {"type": "object", "properties": {"price": {"type": "number"}}, "required": ["price"]}
    assert not holds(text, schema)
    assert schema_objections(text, schema) == ("it is not valid JSON, in which every name stands once",)
    good = '{"price": 1.5, "name": "\\ud83d\\ude00", "in": {"price": 2}}'
    assert holds(good, schema)
    assert schema_objections(good, schema) == ()


@pytest.mark.parametrize("kind", ["llama_cpp", "tgi", "openai_compatible"])
@pytest.mark.parametrize("name", ["\ud800", "m\x00", "m\n", "m" * 501])
async def test_a_name_that_no_record_can_keep_is_no_models_name(kind, name):
    async with lying(http(GOOD, STREAM), kind, name) as (tier, liar):
        with pytest.raises(TierUnavailable):
            await tier.complete(ASKED)
        assert len(liar.heads) == 1
    async with lying(http(GOOD, STREAM), kind, "/models/größe 1.gguf") as (tier, _):
        assert (await tier.complete(ASKED)).model == "/models/größe 1.gguf"


@asynccontextmanager
async def embedding(raw: bytes):
    async with await asyncio.start_server(Liar(raw), "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        settings = EmbeddingSettings(url=url, model="m", dimensions=4)
        async with http_client(settings) as client:
            yield Embeddings(settings, client)


@pytest.mark.parametrize("wrong", [b"NaN", b"1e400", b"1e154", b"1e300", b"1" + b"0" * 400, b"null", b'"1"'])
async def test_vectors_of_anything_but_numbers_are_memory_that_is_away(wrong):
    row = b'{"model":"m","data":[{"index":0,"embedding":[%b,%b,%b,%b]}]}' % (wrong, wrong, wrong, wrong)
    async with embedding(http(row, "content-type: application/json\r\n")) as embedder:
        with pytest.raises(MemoryUnavailable):
            await embedder.embed(["x"])


@pytest.mark.parametrize("what", NO_HTTP)
async def test_an_embedding_server_that_speaks_no_http_is_away(what):
    async with embedding(NO_HTTP[what]) as embedder:
        with pytest.raises(MemoryUnavailable) as caught:
            await embedder.embed(["x"])
        assert "4711" not in str(caught.value)
        assert not await embedder.ready()


async def test_of_a_health_page_only_the_status_is_read():
    endless = http(b"x" * 2**16, length=2**40)
    async with embedding(endless) as embedder, lying(endless) as (tier, _):
        assert await embedder.ready()
        assert await tier.ready()
