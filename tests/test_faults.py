"""Every way a model server is known to fail, on every kind: the right word each time, and never an object
that breaks its schema.
"""

import asyncio
import json

import pytest
from aiohttp import web

from activities.services.breaker import Sign, sign_of_error
from activities.services.router import Answerer
from activities.tiers.llama_cpp import LlamaCpp
from activities.tiers.openai_compatible import OpenAICompatible
from activities.tiers.schema import holds
from activities.tiers.stream import MOST_BYTES, Limits
from activities.tiers.tgi import Tgi
from activities.tiers.wire import http_client
from models.canonical import sha256
from models.errors import (
    CountersignError,
    CredentialsRejected,
    IdentityChanged,
    OutputInvalid,
    RateLimited,
    TierUnavailable,
)
from models.inference import Call, Ending, Message, Prompt, Task, TimeLimit, attempt_of
from models.loop import Ref
from models.settings import TierSettings

KINDS = {"llama_cpp": LlamaCpp, "tgi": Tgi, "openai_compatible": OpenAICompatible}
LONG, SHORT = 60.0, 0.08
SCHEMA = {
    "type": "object",
    "properties": {"risk": {"enum": ["low", "high"]}},
    "required": ["risk"],
    "additionalProperties": False,
}
GOOD = '{"risk":"low"}'
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def asking(text="Judge this."):
    return Prompt(messages=(Message(role="user", content=text),), answer_schema=SCHEMA)


def chunk(text=None, finish=None):
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


LAST = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\ndata: [DONE]\n\n"


class Faulty:
    """A model server that fails as it is told, and knows when nobody listens any more."""

    def __init__(self, *script):
        self.script = list(script)
        """Handlers of the next chat requests; the last one stays."""
        self.names = ["a-model"]
        self.chats = 0
        self.gone = asyncio.Event()
        self.never = asyncio.Event()

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get("/health", self._healthy)
        app.router.add_get("/info", self._info)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        self.never.set()
        await self._runner.cleanup()

    async def _healthy(self, request):
        return web.Response()

    async def _info(self, request):
        return web.json_response({"model_id": self.names[0]})

    async def _models(self, request):
        return web.json_response({"data": [{"id": name} for name in self.names]})

    async def _chat(self, request):
        await request.read()
        self.chats += 1
        do = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        try:
            return await do(self, request)
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise

    async def stream(self, request, *pieces):
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response


def answering(status, body="", headers=None):
    text = body if isinstance(body, str) else json.dumps(body)

    async def do(server, request):
        return web.Response(status=status, text=text, headers=headers)

    return do


def streaming(*pieces):
    async def do(server, request):
        return await server.stream(request, *pieces)

    return do


def silent_after(*pieces):
    async def do(server, request):
        response = await server.stream(request, *pieces)
        await server.never.wait()
        return response

    return do


def reset_after(*pieces):
    async def do(server, request):
        response = await server.stream(request, *pieces) if pieces else web.Response()
        request.transport.abort()
        return response

    return do


async def hang(server, request):
    await server.never.wait()
    return web.Response()


async def drip(server, request):
    response = await server.stream(request)
    while True:
        await response.write(chunk("word "))
        await asyncio.sleep(0.002)


async def flood(server, request):
    response = await server.stream(request)
    for _ in range(MOST_BYTES // 2**19 + 2):
        await response.write(b": " + b"x" * 2**19 + b"\n")
    return response


good = streaming(chunk('{"risk":'), chunk('"low"}'), chunk(finish="stop"), LAST)
ping = b": still here\n\n"
overloaded = {"error": {"message": "Model is overloaded", "type": "overloaded", "code": 429}}
broken = {"error": {"message": "Request failed during generation: x", "type": "server_error", "code": 500}}
loading = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


def inside(body):
    return streaming(chunk('{"risk":'), b"data: " + json.dumps(body).encode() + b"\n\n", b"data: [DONE]\n\n")


FAULTS = {
    "429": (answering(429, overloaded), RateLimited, Ending.OVERLOADED),
    "no credentials": (answering(401), CredentialsRejected, Ending.AUTH),
    "error inside a stream": (inside(broken), TierUnavailable, Ending.BACKEND_FAULT),
    "overloaded inside a stream": (inside(overloaded), RateLimited, Ending.OVERLOADED),
    "503 while loading": (answering(503, loading), TierUnavailable, Ending.BACKEND_FAULT),
    "connection reset": (reset_after(), TierUnavailable, Ending.BACKEND_FAULT),
    "reset in the middle": (reset_after(chunk("{")), TierUnavailable, Ending.INCOMPLETE),
    "ended in the middle": (streaming(chunk("{")), TierUnavailable, Ending.INCOMPLETE),
    "done without a reason": (
        streaming(chunk(GOOD), b"data: [DONE]\n\n"),
        TierUnavailable,
        Ending.INCOMPLETE,
    ),
    "oversize": (flood, TierUnavailable, Ending.BACKEND_FAULT),
    "a line without end": (streaming(b"data: " + b"x" * 2**21), TierUnavailable, Ending.BACKEND_FAULT),
    "empty": (streaming(chunk(finish="stop"), LAST), TierUnavailable, Ending.INCOMPLETE),
    "empty in one piece": (answering(200), TierUnavailable, Ending.BACKEND_FAULT),
    "not JSON": (streaming(b"data: <html>\n\n"), TierUnavailable, Ending.BACKEND_FAULT),
    "not JSON in one piece": (answering(200, "<html>"), TierUnavailable, Ending.BACKEND_FAULT),
    "a foreign shape": (answering(200, {"answer": GOOD}), TierUnavailable, Ending.BACKEND_FAULT),
    "no UTF-8": (streaming(b"data: \xff\xfe\n\n"), TierUnavailable, Ending.BACKEND_FAULT),
}
LATE = {
    "slow first byte": (hang, TimeLimit.FIRST_TOKEN, Limits(LONG, SHORT, LONG, LONG)),
    "kept alive without a token": (
        silent_after(ping, ping),
        TimeLimit.FIRST_TOKEN,
        Limits(LONG, SHORT, LONG, LONG),
    ),
    "stall in the middle": (
        silent_after(chunk("{"), ping),
        TimeLimit.IDLE,
        Limits(LONG, LONG, SHORT, LONG),
    ),
    "drip without end": (drip, TimeLimit.TOTAL, Limits(LONG, LONG, LONG, SHORT)),
    "hung but healthy": (hang, TimeLimit.TOTAL, Limits(LONG, LONG, LONG, SHORT)),
}
VIOLATED = {
    "schema dropped": streaming(chunk("Certainly! The risk is low."), chunk(finish="stop"), LAST),
    "half a schema": streaming(chunk('{"risk":"none"}'), chunk(finish="stop"), LAST),
    "more than the schema": streaming(chunk('{"risk":"low","x":1}'), chunk(finish="stop"), LAST),
}
TRUNCATED = streaming(chunk('{"risk":'), chunk(finish="length"), LAST)


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def connected(kind):
    """Connects an endpoint of the kind to a server."""
    clients = []

    def connect(url, limits=None, **more):
        settings = TierSettings(name="edge", kind=kind, url=url, **more)
        clients.append(http_client(settings))
        return KINDS[kind](settings, clients[-1], limits=limits)

    connect.clients = clients
    return connect


@pytest.fixture(autouse=True)
async def _closed(connected):
    yield
    for client in connected.clients:
        await client.aclose()


async def failing(tier, error=TierUnavailable):
    with pytest.raises(error) as caught:
        await tier.complete(asking())
    assert type(caught.value) is error
    attempt = attempt_of(caught.value)
    assert attempt.tier == "edge"
    return caught.value, attempt


async def test_a_good_answer_passes(connected):
    async with Faulty(good) as server:
        answer = await connected(server.url).complete(asking())
    assert (answer.text, answer.ending, answer.holds) == (GOOD, Ending.OK, True)


@pytest.mark.parametrize("case", sorted(FAULTS))
async def test_each_fault_has_its_word(connected, case):
    do, error, ending = FAULTS[case]
    async with Faulty(do, good) as server:
        tier = connected(server.url)
        _, attempt = await failing(tier, error)
        assert (attempt.ending, attempt.sent) == (ending, True)
        # The next request finds a connection that works.
        assert (await tier.complete(asking())).ending is Ending.OK


@pytest.mark.parametrize("case", sorted(LATE))
async def test_each_limit_is_told_apart_and_closes_the_connection(connected, case):
    do, limit, limits = LATE[case]
    async with Faulty(do) as server:
        tier = connected(server.url, limits)
        await tier.identity()
        _, attempt = await failing(tier)
        assert (attempt.ending, attempt.limit) == (Ending.TIMEOUT, limit)
        await asyncio.wait_for(server.gone.wait(), LONG)
        assert await tier.ready()


async def test_a_storm_of_429_is_pressure_each_time_and_no_fault(connected):
    async with Faulty(answering(429, overloaded, {"retry-after": "3"})) as server:
        tier = connected(server.url)
        for _ in range(30):
            error, attempt = await failing(tier, RateLimited)
            assert attempt.ending is Ending.OVERLOADED
            assert error.next_retry_delay.total_seconds() == 3
            assert sign_of_error(error) is Sign.PRESSURE


@pytest.mark.parametrize("case", sorted(VIOLATED))
async def test_an_answer_that_breaks_its_schema_says_so(connected, case):
    async with Faulty(VIOLATED[case]) as server:
        answer = await connected(server.url).complete(asking())
    assert (answer.ending, answer.holds) == (Ending.SCHEMA_VIOLATED, False)


async def test_a_cut_answer_is_truncated_and_not_a_violation(connected):
    async with Faulty(TRUNCATED) as server:
        answer = await connected(server.url).complete(asking())
    assert answer.ending is Ending.TRUNCATED


async def test_a_changed_identity_holds_the_tier_until_it_is_the_accepted_one_again(connected):
    async with Faulty(good) as server:
        tier = connected(server.url)
        await tier.complete(asking())
        server.names = ["another"]
        server.script = [reset_after(), good]
        await failing(tier)
        for _ in range(2):
            _, attempt = await failing(tier, IdentityChanged)
            assert (attempt.held, attempt.model) == (True, "another")
        assert server.chats == 2
        server.names = ["a-model"]
        assert (await tier.complete(asking())).ending is Ending.OK


async def test_a_wrong_model_name_is_held_before_anything_is_sent(connected):
    async with Faulty(good) as server:
        await failing(connected(server.url, model="no-such-model"), IdentityChanged)
        assert server.chats == 0


async def test_nobody_listening_costs_nothing_to_ask_again(connected, unused_tcp_port_factory):
    _, attempt = await failing(connected(f"http://127.0.0.1:{unused_tcp_port_factory()}"))
    assert (attempt.ending, attempt.sent) == (Ending.BACKEND_FAULT, False)


async def test_a_flapping_server_is_judged_anew_each_time(connected):
    words = []
    script = [good, answering(500), good, reset_after(), good, answering(429), TRUNCATED, good]
    async with Faulty(*script) as server:
        tier = connected(server.url)
        for _ in script:
            try:
                words.append((await tier.complete(asking())).ending)
            except CountersignError as error:
                words.append(attempt_of(error).ending)
    assert words == [
        Ending.OK,
        Ending.BACKEND_FAULT,
        Ending.OK,
        Ending.BACKEND_FAULT,
        Ending.OK,
        Ending.OVERLOADED,
        Ending.TRUNCATED,
        Ending.OK,
    ]


async def test_fifty_callers_at_once_that_leave_leave_nothing_behind(connected):
    async with Faulty(silent_after(chunk("{"))) as server:
        tier = connected(server.url)
        tasks = [asyncio.create_task(tier.complete(asking())) for _ in range(50)]
        while server.chats < 50:
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended)
        await asyncio.wait_for(server.gone.wait(), LONG)


class Shelf:
    """A content store in memory."""

    def __init__(self):
        self.kept = {}

    async def text(self, tenant, ref):
        return self.kept[ref.digest].decode()

    async def put(self, tenant, data, media_type="text/plain", subject=None):
        digest = sha256(data)
        self.kept[digest] = data
        return Ref(digest=digest, size=len(data), media_type=media_type)


JUDGE = Task(
    name="judge",
    prefer="small",
    structured=True,
    build=lambda inputs, params: asking(),
    check=lambda text, inputs, params: (),
)
EVERYTHING = {name: case[0] for name, case in FAULTS.items()} | VIOLATED | {"cut": TRUNCATED, "good": good}


async def test_no_object_that_breaks_its_schema_is_ever_returned(connected):
    outcomes = {}
    for name, do in EVERYTHING.items():
        shelf = Shelf()
        async with Faulty(do) as server:
            tier = connected(server.url)
            answerer = Answerer([tier.settings], {"edge": tier}, {"judge": JUDGE}, shelf)
            try:
                answered = await answerer.answer("default", Call(task="judge"), "edge")
            except CountersignError as error:
                outcomes[name] = type(error)
            else:
                outcomes[name] = None
                assert holds(await shelf.text("default", answered.text), SCHEMA)
        assert all(holds(data.decode(), SCHEMA) for data in shelf.kept.values())
    assert [name for name, outcome in outcomes.items() if outcome is None] == ["good"]
    assert {outcomes[name] for name in VIOLATED} == {OutputInvalid}
