"""A stand-in for TGI's router: it checks requests as the real one's API description says and answers in the
shapes a real 3.3.6 was recorded with. What it writes is deterministic and reuses the words it was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from aiohttp import web
from jsonschema import Draft202012Validator

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CREATED = 1795493177
LONG_WORDS = 60
SHORT_CHARACTERS = 40
LONG_FROM = 200
CHECKED_NEW_TOKENS = 1024
PIECE = re.compile(r"\w+|[^\w\s]")
WORD = re.compile(r"[^\W_][\w'-]*")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    port: int = 0
    """The caller's, so that connections can be told apart."""


class TgiStub:
    """One server on 127.0.0.1."""

    def __init__(
        self,
        *,
        grammar: bool = True,
        token: str | None = None,
        max_total_tokens: int = 8192,
        model: str = MODEL,
        revision: str | None = None,
        delay: float = 0.0,
    ) -> None:
        self.grammar = grammar
        self.token = token
        self.max_total_tokens = max_total_tokens
        self.model = model
        self.revision = revision
        self.delay = delay
        self.hold: asyncio.Event | None = None
        """Streams stop after their first token until it is set."""
        self.hold_above = 0
        """Only those that may be longer than so many tokens."""
        self.drops_schemas = False
        self.usage = True
        self.running = 0
        self.gone = asyncio.Event()
        """Set when a caller closed the connection before its answer was whole."""
        self.requests: list[Asked] = []
        self.canned: deque[web.Response] = deque()
        """Sent instead of the next chat answers, one each."""
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> str:
        app = web.Application(client_max_size=16 * 2**20)
        app.router.add_get("/info", self._info)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/chat_tokenize", self._chat_tokenize)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/generate_stream", self._generate_stream)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> TgiStub:
        self.url = await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def chats(self) -> list[dict[str, Any]]:
        """Bodies of the chat requests."""
        return [asked.body for asked in self.requests if asked.path == "/v1/chat/completions"]

    async def _info(self, request: web.Request) -> web.Response:
        await self._note(request)
        info = {
            "model_id": self.model,
            "model_sha": self.revision,
            "model_pipeline_tag": None,
            "max_concurrent_requests": 8,
            "max_best_of": 0,
            "max_stop_sequences": 4,
            "max_input_tokens": self.max_total_tokens - 1,
            "max_total_tokens": self.max_total_tokens,
            "validation_workers": 2,
            "max_client_batch_size": 4,
            "router": "text-generation-router",
            "version": "3.3.6-dev0",
            "sha": None,
            "docker_label": None,
        }
        return as_json(200, info)

    async def _health(self, request: web.Request) -> web.Response:
        await self._note(request)
        return web.Response(status=200)

    async def _models(self, request: web.Request) -> web.Response:
        await self._note(request)
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": self.model}
        return as_json(200, {"object": "list", "data": [model]})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=f"tgi_batch_current_size {self.running}\ntgi_queue_size 0\n")

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = json.loads(await self._note(request))
        return as_json(200, tokens_of(body["inputs"]))

    async def _chat_tokenize(self, request: web.Request) -> web.Response:
        body = json.loads(await self._note(request))
        text = templated(body["messages"])
        return as_json(200, {"tokenize_response": tokens_of(text), "templated_text": text})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        answer = await self._asked(request, CHAT, lambda body: all_text(body))
        if not isinstance(answer, Said) or not answer.body.get("stream"):
            return answer if isinstance(answer, web.StreamResponse) else self._whole(answer)
        return await self._stream(request, answer, chat_events(self, answer))

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        answer = await self._asked(request, GENERATE, lambda body: body["inputs"])
        if isinstance(answer, Said):
            return self._in_one(generated_whole(answer)) if answer.refusal is None else answer.refusal
        return answer

    async def _generate_stream(self, request: web.Request) -> web.StreamResponse:
        answer = await self._asked(request, GENERATE, lambda body: body["inputs"])
        if not isinstance(answer, Said):
            return answer
        return await self._stream(request, answer, generate_events(answer))

    async def _asked(
        self, request: web.Request, shape: Draft202012Validator, text: Callable[[Any], str]
    ) -> web.Response | Said:
        raw = await self._note(request)
        if self.token and request.headers.get("authorization", "").lower() != f"bearer {self.token}".lower():
            return web.Response(status=401)
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.canned:
            return self.canned.popleft()
        try:
            body = json.loads(raw)
        except ValueError as error:
            return web.Response(status=400, text=f"Failed to parse the request body as JSON: {error}")
        broken = next(shape.iter_errors(body), None)
        if broken is not None:
            what = f"Failed to deserialize the JSON body into the target type: {broken.json_path}"
            return web.Response(status=422, text=what)
        plain_body = body if "messages" in body else as_chat(body)
        objection = self._objection(plain_body)
        if objection:
            return Said(body, text(body), refusal=invalid(objection))
        return self._answer(body, plain_body, text(body))

    async def _stream(
        self, request: web.Request, said: Said, events: Iterable[dict[str, Any]]
    ) -> web.StreamResponse:
        """As the real router does it: 200 first, and any refusal inside."""
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        self.running += 1
        try:
            await response.prepare(request)
            if said.refusal is not None:
                events = [refused_inside(said)]
            for number, event in enumerate(events):
                if number == 1 and self.hold is not None and said.most > self.hold_above:
                    await self.hold.wait()
                await response.write(b": keep-alive\n\n" + as_event(event))
            if "messages" in said.body:
                await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise
        finally:
            self.running -= 1
        return response

    async def _note(self, request: web.Request) -> str:
        raw = await request.text()
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = raw
        headers = {name.lower(): value for name, value in request.headers.items()}
        port = request.transport.get_extra_info("peername")[1] if request.transport else 0
        self.requests.append(Asked(request.method, request.path, headers, body, port))
        return raw

    def _objection(self, body: dict[str, Any]) -> str | None:
        top_p, stop, wished = body.get("top_p"), body.get("stop") or [], body.get("response_format")
        if top_p is not None and not 0 < top_p < 1:
            return "`top_p` must be > 0.0 and < 1.0"
        if len(stop) > 4:
            return f"`stop` supports up to 4 stop sequences. Given: {len(stop)}"
        if wished and not self.grammar:
            return "grammar is not supported"
        if wished and "properties" not in wanted_schema(wished):
            return "grammar is not valid: Invalid grammar: root must have `properties`"
        asked, new = count(all_text(body)), min(body.get("max_tokens") or 100, CHECKED_NEW_TOKENS)
        if asked + new > self.max_total_tokens:
            return (
                f"`inputs` tokens + `max_new_tokens` must be <= {self.max_total_tokens}. "
                f"Given: {asked} `inputs` tokens and {new} `max_new_tokens`"
            )
        return None

    def _answer(self, body: dict[str, Any], chat: dict[str, Any], asked: str) -> Said:
        words = WORD.findall(last_user_text(chat)) or ["nothing"]
        wished = chat.get("response_format")
        if wished and not self.drops_schemas:
            schema = wanted_schema(wished)
            value = Instance(schema, words).build()
            if not Draft202012Validator(schema).is_valid(value):
                objection = "Request failed during generation: no instance of this schema is known"
                return Said(body, asked, refusal=failed(objection))
            text = json.dumps(value, ensure_ascii=False)
        else:
            text = sentences(words[:LONG_WORDS])
        text, finish = cut(text, chat.get("max_tokens") or 100)
        return Said(body, asked, text, finish)

    def name_in(self, body: dict[str, Any]) -> str:
        """What an answer calls the model: it echoes, whatever it was sent."""
        sent = body.get("model")
        return self.model if sent in (None, "tgi") else sent

    def _whole(self, said: Said) -> web.Response:
        if said.refusal is not None:
            return said.refusal
        message = {"role": "assistant", "content": said.text}
        answer = {
            "object": "chat.completion",
            "id": "",
            "created": CREATED,
            "model": self.name_in(said.body),
            "system_fingerprint": "3.3.6-dev0-native",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": said.finish}],
            "usage": said.usage,
        }
        return self._in_one(answer, said)

    def _in_one(self, answer: Any, said: Said | None = None) -> web.Response:
        headers = {
            "x-compute-type": "gpu+optimized",
            "x-compute-time": "0.001",
            "x-total-time": "1",
            "x-validation-time": "0",
            "x-queue-time": "6",
            "x-inference-time": "1",
            "x-time-per-token": "19",
        }
        if said is not None:
            headers["x-prompt-tokens"] = str(said.usage["prompt_tokens"])
            headers["x-generated-tokens"] = str(said.usage["completion_tokens"])
        return as_json(200, answer, headers)


@dataclass(frozen=True, slots=True)
class Said:
    """What the stand-in has to say to one request."""

    body: dict[str, Any]
    asked: str
    text: str = ""
    finish: str = "stop"
    refusal: web.Response | None = None

    @property
    def most(self) -> int:
        """Tokens it may be long."""
        parameters = self.body.get("parameters") or {}
        return self.body.get("max_tokens") or parameters.get("max_new_tokens") or 0

    @property
    def usage(self) -> dict[str, int]:
        prompt, made = count(self.asked), max(1, count(self.text))
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    @property
    def pieces(self) -> list[str]:
        """The text, cut as tokens would cut it."""
        ends = [found.end() for found in PIECE.finditer(self.text)]
        return [self.text[start:end] for start, end in pairwise([0, *ends[:-1], len(self.text)])]


def chat_events(stub: TgiStub, said: Said) -> Iterator[dict[str, Any]]:
    head = {
        "object": "chat.completion.chunk",
        "id": "",
        "created": CREATED,
        "model": stub.name_in(said.body),
        "system_fingerprint": "3.3.6-dev0-native",
    }
    pieces = said.pieces
    for number, piece in enumerate(pieces):
        delta = {"role": "assistant", "content": piece}
        finish = said.finish if number == len(pieces) - 1 else None
        logprobs = {"content": [{"token": piece, "logprob": -0.5, "top_logprobs": []}]}
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": logprobs if said.body.get("logprobs") else None,
            "finish_reason": finish,
        }
        yield head | {"choices": [choice], "usage": None}
    if stub.usage and (said.body.get("stream_options") or {}).get("include_usage"):
        yield head | {"choices": [], "usage": said.usage}


def generate_events(said: Said) -> Iterator[dict[str, Any]]:
    pieces = said.pieces
    for number, piece in enumerate(pieces, start=1):
        last = number == len(pieces)
        details = {
            "finish_reason": "length" if said.finish == "length" else "eos_token",
            "generated_tokens": said.usage["completion_tokens"],
            "input_length": said.usage["prompt_tokens"],
            "seed": 7,
        }
        yield {
            "index": number,
            "token": {"id": number, "text": piece, "logprob": -0.5, "special": False},
            "generated_text": said.text if last else None,
            "details": details if last and said.body["parameters"].get("details") else None,
        }


def generated_whole(said: Said) -> dict[str, Any]:
    tokens = [
        {"id": number, "text": piece, "logprob": -0.5, "special": False}
        for number, piece in enumerate(said.pieces)
    ]
    details = {
        "finish_reason": "length" if said.finish == "length" else "eos_token",
        "generated_tokens": len(tokens),
        "seed": 7,
        "prefill": [],
        "tokens": tokens,
    }
    return {"generated_text": said.text, "details": details}


def refused_inside(said: Said) -> dict[str, Any]:
    """The chat route says 422 for every kind; the native one names the kind."""
    assert said.refusal is not None and isinstance(said.refusal.body, bytes)
    error = json.loads(said.refusal.body)
    if "messages" in said.body:
        return {"error": {"message": error["error"], "http_status_code": 422}}
    return error


def as_event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def templated(messages: list[dict[str, Any]]) -> str:
    turns = [f"<|im_start|>{turn['role']}\n{text_of(turn.get('content'))}<|im_end|>\n" for turn in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def as_chat(body: dict[str, Any]) -> dict[str, Any]:
    """A native request in the words of the chat route."""
    parameters = body.get("parameters") or {}
    turns = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", body["inputs"], re.DOTALL)
    grammar = parameters.get("grammar")
    return {
        "messages": [{"role": "user", "content": (turns or [body["inputs"]])[-1]}],
        "max_tokens": parameters.get("max_new_tokens"),
        "top_p": parameters.get("top_p"),
        "stop": parameters.get("stop"),
        "response_format": grammar,
    }


def tokens_of(text: str) -> list[dict[str, Any]]:
    return [
        {"id": number, "text": found.group(), "start": found.start(), "stop": found.end()}
        for number, found in enumerate(PIECE.finditer(text))
    ]


class Instance:
    """The smallest sensible value of a schema, its strings made of given words."""

    def __init__(self, schema: dict[str, Any], words: list[str]) -> None:
        self._root = schema
        self._words = words
        self._next = cycle(words)

    def build(self) -> Any:
        return self._of(self._root)

    def _of(self, schema: dict[str, Any], number: int = 0) -> Any:
        if "$ref" in schema:
            return self._of(self._resolve(schema["$ref"]), number)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return schema["enum"][number % len(schema["enum"])]
        for choice in ("anyOf", "oneOf"):
            if choice in schema:
                return self._of(schema[choice][0], number)
        kind = schema.get("type", "object" if "properties" in schema else "string")
        kind = kind[0] if isinstance(kind, list) else kind
        return getattr(self, f"_{kind}")(schema, number)

    def _resolve(self, reference: str) -> dict[str, Any]:
        found: Any = self._root
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        return found

    def _object(self, schema: dict[str, Any], number: int) -> dict[str, Any]:
        return {name: self._of(part, number) for name, part in schema.get("properties", {}).items()}

    def _array(self, schema: dict[str, Any], number: int) -> list[Any]:
        size = min(max(1, schema.get("minItems", 1)), schema.get("maxItems", 10**6))
        return [self._of(schema.get("items", {}), index) for index in range(size)]

    def _integer(self, schema: dict[str, Any], number: int) -> int:
        least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + ("exclusiveMinimum" in schema))
        return int(min(least + number, schema.get("maximum", least + number)))

    def _number(self, schema: dict[str, Any], number: int) -> float:
        return float(self._integer(schema, number))

    def _boolean(self, schema: dict[str, Any], number: int) -> bool:
        return False

    def _null(self, schema: dict[str, Any], number: int) -> None:
        return None

    def _string(self, schema: dict[str, Any], number: int) -> str:
        least, most = schema.get("minLength", 1), schema.get("maxLength", 10**6)
        pattern = schema.get("pattern")
        if pattern:
            return matching(pattern, self._words[number:] + self._words, least, most)
        if schema.get("format") in FORMATS:
            return FORMATS[schema["format"]]
        return self._prose(least, most)

    def _prose(self, least: int, most: int) -> str:
        wished = LONG_WORDS if most >= LONG_FROM else 10**6
        room = most if most >= LONG_FROM else min(most, max(least, SHORT_CHARACTERS))
        taken: list[str] = []
        while len(taken) < wished or len(sentences(taken)) < least:
            longer = sentences([*taken, next(self._next)])
            if len(longer) > room:
                break
            taken.append(longer.split()[-1].rstrip("."))
            if len(taken) >= 10**4:
                break
        return sentences(taken).ljust(least, "x")[:most]


FORMATS = {
    "date": "2030-01-02",
    "time": "09:00:00Z",
    "date-time": "2030-01-02T09:00:00Z",
    "email": "someone@example.org",
    "uri": "https://example.org/",
}


def sentences(words: list[str]) -> str:
    """Words in sentences of ten."""
    groups = [words[start : start + 10] for start in range(0, len(words), 10)]
    return " ".join(" ".join(group)[:1].upper() + " ".join(group)[1:] + "." for group in groups)


def matching(pattern: str, words: list[str], least: int, most: int) -> str:
    """A string for a simple pattern: the words in a usual spelling, else letters by the pattern's parts."""
    slug = "-".join(word.lower() for word in words[:4])
    usual = [
        slug,
        slug[:most].strip("-"),
        *(word.lower() for word in words),
        *words,
        *FORMATS.values(),
        "09:00",
    ]
    for text in usual:
        if least <= len(text) <= most and re.search(pattern, text):
            return text
    return generated(re._parser.parse(pattern), least)  # type: ignore[attr-defined]


def generated(parsed: Any, least: int) -> str:
    """The first string a parsed pattern allows; repeats are stretched to reach the least length."""
    made = ""
    for operation, argument in parsed:
        name = str(operation)
        if name == "LITERAL":
            made += chr(argument)
        elif name == "IN":
            made += first_of(argument[0])
        elif name == "ANY":
            made += "x"
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, part = argument
            made += generated(part, 0) * min(int(high), max(low, 1 if high else 0, least - len(made)))
        elif name == "SUBPATTERN":
            made += generated(argument[3], least - len(made))
        elif name == "BRANCH":
            made += generated(argument[1][0], least - len(made))
    return made


def first_of(member: Any) -> str:
    """A character of the first part of a class."""
    name, argument = str(member[0]), member[1]
    if name == "RANGE":
        return chr(argument[0])
    if name == "CATEGORY":
        return "0" if "DIGIT" in str(argument) else " " if "SPACE" in str(argument) else "x"
    return chr(argument) if name == "LITERAL" else "x"


def plain(schema: Any) -> Any:
    """OpenAPI 3.0's `nullable` in the words of JSON Schema."""
    if isinstance(schema, list):
        return [plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    rest = {name: plain(part) for name, part in schema.items() if name not in ("nullable", "discriminator")}
    return {"anyOf": [rest, {"type": "null"}]} if schema.get("nullable") is True else rest


def described(name: str) -> Draft202012Validator:
    """The validator of one component of the recorded API description."""
    description = json.loads((Path(__file__).parent / "tgi_openapi.json").read_text(encoding="utf-8"))
    components = plain(description["components"])
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": components})


CHAT = described("ChatRequest")
GENERATE = described("GenerateRequest")


def wanted_schema(wished: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema in a `response_format`."""
    value = wished["value"]
    return value["schema"] if wished["type"] == "json_schema" else value


def text_of(content: Any) -> str:
    """A message's text, whole or in parts."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content or [])


def all_text(body: dict[str, Any]) -> str:
    return "\n".join(text_of(message.get("content")) for message in body["messages"])


def last_user_text(body: dict[str, Any]) -> str:
    said = [text_of(message.get("content")) for message in body["messages"] if message["role"] == "user"]
    return said[-1] if said else ""


def count(text: str) -> int:
    return len(PIECE.findall(text))


def cut(text: str, most: int) -> tuple[str, str]:
    """The text within `most` tokens, and how it ended."""
    pieces = list(PIECE.finditer(text))
    if len(pieces) <= most:
        return text, "stop"
    return text[: pieces[most - 1].end()], "length"


def as_json(status: int, body: Any, headers: dict[str, str] | None = None) -> web.Response:
    data = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    return web.Response(
        status=status, body=data, headers={"content-type": "application/json", **(headers or {})}
    )


def invalid(objection: str) -> web.Response:
    return as_json(422, {"error": f"Input validation error: {objection}", "error_type": "validation"})


def overloaded() -> web.Response:
    return as_json(429, {"error": "Model is overloaded", "error_type": "overloaded"})


def failed(text: str = "Request failed during generation: Server error") -> web.Response:
    return as_json(424, {"error": text, "error_type": "generation"})


def incomplete() -> web.Response:
    return as_json(500, {"error": "Incomplete generation", "error_type": "incomplete_generation"})


async def serve(port: int, stub: TgiStub) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print(f"listening on {await stub.start(port)}", flush=True)  # noqa: T201
    await stop.wait()
    await stub.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tgi_stub", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--no-grammar", action="store_true", help="refuse schemas, as recorded")
    options = parser.parse_args()
    asyncio.run(serve(options.port, TgiStub(grammar=not options.no_grammar)))


if __name__ == "__main__":
    main()
