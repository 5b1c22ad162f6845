import asyncio
import json
import socket
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.tiers import stream
from activities.tiers.llama_cpp import LlamaCpp
from activities.tiers.openai_compatible import OpenAICompatible
from activities.tiers.stream import Event, Events, Limits, TooMuch, Watch
from activities.tiers.tgi import Tgi, TgiGenerate
from activities.tiers.wire import http_client
from models.errors import InvalidInput, RateLimited, TierUnavailable
from models.inference import Ending, Message, Prompt, TimeLimit, attempt_of
from models.settings import TierSettings
from tests.tgi_stub import TgiStub

RECORDED = {
    each["name"]: each
    for each in json.loads((Path(__file__).parent / "tgi_recorded.json").read_text(encoding="utf-8"))[
        "exchanges"
    ]
}
LONG = 60.0


def asking(text="Hello there.", **more):
    return Prompt(messages=(Message(role="user", content=text),), **more)


def read(*pieces):
    events = Events()
    return [event for piece in pieces for event in events.feed(piece)]


def test_events_are_read_and_comments_are_not():
    text = b": ping\n\ndata: one\n\nevent: x\nid: 7\nretry: 1\ndata: two\ndata:three\n\n:\n\ndata: cut off"
    assert read(text) == [Event("data", "one"), Event("data", "two\nthree")]


def test_older_llama_cpp_errors_keep_their_field():
    assert read(b'error: {"code":500}\n\n') == [Event("error", '{"code":500}')]


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=5),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.data(),
)
def test_events_do_not_depend_on_how_the_bytes_were_cut(texts, end, data):
    whole = b"".join(b"data: " + text.encode() + end + b": x" + end + end for text in texts) + b"data: z"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert read(*pieces) == [Event("data", text) for text in texts]


def test_a_line_without_end_is_too_much():
    with pytest.raises(TooMuch):
        read(b"data: " + b"x" * stream.LONGEST_LINE)


async def test_a_body_larger_than_any_answer_is_too_much():
    response = httpx.Response(200, content=b"x" * 11)
    with pytest.raises(TooMuch):
        await stream.whole(response, most=10)
    assert await stream.whole(httpx.Response(200, content=b"x" * 10), most=10) == b"x" * 10


@pytest.mark.parametrize(
    ("limits", "tokens", "limit"),
    [
        (Limits(LONG, 0.01, LONG, LONG), 0, TimeLimit.FIRST_TOKEN),
        (Limits(LONG, LONG, 0.01, LONG), 1, TimeLimit.IDLE),
        (Limits(LONG, LONG, LONG, 0.01), 1, TimeLimit.TOTAL),
        (Limits(LONG, None, None, 0.01), 1, TimeLimit.TOTAL),
    ],
)
async def test_a_watch_says_which_limit_ran_out(limits, tokens, limit):
    watch = Watch(limits)
    with pytest.raises(TimeoutError):
        async with watch:
            for _ in range(tokens):
                watch.progress()
            await asyncio.Event().wait()
    assert watch.ran_out is limit


async def test_a_watch_lets_a_cancellation_through():
    started = asyncio.Event()

    async def wait():
        async with Watch(Limits(LONG, LONG, LONG, LONG)):
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


KINDS = {
    "llama_cpp": (LlamaCpp, "llama_cpp"),
    "tgi": (Tgi, "tgi"),
    "generate": (TgiGenerate, "tgi"),
    "openai_compatible": (OpenAICompatible, "openai_compatible"),
}


def chunk(text=None, finish=None, **more):
    delta = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more


USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
TIMINGS = {"prompt_ms": 1.0, "predicted_per_token_ms": 25.0}
GOOD = {
    "llama_cpp": [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]},
        chunk("Hel"),
        chunk("lo."),
        chunk(finish="stop"),
        {"choices": [], "usage": USAGE | {"prompt_tokens_details": {"cached_tokens": 2}}, "timings": TIMINGS},
    ],
    "tgi": [chunk("Hel", usage=None), chunk("lo.", "stop", usage=None), {"choices": [], "usage": USAGE}],
    "generate": [
        {"index": 1, "token": {"id": 1, "text": "Hel", "logprob": -0.5, "special": False}, "details": None},
        {
            "index": 2,
            "token": {"id": 2, "text": "<|im_end|>", "logprob": -0.1, "special": True},
            "generated_text": "Hello.",
            "details": {"finish_reason": "eos_token", "generated_tokens": 3, "input_length": 5},
        },
    ],
    "openai_compatible": [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        chunk("Hel"),
        chunk("lo.", "stop"),
        {"choices": [], "usage": USAGE},
    ],
}


def sse(events, done=True):
    text = ": keep-alive\n\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return text + ("data: [DONE]\n\n" if done else "")


def streaming(kind, text, tokens=True):
    adapter, server = KINDS[kind]
    settings = TierSettings(name="edge", kind=server, url="http://model")
    counts = {
        "/info": {"model_id": "m"},
        "/v1/models": {"data": [{"id": "m"}]},
        "/apply-template": {"prompt": "templated"},
        "/tokenize": [1, 2] if server == "tgi" else {"tokens": [1, 2], "count": 2},
        "/chat_tokenize": {"templated_text": "templated", "tokenize_response": [1, 2, 3]},
    }

    def handler(request):
        if request.url.path in counts and (tokens or request.method == "GET"):
            return httpx.Response(200, json=counts[request.url.path])
        if request.url.path in counts:
            return httpx.Response(404)
        return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})

    return adapter(settings, http_client(settings, httpx.MockTransport(handler)))


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return request.param


def without_usage(kind):
    if kind == "generate":
        last = GOOD[kind][-1] | {"details": {"finish_reason": "eos_token"}}
        return [GOOD[kind][0], last]
    return [{name: value for name, value in event.items() if name != "usage"} for event in GOOD[kind]]


async def failure(endpoint, error=TierUnavailable, prompt=None):
    with pytest.raises(error) as caught:
        await endpoint.complete(prompt or asking())
    attempt = attempt_of(caught.value)
    assert attempt is not None
    assert attempt.tier == "edge"
    return attempt.ending


async def test_a_stream_is_one_answer_with_usage_and_timing(kind):
    answer = await streaming(kind, sse(GOOD[kind])).complete(asking())
    assert (answer.text, answer.finish, answer.usage) == ("Hello.", "stop", "reported")
    assert (answer.prompt_tokens, answer.completion_tokens) == (5, 3)
    assert answer.timing.first_token_milliseconds is not None
    assert answer.timing.microseconds_per_token is not None
    assert answer.ending is Ending.OK


async def test_llama_cpp_says_what_it_reused_and_how_long_a_token_took():
    answer = await streaming("llama_cpp", sse(GOOD["llama_cpp"])).complete(asking())
    assert answer.cached_tokens == 2
    assert answer.timing.microseconds_per_token == 25_000
    assert answer.timing.queue_milliseconds is not None


async def test_without_usage_the_servers_own_tokenizer_counts(kind):
    answer = await streaming(kind, sse(without_usage(kind))).complete(asking())
    assert answer.usage == "counted"
    prompt = 3 if kind in ("tgi", "generate") else 2
    assert (answer.prompt_tokens, answer.completion_tokens) == (prompt, 2)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"generate"}))
async def test_without_usage_and_tokenizer_there_is_no_answer(kind):
    assert await failure(streaming(kind, sse(without_usage(kind)), tokens=False)) is Ending.BACKEND_FAULT


async def test_a_stream_that_ends_without_a_reason_is_incomplete(kind):
    assert await failure(streaming(kind, sse(GOOD[kind][:1]))) is Ending.INCOMPLETE
    assert await failure(streaming(kind, sse(GOOD[kind][:-1][:1], done=False))) is Ending.INCOMPLETE
    assert await failure(streaming(kind, "")) is Ending.INCOMPLETE


async def test_an_event_cut_off_in_the_middle_is_not_read(kind):
    text = sse(GOOD[kind], done=False)
    keep = text.index(json.dumps(GOOD[kind][-1 if kind == "generate" else -2 if "llama" in kind else 1])) + 9
    assert await failure(streaming(kind, text[:keep])) is Ending.INCOMPLETE


async def test_what_is_no_json_in_a_stream_is_a_fault(kind):
    assert await failure(streaming(kind, "data: <html>\n\n")) is Ending.BACKEND_FAULT
    assert await failure(streaming(kind, "data: [1]\n\n")) is Ending.BACKEND_FAULT


IN_BAND = {
    "overloaded": ("Model is overloaded", RateLimited, Ending.OVERLOADED),
    "generation": (
        "Request failed during generation: Server error",
        TierUnavailable,
        Ending.BACKEND_FAULT,
    ),
    "incomplete": ("Incomplete generation stream", TierUnavailable, Ending.INCOMPLETE),
    "too long": (
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048.",
        InvalidInput,
        Ending.TOO_LONG,
    ),
    "invalid": ("Input validation error: `top_p` must be > 0.0", InvalidInput, Ending.INVALID_REQUEST),
    "template": ("Template error: no such turn", InvalidInput, Ending.INVALID_REQUEST),
    "unknown": ("Something else", TierUnavailable, Ending.BACKEND_FAULT),
}


@pytest.mark.parametrize("case", sorted(IN_BAND))
@pytest.mark.parametrize("native", [False, True])
async def test_tgi_errors_inside_a_stream_are_told_apart_by_their_message(case, native):
    message, error, ending = IN_BAND[case]
    body = (
        {"error": message, "error_type": "x"}
        if native
        else {"error": {"message": message, "http_status_code": 422}}
    )
    tier = streaming("generate" if native else "tgi", sse([GOOD["tgi"][0], body] if not native else [body]))
    assert await failure(tier, error) is ending


@pytest.mark.parametrize(
    ("kind", "text", "error", "ending"),
    [
        (
            "llama_cpp",
            'data: {"error":{"code":500,"message":"slot died","type":"server_error"}}\n\n',
            TierUnavailable,
            Ending.BACKEND_FAULT,
        ),
        (
            "llama_cpp",
            'error: {"code":400,"message":"exceeds the context size","type":"exceed_context_size_error"}\n\n',
            InvalidInput,
            Ending.TOO_LONG,
        ),
        (
            "openai_compatible",
            'data: {"error":{"message":"engine dead","type":"InternalServerError","code":500}}\n\n',
            TierUnavailable,
            Ending.BACKEND_FAULT,
        ),
        (
            "openai_compatible",
            'data: {"object":"error","message":"maximum context length is 9","code":400}\n\n',
            InvalidInput,
            Ending.TOO_LONG,
        ),
        (
            "openai_compatible",
            'data: {"error":{"message":"queue full","type":"x","code":429}}\n\n',
            RateLimited,
            Ending.OVERLOADED,
        ),
    ],
)
async def test_errors_inside_other_streams_go_by_their_code_and_words(kind, text, error, ending):
    assert await failure(streaming(kind, text), error) is ending


@pytest.mark.parametrize(
    ("name", "kind", "text", "tokens"),
    [("chat_stream", "tgi", "To turn the stove", 8), ("chat", "tgi", "The kettle", 9)],
)
async def test_recorded_tgi_answers_are_read(name, kind, text, tokens):
    answer = await replayed(kind, name).complete(asking())
    assert answer.completion_tokens == tokens
    assert answer.prompt_tokens == 41
    assert answer.text.startswith(text.split()[0])


async def test_recorded_queue_time_comes_with_an_answer_in_one_piece():
    timing = (await replayed("tgi", "chat").complete(asking())).timing
    assert (timing.queue_milliseconds, timing.microseconds_per_token) == (6, 41_000)


async def test_recorded_native_answers_are_read():
    whole = await replayed("generate", "generate_details").complete(asking())
    assert (whole.text, whole.finish) == (" Paris and the Euro is officially", "length")
    assert len(whole.chances) == 6
    # Recorded without details, so nothing says why it ended; it is not taken for whole.
    streamed = await replayed("generate", "generate_stream").complete(asking())
    assert (streamed.text, streamed.finish, streamed.usage) == (" Paris.", "length", "counted")


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("chat_logprobs", Ending.INVALID_REQUEST),
        ("chat_openai_json_schema", Ending.INVALID_REQUEST),
        ("chat_top_p_one", Ending.INVALID_REQUEST),
        ("chat_too_long", Ending.TOO_LONG),
        ("chat_no_messages", Ending.INVALID_REQUEST),
        ("malformed_json", Ending.INVALID_REQUEST),
        ("not_found", Ending.BACKEND_FAULT),
    ],
)
async def test_recorded_tgi_refusals_have_their_ending(name, ending):
    error = TierUnavailable if ending is Ending.BACKEND_FAULT else InvalidInput
    assert await failure(replayed("tgi", name), error) is ending


async def test_recorded_counts_come_from_tgis_own_tokenizer():
    tier = replayed("tgi", "chat")
    assert await tier.prompt_tokens(asking()) == 41
    assert await tier.text_tokens("Hello world 42") == 5
    assert (await tier.context(), await tier.slots()) == (2048, 8)


def replayed(kind, name):
    """A server that answers as the recorded one did."""
    adapter, server = KINDS[kind]
    settings = TierSettings(name="edge", kind=server, url="http://model")
    own = {"/info": "info", "/tokenize": "tokenize", "/chat_tokenize": "chat_tokenize"}

    def handler(request):
        answer = RECORDED[own.get(request.url.path, name)]["response"]
        headers = {key: value for key, value in answer["headers"].items() if key != "content-length"}
        return httpx.Response(answer["status"], content=answer["body"], headers=headers)

    return adapter(settings, http_client(settings, httpx.MockTransport(handler)))


@pytest.mark.parametrize("kind", ["tgi", "generate"])
async def test_cancelling_a_call_closes_its_connection(kind):
    async with TgiStub() as stub:
        stub.hold = asyncio.Event()
        settings = TierSettings(name="edge", kind="tgi", url=stub.url)
        async with http_client(settings) as client:
            task = asyncio.create_task(KINDS[kind][0](settings, client).complete(asking("one two three")))
            while not stub.running:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(stub.gone.wait(), LONG)
    assert stub.running == 0


async def test_a_connection_is_used_again_after_a_stream():
    async with TgiStub() as stub:
        settings = TierSettings(name="edge", kind="tgi", url=stub.url)
        async with http_client(settings) as client:
            tier = Tgi(settings, client)
            for _ in range(3):
                await tier.complete(asking())
        ports = {asked.port for asked in stub.requests}
    assert len(ports) == 1


async def test_a_server_that_does_not_accept_in_time_is_a_connect_timeout():
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        settings = TierSettings(name="edge", kind="tgi", url=f"http://127.0.0.1:{deaf.getsockname()[1]}")
        async with http_client(settings.model_copy(update={"connect_seconds": 0.05})) as client:
            with pytest.raises(TierUnavailable) as caught:
                await Tgi(settings, client).complete(asking())
    attempt = attempt_of(caught.value)
    assert (attempt.ending, attempt.limit, attempt.sent) == (Ending.TIMEOUT, TimeLimit.CONNECT, False)
