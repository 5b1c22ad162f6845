"""Which adapter speaks to which kind of server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import httpx

from activities.tiers.embeddings import Embeddings, OpenAIEmbeddings
from activities.tiers.llama_cpp import LlamaCpp
from activities.tiers.openai_compatible import OpenAICompatible
from activities.tiers.tei import Tei
from activities.tiers.tgi import Tgi, TgiGenerate
from activities.tiers.wire import ChatEndpoint
from models.memory import EmbeddingSettings
from models.settings import TierSettings

CHAT: Mapping[tuple[str, str], type[ChatEndpoint]] = {
    ("llama_cpp", "chat"): LlamaCpp,
    ("tgi", "chat"): Tgi,
    ("tgi", "generate"): TgiGenerate,
    ("openai_compatible", "chat"): OpenAICompatible,
}
EMBED: Mapping[str, type[Embeddings]] = {
    "llama_cpp": Embeddings,
    "openai_compatible": OpenAIEmbeddings,
    "tei": Tei,
}


def chat_endpoint(
    settings: TierSettings,
    client: httpx.AsyncClient,
    accepted: Callable[[], Awaitable[str | None]] | None = None,
) -> ChatEndpoint:
    """The adapter for a tier, over a client built with `wire.http_client`."""
    return CHAT[settings.kind, settings.route](settings, client, accepted=accepted)


def embedder(settings: EmbeddingSettings, client: httpx.AsyncClient) -> Embeddings:
    """The adapter for an embedding server."""
    return EMBED[settings.kind](settings, client)
