"""vLLM and whatever else speaks OpenAI's chat route, in the form of it that such servers really read.

A schema goes nested under `json_schema`: unknown and misplaced fields are ignored without a word there, and
the answer would be free text with a 200.
"""

from __future__ import annotations

import hmac
from typing import Any, cast

from activities.tiers.heard import Unreadable
from activities.tiers.wire import ChatEndpoint, Said
from models.inference import Ending, Prompt

TOO_LONG = ("maximum context length", "context length", "maximum model length", "context window")
NO_SCHEMA = ("schema", "grammar", "response_format", "structured output", "guided")


class OpenAICompatible(ChatEndpoint):
    """One server with OpenAI's chat route."""

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The request; the model is the one that `identity` has let through."""
        body: dict[str, Any] = {
            "messages": [message.model_dump() for message in prompt.messages],
            "max_tokens": prompt.max_tokens,
            "temperature": prompt.temperature,
            "top_p": prompt.top_p,
            "seed": prompt.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if prompt.stop:
            body["stop"] = list(prompt.stop)
        if prompt.answer_schema is not None:
            schema = {"name": "answer", "schema": prompt.answer_schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if prompt.logprobs:
            body |= {"logprobs": True, "top_logprobs": 2}
        return body | self._salt(prompt)

    async def request(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        """With the model's name, which such servers insist on."""
        path, body = await super().request(prompt)
        return path, body | {"model": await self.identity()}

    async def identify(self) -> str:
        """The wanted model if the server lists it, else the first it lists."""
        names = [str(each["id"]) for each in await self._models() if each.get("id")]
        if not names:
            raise self.no_answer("no model in /v1/models")
        return self.settings.model if self.settings.model in names else names[0]

    async def context(self) -> int | None:
        """As vLLM says."""
        model = await self.identity()
        for each in await self._models():
            if each.get("id") == model and isinstance(each.get("max_model_len"), int):
                return each["max_model_len"]
        return None

    async def slots(self) -> int | None:
        """Nobody says."""
        return None

    async def running(self) -> int | None:
        """As vLLM's metrics say."""
        return await self.metric("vllm:num_requests_running")

    async def prompt_tokens(self, prompt: Prompt) -> int:
        """By vLLM's tokenizer route."""
        turns = [message.model_dump() for message in prompt.messages]
        return await self._tokens({"messages": turns, "add_generation_prompt": True})

    async def text_tokens(self, text: str) -> int:
        """By vLLM's tokenizer route."""
        return await self._tokens({"prompt": text, "add_special_tokens": False})

    def judge(self, said: Said, prompt: Prompt) -> Ending | None:
        """Most refusals share one status, so words decide."""
        if any(mark in said.message for mark in TOO_LONG):
            return Ending.TOO_LONG
        if prompt.answer_schema is not None and any(mark in said.message for mark in NO_SCHEMA):
            return Ending.SCHEMA_UNSUPPORTED
        return None

    def _salt(self, prompt: Prompt) -> dict[str, str]:
        secret = self.settings.cache_salt
        if secret is None:
            return {}
        # Keyed, so that nobody can meet another group in the cache by naming it.
        group = (prompt.cache_group or "").encode()
        return {"cache_salt": hmac.digest(secret.get_secret_value().encode(), group, "sha256").hex()}

    async def _models(self) -> list[dict[str, Any]]:
        found = await self.fetch("/v1/models")
        models = cast(dict[str, Any], found).get("data") if isinstance(found, dict) else None
        return [each for each in cast(list[Any], models or []) if isinstance(each, dict)]

    async def _tokens(self, body: dict[str, Any]) -> int:
        found = await self.fetch("/tokenize", body | {"model": await self.identity()})
        count = cast(dict[str, Any], found).get("count") if isinstance(found, dict) else None
        if not isinstance(count, int):
            raise Unreadable("no tokens")
        return count
