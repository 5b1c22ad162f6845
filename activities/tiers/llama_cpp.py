"""llama.cpp's server: it holds answers to a JSON schema, and its defaults are never relied on."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, cast

import httpx

from activities.tiers.wire import (
    LOADING_RETRY,
    ChatEndpoint,
    json_or_none,
    kind_of,
    message_of,
    no_answer,
    refused,
)
from models.errors import CountersignError, InvalidInput, OutputInvalid, TierUnavailable
from models.inference import Prompt

NEUTRAL: dict[str, Any] = {
    "top_k": 40,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
}
"""Every sampler said aloud, since the server's defaults change between versions."""
TOO_LONG = ("context size", "context length", "too large to process")


class LlamaCpp(ChatEndpoint):
    """One llama.cpp server."""

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The request; without prompt cache, whose reuse would make answers depend on earlier ones."""
        body: dict[str, Any] = {
            **NEUTRAL,
            "messages": [message.model_dump() for message in prompt.messages],
            "max_tokens": prompt.max_tokens,
            "temperature": prompt.temperature,
            "top_p": prompt.top_p,
            "seed": prompt.seed,
            "stop": list(prompt.stop),
            "stream": False,
            "cache_prompt": False,
        }
        if prompt.answer_schema is not None:
            # The flat form the server's README shows is read as an empty schema.
            schema = {"name": "answer", "schema": prompt.answer_schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def identify(self) -> str:
        """The alias or file the server was started with."""
        models = (await self.fetch("/v1/models")).get("data")
        first = cast(list[Any], models)[0] if isinstance(models, list) and models else None
        name = cast(dict[str, Any], first).get("id") if isinstance(first, dict) else None
        if not isinstance(name, str) or not name:
            raise no_answer(self.name, "no model in /v1/models")
        return name

    def refusal(self, response: httpx.Response, prompt: Prompt) -> CountersignError:
        """Loading, too long and unusable schemas have their own marks; some versions send them as 500."""
        message, kind = message_of(response), kind_of(json_or_none(response))
        if kind == "exceed_context_size_error" or any(mark in message for mark in TOO_LONG):
            return InvalidInput(f"{self.name}: the prompt is longer than the server's context; shorten it")
        if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE and "loading" in message:
            return TierUnavailable(
                f"{self.name}: the server still loads its model; ask again", next_retry_delay=LOADING_RETRY
            )
        if prompt.answer_schema is not None and ("schema" in message or "grammar" in message):
            return OutputInvalid(f"{self.name}: the server cannot hold an answer to this schema; simplify it")
        return refused(self.name, response)
