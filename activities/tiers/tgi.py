"""Hugging Face TGI in the words its router accepts: the chat route, and the native one.

Three traps are stepped around: `presence_penalty` is never sent (0.0 would become a penalty of 2.0), the
model is always called `tgi` (another name selects an adapter, silently), and a schema goes under `value`.

`huggingface_hub.AsyncInferenceClient` is on no path here. It shows no response headers (so no queue time),
has one timeout per socket operation where four limits are wanted, keeps every stream open until the client
is closed (so a cancelled call would not reach the server), reports an overload inside a stream as an unknown
error, sends the machine's own token to any address unless told otherwise, refuses local servers when the hub
is set offline, and rewrites schemas into a form that only TGI reads. It is right for trying a server by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, cast

from activities.tiers import heard
from activities.tiers.heard import FINISHES, Heard, Unreadable
from activities.tiers.wire import ChatEndpoint, Said
from models.inference import Ending, Prompt, TokenChance

MOST_STOPS = 4
MARKS: Mapping[str, Ending] = {
    "model is overloaded": Ending.OVERLOADED,
    "incomplete generation": Ending.INCOMPLETE,
    "request failed during generation": Ending.BACKEND_FAULT,
    "grammar": Ending.SCHEMA_UNSUPPORTED,
    "`inputs` tokens": Ending.TOO_LONG,
    "`inputs` must have less than": Ending.TOO_LONG,
    "input validation error": Ending.INVALID_REQUEST,
    "template": Ending.INVALID_REQUEST,
    "tool error": Ending.INVALID_REQUEST,
}
"""First match counts. A stream says 422 for every kind, so the message is all there is."""


class Tgi(ChatEndpoint):
    """One TGI server, asked over its chat route."""

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The request.

        Raises:
            InvalidInput: more stop sequences than TGI takes.
        """
        body: dict[str, Any] = {
            "model": "tgi",
            "messages": [message.model_dump() for message in prompt.messages],
            "max_tokens": prompt.max_tokens,
            "temperature": prompt.temperature,
            "top_p": prompt.top_p,
            "seed": prompt.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if prompt.stop:
            body["stop"] = self.stops(prompt)
        if prompt.answer_schema is not None:
            value = {"name": "answer", "schema": prompt.answer_schema}
            body["response_format"] = {"type": "json_schema", "value": value}
        if prompt.logprobs:
            # Without alternatives: a server started with none refuses to be asked for them.
            body["logprobs"] = True
        return body

    async def identify(self) -> str:
        """Model and revision as `/info` has them; the chat answer only echoes what it was sent."""
        info = await self._info()
        name, revision = info.get("model_id"), info.get("model_sha")
        if not isinstance(name, str) or not name:
            raise self.no_answer("no model_id in /info")
        return f"{name}@{revision}" if isinstance(revision, str) and revision else name

    async def context(self) -> int | None:
        """As `/info` says."""
        tokens = (await self._info()).get("max_total_tokens")
        return tokens if isinstance(tokens, int) else None

    async def slots(self) -> int | None:
        """Requests it holds at once, running or waiting; one more gets 429."""
        most = (await self._info()).get("max_concurrent_requests")
        return most if isinstance(most, int) else None

    async def running(self) -> int | None:
        """The batch it computes and what waits for it."""
        batch, queue = await self.metric("tgi_batch_current_size"), await self.metric("tgi_queue_size")
        return None if batch is None else batch + (queue or 0)

    async def prompt_tokens(self, prompt: Prompt) -> int:
        """By its own template and tokenizer."""
        return len((await self._templated(prompt))[1])

    async def text_tokens(self, text: str) -> int:
        """By its own tokenizer; it adds what it puts before every text, so this is from above."""
        tokens = await self.fetch("/tokenize", {"inputs": text})
        if not isinstance(tokens, list):
            raise Unreadable("no tokens")
        return len(cast(list[Any], tokens))

    def judge(self, said: Said, prompt: Prompt) -> Ending | None:
        """A server without grammar support says so with the same status as for a bad prompt."""
        if not said.in_stream and said.status not in (HTTPStatus.UNPROCESSABLE_ENTITY, 500):
            return None
        for mark, ending in MARKS.items():
            if mark in said.message:
                return _of_schema(ending, prompt)
        # A stream that says 422 says nothing by it.
        return Ending.BACKEND_FAULT if said.in_stream else None

    def stops(self, prompt: Prompt) -> list[str]:
        """The stop sequences.

        Raises:
            InvalidInput: more than TGI takes.
        """
        if len(prompt.stop) > MOST_STOPS:
            text = f"stop: {len(prompt.stop)} sequences are not accepted; TGI takes at most {MOST_STOPS}"
            raise self.failed(Ending.INVALID_REQUEST, text, sent=False)
        return list(prompt.stop)

    async def _info(self) -> dict[str, Any]:
        info = await self.fetch("/info")
        if not isinstance(info, dict):
            raise Unreadable("no JSON object in /info")
        return cast(dict[str, Any], info)

    async def _templated(self, prompt: Prompt) -> tuple[str, list[Any]]:
        turns = [message.model_dump() for message in prompt.messages]
        found = await self.fetch("/chat_tokenize", {"model": "tgi", "messages": turns})
        answer = cast(dict[str, Any], found) if isinstance(found, dict) else {}
        text, tokens = answer.get("templated_text"), answer.get("tokenize_response")
        if not isinstance(text, str) or not isinstance(tokens, list):
            raise Unreadable("no prompt from its template")
        return text, cast(list[Any], tokens)


class TgiGenerate(Tgi):
    """One TGI server, asked over its native route, which gives a logprob for every token it writes.

    The server's own template makes the prompt, so that both routes put the same question.
    """

    async def request(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        """The request, streamed."""
        parameters = self._parameters(prompt)
        text, _ = await self._templated(prompt)
        return "/generate_stream", {"inputs": text, "parameters": parameters}

    def hear(self, said: Heard, body: dict[str, Any]) -> bool:
        """One token, or a whole answer of `/generate`."""
        try:
            return _token(said, body) if "token" in body else _generated(said, body)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            raise Unreadable("an unknown shape") from None

    def _parameters(self, prompt: Prompt) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "max_new_tokens": prompt.max_tokens,
            "top_p": prompt.top_p,
            "seed": prompt.seed,
            "details": True,
            "decoder_input_details": False,
            "return_full_text": False,
            "do_sample": prompt.temperature > 0,
        }
        if prompt.temperature > 0:
            parameters["temperature"] = prompt.temperature
        if prompt.stop:
            parameters["stop"] = self.stops(prompt)
        if prompt.answer_schema is not None:
            parameters["grammar"] = {"type": "json", "value": prompt.answer_schema}
        return parameters


def _of_schema(ending: Ending, prompt: Prompt) -> Ending:
    without = ending is Ending.SCHEMA_UNSUPPORTED and prompt.answer_schema is None
    return Ending.INVALID_REQUEST if without else ending


def _token(said: Heard, body: Mapping[str, Any]) -> bool:
    token = body["token"]
    text, special = str(token["text"]), bool(token["special"])
    if not special:
        said.parts.append(text)
        if token.get("logprob") is not None:
            said.chances.append(TokenChance(token=text, logprob=token["logprob"]))
    said.heard_now()
    if body.get("generated_text") is not None:
        _end(said, body["generated_text"], body.get("details"))
    return True


def _generated(said: Heard, body: Mapping[str, Any]) -> bool:
    for token in body["details"]["tokens"]:
        said.chances.append(TokenChance(token=token["text"], logprob=token["logprob"]))
    _end(said, body["generated_text"], body["details"])
    return True


def _end(said: Heard, text: str, details: Any) -> None:
    # The whole text once more, without what a stop sequence took away.
    said.parts = [text]
    # Without details it ended, and nothing says why; a cut is not taken for a whole answer.
    said.finish = FINISHES[details["finish_reason"]] if details else "length"
    if details and "input_length" in details:
        said.usage = heard.counts(details["input_length"], details["generated_tokens"])
