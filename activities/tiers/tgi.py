"""Hugging Face TGI's chat route, in the words its router accepts.

Three traps are stepped around: `presence_penalty` is never sent (0.0 would become a penalty of 2.0), the
model is always called `tgi` (another name selects an adapter, silently), and a schema goes under `value`.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import httpx

from activities.tiers.wire import ChatEndpoint, message_of, no_answer, refused
from models.errors import CountersignError, InvalidInput, OutputInvalid
from models.inference import Prompt

MOST_STOPS = 4
TOO_LONG = ("`inputs` tokens", "`inputs` must have less than")


class Tgi(ChatEndpoint):
    """One TGI server."""

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The request.

        Raises:
            InvalidInput: more stop sequences than TGI takes.
        """
        if len(prompt.stop) > MOST_STOPS:
            raise InvalidInput.field(
                "stop", len(prompt.stop), f"TGI takes at most {MOST_STOPS} stop sequences"
            )
        body: dict[str, Any] = {
            "model": "tgi",
            "messages": [message.model_dump() for message in prompt.messages],
            "max_tokens": prompt.max_tokens,
            "temperature": prompt.temperature,
            "top_p": prompt.top_p,
            "seed": prompt.seed,
            "stream": False,
        }
        if prompt.stop:
            body["stop"] = list(prompt.stop)
        if prompt.answer_schema is not None:
            value = {"name": "answer", "schema": prompt.answer_schema}
            body["response_format"] = {"type": "json_schema", "value": value}
        return body

    async def identify(self) -> str:
        """Model and revision as `/info` has them; the chat answer only echoes what it was sent."""
        info = await self.fetch("/info")
        name, revision = info.get("model_id"), info.get("model_sha")
        if not isinstance(name, str) or not name:
            raise no_answer(self.name, "no model_id in /info")
        return f"{name}@{revision}" if isinstance(revision, str) and revision else name

    def refusal(self, response: httpx.Response, prompt: Prompt) -> CountersignError:
        """A server without grammar support says so with the same status as for a bad prompt."""
        message = message_of(response)
        if response.status_code == HTTPStatus.UNPROCESSABLE_ENTITY:
            if prompt.answer_schema is not None and "grammar" in message:
                return OutputInvalid(
                    f"{self.name}: the server cannot hold an answer to this schema; start it with grammar "
                    f"support or set structured = false"
                )
            if any(mark in message for mark in TOO_LONG):
                return InvalidInput(
                    f"{self.name}: the prompt is longer than the server's context; shorten it"
                )
        return refused(self.name, response)
