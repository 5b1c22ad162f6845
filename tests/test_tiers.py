import asyncio
import json
from collections import deque
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from aiohttp import web
from jsonschema import validate
from pydantic import ValidationError

from activities.tiers.kinds import embedder
from activities.tiers.llama_cpp import LlamaCpp
from activities.tiers.openai_compatible import OpenAICompatible
from activities.tiers.scripted import Scripted
from activities.tiers.tgi import Tgi
from activities.tiers.wire import http_client
from models.errors import (
    CredentialsRejected,
    IdentityChanged,
    InvalidInput,
    MemoryUnavailable,
    OutputInvalid,
    RateLimited,
    TierUnavailable,
)
from models.inference import Completion, Ending, Message, Prompt, attempt_of
from models.memory import EmbeddingSettings
from models.settings import Settings, TierSettings
from models.tokens import prompt_tokens, tokens_from_above
from tests import tgi_stub
from tests.model_servers import model_server
from tests.tgi_stub import CHAT, TgiStub, described

KINDS = {"llama_cpp": LlamaCpp, "tgi": Tgi, "openai_compatible": OpenAICompatible}
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 3, "maxLength": 60},
        "risk": {"enum": ["low", "high"]},
    },
    "required": ["title", "risk"],
    "additionalProperties": False,
}
MODELS = {"object": "list", "data": [{"id": "a-model"}]}
INFO = {"model_id": "a-model", "model_sha": "abc"}
GOOD = {
    "model": "whatever-was-sent",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
}
SECRET = "the-prompt-nobody-may-see"


def asking(text=SECRET, **more):
    return Prompt(messages=(Message(role="user", content=text),), **more)


def with_choice(**change):
    return GOOD | {"choices": [GOOD["choices"][0] | change]}


def endpoint(kind, handler, **more):
    settings = TierSettings(name="edge", kind=kind, url="http://model", **more)

    def whole(request):
        if request.url.path in ("/v1/models", "/info"):
            return httpx.Response(200, json=MODELS if request.url.path == "/v1/models" else INFO)
        return handler(request)

    return KINDS[kind](settings, http_client(settings, httpx.MockTransport(whole)))


def saying(kind, status, body, headers=None):
    content = body if isinstance(body, str) else json.dumps(body)
    return endpoint(kind, lambda _: httpx.Response(status, content=content, headers=headers))


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return request.param


async def test_a_good_answer_carries_the_servers_own_identity_and_counts(kind):
    answer = await saying(kind, 200, GOOD).complete(asking())
    assert (answer.text, answer.finish) == ("Hello.", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (5, 2)
    assert answer.model == ("a-model@abc" if kind == "tgi" else "a-model")


async def test_a_cut_answer_says_length(kind):
    assert (
        await saying(kind, 200, with_choice(finish_reason="length")).complete(asking())
    ).finish == "length"


REFUSALS = {
    "full": (429, {"error": "Model is overloaded", "error_type": "overloaded"}, RateLimited),
    "full without a word": (429, "", RateLimited),
    "no credentials": (401, "", CredentialsRejected),
    "wrong credentials": (
        403,
        {"error": {"message": "no", "type": "authentication_error"}},
        CredentialsRejected,
    ),
    "bad request": (400, {"error": {"message": SECRET, "type": "invalid_request_error"}}, InvalidInput),
    "refused by validation": (422, {"error": SECRET, "error_type": "validation"}, InvalidInput),
    "refused in plain text": (422, f"Failed to deserialize {SECRET}", InvalidInput),
    "too large": (413, "", InvalidInput),
    "timeout of its own": (408, "", TierUnavailable),
    "failed generation": (424, {"error": SECRET, "error_type": "generation"}, TierUnavailable),
    "incomplete": (500, {"error": "Incomplete generation", "error_type": "incomplete"}, TierUnavailable),
    "broken": (502, "<html>Bad gateway</html>", TierUnavailable),
    "loading": (503, {"error": {"message": "Loading model", "type": "unavailable_error"}}, TierUnavailable),
    "wrong address": (404, "", TierUnavailable),
    "moved": (302, "", TierUnavailable),
    "200 with error": (200, {"error": {"message": SECRET, "type": "server_error"}}, TierUnavailable),
    "200 that is no JSON": (200, "OK", TierUnavailable),
    "200 that is a list": (200, [], TierUnavailable),
    "200 without choices": (200, GOOD | {"choices": []}, TierUnavailable),
    "200 with a strange finish": (200, with_choice(finish_reason="content_filter"), TierUnavailable),
    "200 without usage": (200, {"choices": GOOD["choices"]}, TierUnavailable),
    "200 with an empty answer": (
        200,
        with_choice(message={"role": "assistant", "content": " \n"}),
        TierUnavailable,
    ),
    "200 with no text": (200, with_choice(message={"role": "assistant", "content": None}), TierUnavailable),
}


@pytest.mark.parametrize("case", sorted(REFUSALS))
async def test_every_refusal_maps_to_one_error_without_the_prompt(kind, case):
    status, body, error = REFUSALS[case]
    with pytest.raises(error) as caught:
        await saying(kind, status, body).complete(asking())
    assert type(caught.value) is error
    assert "edge" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError])
async def test_no_answer_is_tier_unavailable(kind, error):
    def handler(request):
        raise error(SECRET)

    with pytest.raises(TierUnavailable, match=f"edge: no answer.*{error.__name__}") as caught:
        await endpoint(kind, handler).complete(asking())
    assert SECRET not in str(caught.value)


async def test_the_whole_call_has_one_deadline(kind):
    async def handler(request):
        await asyncio.Event().wait()

    slow = endpoint(kind, handler, timeout_seconds=1)
    with pytest.raises(TierUnavailable, match="TimeoutError"):
        await slow.complete(asking())


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("7", 7, 7), ("99999", 3600, 3600), ("", None, None), ("soon", None, None), ("date", 500, 600)],
)
async def test_retry_after_is_handed_on_up_to_an_hour(kind, header, least, most):
    if header == "date":
        header = format_datetime(datetime.now(UTC) + timedelta(seconds=600), usegmt=True)
    with pytest.raises(RateLimited) as caught:
        await saying(kind, 429, "", {"retry-after": header}).complete(asking())
    delay = caught.value.next_retry_delay
    if least is None:
        assert delay is None
    else:
        assert timedelta(seconds=least) <= delay <= timedelta(seconds=most)


TOO_LONG = {
    "llama_cpp": (400, {"error": {"message": "exceeds", "type": "exceed_context_size_error"}}),
    "tgi": (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048."}),
    "openai_compatible": (
        400,
        {"object": "error", "message": "This model's maximum context length is 4096 tokens.", "code": 400},
    ),
}
NO_SCHEMA = {
    "llama_cpp": (400, {"error": {"message": "JSON schema error at #/a", "type": "invalid_request_error"}}),
    "tgi": (422, {"error": "Input validation error: grammar is not supported", "error_type": "validation"}),
    "openai_compatible": (
        400,
        {
            "error": {
                "message": "Invalid JSON schema: no such keyword",
                "type": "BadRequestError",
                "code": 400,
            }
        },
    ),
}


async def test_a_prompt_that_is_too_long_is_named_as_such(kind):
    with pytest.raises(InvalidInput, match="longer than the server's context"):
        await saying(kind, *TOO_LONG[kind]).complete(asking())


async def test_too_long_sent_as_a_server_error_is_still_no_outage():
    body = {"error": {"message": "the request exceeds the available context size", "type": "server_error"}}
    with pytest.raises(InvalidInput):
        await saying("llama_cpp", 500, body).complete(asking())


async def test_a_schema_the_server_cannot_honour_is_output_invalid(kind):
    with pytest.raises(OutputInvalid, match="schema"):
        await saying(kind, *NO_SCHEMA[kind]).complete(asking(answer_schema=SCHEMA))


async def test_the_same_words_without_a_schema_are_invalid_input(kind):
    with pytest.raises(InvalidInput):
        await saying(kind, *NO_SCHEMA[kind]).complete(asking())


async def test_a_loading_llama_cpp_says_when_to_ask_again():
    body = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    with pytest.raises(TierUnavailable, match="loads its model") as caught:
        await saying("llama_cpp", 503, body).complete(asking())
    assert caught.value.next_retry_delay is not None


def naming(kind, names, down, now, **more):
    """A tier whose server calls its model by the next name each time it is asked."""

    def handler(request):
        if down[0]:
            raise httpx.ConnectError("down")
        if request.url.path == "/v1/chat/completions":
            return httpx.Response(200, json=GOOD | {"model": "tgi"})
        name = names.popleft() if len(names) > 1 else names[0]
        return httpx.Response(200, json={"data": [{"id": name}], "model_id": name, "model_sha": "abc"})

    settings = TierSettings(name="edge", kind=kind, url="http://model", **more)
    return KINDS[kind](settings, http_client(settings, httpx.MockTransport(handler)), lambda: now[0])


async def test_identity_is_asked_again_after_a_while_and_after_an_outage(kind):
    # llama.cpp names its model in answers, and the one named here is another, so it is asked each time.
    names, now, down = deque(["one"] * 3 + ["two"]), [0.0], [False]
    tier = naming(kind, names, down, now)
    await tier.complete(asking())
    names.clear()
    names.append("one")
    await tier.complete(asking())
    names[0] = "two"
    now[0] = 100.0
    with pytest.raises(IdentityChanged, match="runs 'two.*not 'one"):
        await tier.complete(asking())
    names[0] = "one"
    down[0] = True
    with pytest.raises(TierUnavailable):
        await tier.complete(asking())
    down[0] = False
    names[0] = "three"
    with pytest.raises(IdentityChanged):
        await tier.complete(asking())


async def test_a_pinned_model_is_the_only_one_let_through(kind):
    names = deque(["one"])
    assert (await naming(kind, names, [False], [0.0], model="one").complete(asking())).finish == "stop"
    held = naming(kind, names, [False], [0.0], model="other")
    for _ in range(2):
        with pytest.raises(IdentityChanged, match="until the settings") as caught:
            await held.complete(asking())
    attempt = attempt_of(caught.value)
    assert attempt.held
    assert attempt.model.startswith("one")


async def test_a_pinned_revision_needs_a_server_that_publishes_it():
    names = deque(["one"])
    good = naming("tgi", names, [False], [0.0], model="one", revision="abc")
    assert (await good.complete(asking())).model == "one@abc"
    for kind, revision in (("tgi", "abd"), ("llama_cpp", "abc")):
        with pytest.raises(IdentityChanged):
            await naming(kind, names, [False], [0.0], model="one", revision=revision).complete(asking())


async def test_a_server_that_cannot_name_its_model_is_not_asked(kind):
    asked = []

    def handler(request):
        asked.append(request.url.path)
        return httpx.Response(200, json={"data": []})

    settings = TierSettings(name="edge", kind=kind, url="http://model")
    with pytest.raises(TierUnavailable, match="no model"):
        await KINDS[kind](settings, http_client(settings, httpx.MockTransport(handler))).complete(asking())
    assert "/v1/chat/completions" not in asked


async def test_ready_means_healthy_and_there(kind):
    def down(request):
        raise httpx.ConnectError("down")

    assert await saying(kind, 200, "").ready()
    assert not await saying(kind, 503, "").ready()
    assert not await endpoint(kind, down).ready()


async def test_llama_cpp_leaves_no_sampling_to_the_server():
    sent = []

    def handler(request):
        sent.append(json.loads(request.content))
        return httpx.Response(200, json=GOOD)

    await endpoint("llama_cpp", handler).complete(asking(answer_schema=SCHEMA, temperature=0))
    body = sent[0]
    assert body["cache_prompt"] is False
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert {"temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "repeat_penalty"} <= body.keys()


async def test_more_stops_than_tgi_takes_are_refused_before_sending():
    with pytest.raises(InvalidInput, match="at most 4"):
        await saying("tgi", 200, GOOD).complete(asking(stop=("a", "b", "c", "d", "e")))


def test_settings_cannot_name_a_scripted_tier():
    with pytest.raises(ValidationError):
        TierSettings(name="edge", kind="scripted", url="http://x")


async def test_a_script_is_said_in_order_and_ends():
    said = Completion(
        text="b", finish="length", prompt_tokens=1, completion_tokens=1, model="m", milliseconds=1
    )
    tier = Scripted("edge", ["a", said, RateLimited("edge: full")])
    assert (await tier.complete(asking())).text == "a"
    assert (await tier.complete(asking())) is said
    with pytest.raises(RateLimited):
        await tier.complete(asking())
    with pytest.raises(TierUnavailable, match="used up"):
        await tier.complete(asking())
    assert len(tier.prompts) == 4


@pytest.fixture
async def stub():
    async with TgiStub(token="s3cret") as stub:
        yield stub


def tgi_of(stub, **more):
    settings = TierSettings(name="large", kind="tgi", url=stub.url, **{"token": "s3cret"} | more)
    return Tgi(settings, http_client(settings))


async def test_tgi_requests_keep_to_the_recorded_description_and_add_nothing(stub):
    tier = tgi_of(stub)
    free = await tier.complete(asking("Paraphrase: the kettle boils in ninety seconds.", stop=("\n\n",)))
    held = await tier.complete(asking("Paraphrase: the kettle boils.", answer_schema=SCHEMA, temperature=0))
    await tier.aclose()
    assert "kettle" in free.text.lower()
    validate(json.loads(held.text), SCHEMA)
    allowed = CHAT.schema["components"]["schemas"]["ChatRequest"]["properties"].keys()
    for body in stub.chats:
        assert body["model"] == "tgi"
        assert body.keys() <= allowed
        assert "presence_penalty" not in body
    assert free.model == tgi_stub.MODEL


async def test_tgi_token_travels_as_bearer_and_a_wrong_one_is_named(stub):
    right, wrong = tgi_of(stub), tgi_of(stub, token="other")
    await right.complete(asking())
    assert stub.requests[-1].headers["authorization"] == "Bearer s3cret"
    with pytest.raises(CredentialsRejected) as caught:
        await wrong.complete(asking())
    assert "other" not in str(caught.value)
    await right.aclose()
    await wrong.aclose()


@pytest.mark.parametrize(
    ("canned", "error"),
    [
        (tgi_stub.overloaded, RateLimited),
        (tgi_stub.failed, TierUnavailable),
        (tgi_stub.incomplete, TierUnavailable),
        (lambda: tgi_stub.invalid("`top_p` must be > 0.0 and < 1.0"), InvalidInput),
        (lambda: web.Response(status=422, text="Failed to deserialize the JSON body"), InvalidInput),
    ],
)
async def test_tgi_failures_over_a_real_connection(stub, canned, error):
    stub.canned.append(canned())
    tier = tgi_of(stub)
    with pytest.raises(error):
        await tier.complete(asking())
    assert (await tier.complete(asking())).finish == "stop"
    await tier.aclose()


async def test_tgi_without_grammar_is_output_invalid_and_answers_without_a_schema(stub):
    stub.grammar = False
    tier = tgi_of(stub)
    with pytest.raises(OutputInvalid, match="structured = false"):
        await tier.complete(asking(answer_schema=SCHEMA))
    assert (await tier.complete(asking())).finish == "stop"
    await tier.aclose()


async def test_tgi_cuts_at_max_tokens_and_refuses_what_does_not_fit(stub):
    tier = tgi_of(stub)
    cut = await tier.complete(asking("one two three four five six", max_tokens=3))
    assert (cut.finish, cut.completion_tokens) == ("length", 3)
    with pytest.raises(InvalidInput, match="longer than"):
        await tier.complete(asking("word " * 9000))
    await tier.aclose()


async def test_tgi_that_is_gone_is_tier_unavailable():
    async with TgiStub() as stub:
        tier = tgi_of(stub)
        await tier.complete(asking())
    with pytest.raises(TierUnavailable):
        await tier.complete(asking())
    assert not await tier.ready()
    await tier.aclose()


async def test_the_stand_in_answers_in_the_described_shapes(stub):
    async with httpx.AsyncClient(base_url=stub.url, headers={"authorization": "Bearer s3cret"}) as client:
        asked = {"messages": [{"role": "user", "content": "hi"}]}
        good = await client.post("/v1/chat/completions", json=asked)
        bad = await client.post("/v1/chat/completions", json=asked | {"top_p": 1.0})
        flat = asked | {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
        shapeless = await client.post("/v1/chat/completions", json=flat)
        broken = await client.post("/v1/chat/completions", content='{"messages": [')
        described("Info").validate((await client.get("/info")).json())
    described("ChatCompletion").validate(good.json())
    described("ErrorResponse").validate(bad.json())
    assert (bad.status_code, shapeless.status_code, broken.status_code) == (422, 422, 400)
    assert shapeless.text.startswith("Failed to deserialize")
    assert good.headers["x-generated-tokens"] == str(good.json()["usage"]["completion_tokens"])


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with model_server("chat", tmp_path_factory.mktemp("chat"), "--context", "1024") as address:
        yield address


@pytest.fixture
async def live(address):
    settings = TierSettings(name="edge", kind="llama_cpp", url=address)
    tier = LlamaCpp(settings, http_client(settings))
    yield tier
    await tier.aclose()


async def test_live_llama_cpp_keeps_to_the_schema_and_repeats_itself(live):
    prompt = asking("Suggest a title about kettles.", answer_schema=SCHEMA, max_tokens=80)
    first, second = await live.complete(prompt), await live.complete(prompt)
    validate(json.loads(first.text), SCHEMA)
    assert first.text == second.text
    assert first.model == "HuggingFaceTB/SmolLM2-135M-Instruct:Q4_1"
    assert first.prompt_tokens > 0


async def test_live_llama_cpp_cuts_and_refuses_like_the_others(live):
    assert await live.ready()
    assert (await live.complete(asking("Tell a story.", max_tokens=3))).finish == "length"
    with pytest.raises(InvalidInput, match="longer than"):
        await live.complete(asking("word " * 2000))
    with pytest.raises(OutputInvalid):
        unsound = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
        await live.complete(asking("hi", answer_schema=unsound))


@pytest.mark.parametrize(
    "text",
    [
        "The kettle boils in ninety seconds, and descaling it twice a month keeps it quiet.",
        "Die Geschäftsführung prüft Überweisungen täglich; Straße 12, 10115 Berlin.",
        "SELECT id, price FROM items WHERE sku = 'A-1029' AND price >= 19.99;",
        "湯が沸くまで九十秒かかります。",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "- a\n- b\n\n\t* c\n",
    ],
)
async def test_tokens_are_estimated_from_above(address, text):
    async with httpx.AsyncClient(base_url=address, trust_env=False) as client:
        body = (await client.post("/tokenize", json={"content": text})).json()
    assert len(body["tokens"]) <= tokens_from_above(text)


async def test_a_whole_prompt_is_estimated_from_above(live):
    prompt = asking("Say hello to the reader of this page.", max_tokens=4)
    assert (await live.complete(prompt)).prompt_tokens <= prompt_tokens(prompt)


async def test_openai_compatible_servers_get_what_they_read_and_nothing_they_ignore():
    sent = []

    def handler(request):
        sent.append(json.loads(request.content))
        return httpx.Response(200, json=GOOD)

    await endpoint("openai_compatible", handler).complete(asking(answer_schema=SCHEMA))
    assert sent[0]["model"] == "a-model"
    assert sent[0]["response_format"]["json_schema"]["schema"] == SCHEMA
    assert "cache_salt" not in sent[0]


async def test_prefix_caches_are_salted_per_group_with_a_secret():
    salts = []

    def handler(request):
        salts.append(json.loads(request.content)["cache_salt"])
        return httpx.Response(200, json=GOOD)

    for salt, group in (("one", "acme"), ("one", "acme"), ("one", "other"), ("two", "acme"), ("one", None)):
        await endpoint("openai_compatible", handler, cache_salt=salt).complete(asking(cache_group=group))
    assert salts[0] == salts[1]
    assert len(set(salts)) == 4
    assert all("acme" not in salt for salt in salts)


TEI_INFO = {"model_id": "m", "model_sha": "abc", "max_client_batch_size": 32}


def embedding(kind, handler, model="m"):
    settings = EmbeddingSettings(kind=kind, url="http://embed", model=model, dimensions=2, token="s3cret")
    return embedder(settings, http_client(settings, httpx.MockTransport(handler)))


def tei(refusals=(), info=TEI_INFO):
    """A TEI server that takes texts of up to 100 characters."""
    asked, refused = [], deque(refusals)

    def handler(request):
        assert request.headers["authorization"] == "Bearer s3cret"
        if request.url.path == "/info":
            return httpx.Response(200, json=info)
        body = json.loads(request.content)
        asked.append(body)
        if refused:
            return refused.popleft()
        if any(len(text) > 100 for text in body["inputs"]):
            error = {"error": "`inputs` must have less than 25 tokens. Given: 30", "error_type": "Validation"}
            return httpx.Response(413, json=error)
        return httpx.Response(200, json=[[float(len(text)), 1.0] for text in body["inputs"]])

    return handler, asked


async def test_tei_is_asked_in_batches_and_told_never_to_cut():
    handler, asked = tei()
    vectors = await embedding("tei", handler).embed(["x" * (number % 50 + 1) for number in range(70)])
    assert len(vectors) == 70
    assert [len(body["inputs"]) for body in asked] == [32, 32, 6]
    assert all(body["truncate"] is False for body in asked)


async def test_a_text_too_long_for_tei_becomes_the_mean_of_its_halves():
    handler, _ = tei()
    long, short = await embedding("tei", handler).embed(["word " * 60, "word"])
    assert len(long) == len(short) == 2


@pytest.mark.parametrize("model", ["m", "m@abc"])
async def test_tei_must_run_the_model_of_the_settings(model):
    assert await embedding("tei", tei()[0], model).embed(["a"])
    with pytest.raises(MemoryUnavailable, match="instead of 'm"):
        await embedding("tei", tei(info=TEI_INFO | {"model_sha": "abd", "model_id": "n"})[0], model).embed(
            ["a"]
        )


@pytest.mark.parametrize(
    ("status", "kind", "ending"),
    [(429, "Overloaded", Ending.OVERLOADED), (424, "Backend", Ending.BACKEND_FAULT)],
)
async def test_tei_refusals_keep_their_word(status, kind, ending):
    handler, _ = tei([httpx.Response(status, json={"error": "x", "error_type": kind})])
    with pytest.raises(MemoryUnavailable, match=f"{status} {kind}") as caught:
        await embedding("tei", handler).embed(["a"])
    assert attempt_of(caught.value).ending is ending


async def test_openai_compatible_embeddings_name_their_model():
    def handler(request):
        body = json.loads(request.content)
        rows = [{"index": number, "embedding": [1.0, 2.0]} for number, _ in enumerate(body["input"])]
        return httpx.Response(200, json={"model": body["model"], "data": rows[::-1]})

    assert len(await embedding("openai_compatible", handler).embed(["a", "b"])) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prize": "1"}, "prize"),
        ({"price_per_million_input": "1"}, "set both prices"),
        ({"price_per_million_output": "1", "currency": "EUR"}, "set both prices"),
        ({"price_per_million_input": "1", "price_per_million_output": "2"}, "set currency"),
        ({"price_per_million_input": "-1"}, "greater than or equal"),
        ({"revision": "abc"}, "set model too"),
        ({"route": "generate"}, 'only kind = "tgi"'),
        ({"kind": "scripted"}, "openai_compatible"),
    ],
)
def test_a_tier_that_makes_no_sense_is_refused(change, named):
    with pytest.raises(ValidationError, match=named):
        TierSettings(**{"name": "edge", "kind": "llama_cpp", "url": "http://x", **change})


def test_a_tier_without_prices_is_fine_and_two_of_one_name_are_not():
    tier = {"name": "edge", "kind": "llama_cpp", "url": "http://x", "token": "s3cret"}
    assert Settings(tiers=[tier]).tiers[0].price_per_million_input is None
    with pytest.raises(ValidationError, match="another tier has this name") as caught:
        Settings(tiers=[tier, tier])
    assert caught.value.errors()[0]["loc"] == ("tiers", 1, "name")
    assert "s3cret" not in str(caught.value)
