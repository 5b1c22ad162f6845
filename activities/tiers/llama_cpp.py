"""llama.cpp's server: it holds answers to a JSON schema, and its defaults are never relied on."""

from __future__ import annotations

from typing import Any, cast

from activities.tiers.heard import Unreadable
from activities.tiers.wire import ChatEndpoint, Said
from models.inference import Ending, Prompt

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

    # After a stream it promises to keep the connection and closes it; the next request would be lost.
    keeps_connections = False
    names_itself = True

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
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_prompt": False,
        }
        if prompt.answer_schema is not None:
            # The flat form the server's README shows is read as an empty schema.
            schema = {"name": "answer", "schema": prompt.answer_schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if prompt.logprobs:
            body |= {"logprobs": True, "top_logprobs": 2}
        return body

    async def identify(self) -> str:
        """The alias or file the server was started with."""
        models = (await self._props("/v1/models")).get("data")
        first = cast(list[Any], models)[0] if isinstance(models, list) and models else None
        name = cast(dict[str, Any], first).get("id") if isinstance(first, dict) else None
        if not isinstance(name, str) or not name:
            raise self.no_answer("no model in /v1/models")
        return name

    async def context(self) -> int | None:
        """What one slot may use; the context is shared out among the slots."""
        defaults = (await self._props("/props")).get("default_generation_settings")
        tokens = cast(dict[str, Any], defaults).get("n_ctx") if isinstance(defaults, dict) else None
        return tokens if isinstance(tokens, int) else None

    async def slots(self) -> int | None:
        """Its slots; what comes on top waits in a queue without bound."""
        slots = (await self._props("/props")).get("total_slots")
        return slots if isinstance(slots, int) else None

    async def running(self) -> int | None:
        """Slots at work, if it was started with metrics."""
        return await self.metric("llamacpp:requests_processing")

    async def prompt_tokens(self, prompt: Prompt) -> int:
        """By its own template and tokenizer."""
        turns = [message.model_dump() for message in prompt.messages]
        text = (await self._props("/apply-template", {"messages": turns})).get("prompt")
        if not isinstance(text, str):
            raise Unreadable("no prompt from its template")
        return await self._tokens(text, special=True)

    async def text_tokens(self, text: str) -> int:
        """By its own tokenizer."""
        return await self._tokens(text, special=False)

    def judge(self, said: Said, prompt: Prompt) -> Ending | None:
        """Too long and unusable schemas have their own marks; some versions send them as 500."""
        if said.kind == "exceed_context_size_error" or any(mark in said.message for mark in TOO_LONG):
            return Ending.TOO_LONG
        if prompt.answer_schema is not None and ("schema" in said.message or "grammar" in said.message):
            return Ending.SCHEMA_UNSUPPORTED
        return None

    async def _props(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        found = await self.fetch(path, body)
        if not isinstance(found, dict):
            raise Unreadable(f"no JSON object in {path}")
        return cast(dict[str, Any], found)

    async def _tokens(self, text: str, special: bool) -> int:
        body = {"content": text, "add_special": special, "parse_special": special}
        tokens = (await self._props("/tokenize", body)).get("tokens")
        if not isinstance(tokens, list):
            raise Unreadable("no tokens")
        return len(cast(list[Any], tokens))
