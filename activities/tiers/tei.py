"""Hugging Face TEI's own route, which never cuts a text without a word when it is told not to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import httpx

from activities.tiers.embeddings import Embeddings, unusable
from models.memory import EmbeddingSettings

IDENTITY_SECONDS = 60.0


class Tei(Embeddings):
    """One TEI server. It takes 32 texts at most, and one too long refuses them all."""

    def __init__(
        self,
        settings: EmbeddingSettings,
        client: httpx.AsyncClient,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the settings, a client built with `wire.http_client`, and a clock that never goes back."""
        super().__init__(settings, client)
        self._clock = clock
        self._seen: float | None = None

    async def identify(self) -> None:
        """As `/info` says, now and then; `/embed` names no model."""
        now = self._clock()
        if self._seen is not None and now - self._seen < IDENTITY_SECONDS:
            return
        found = await self.fetch("/info")
        info = cast(dict[str, Any], found) if isinstance(found, dict) else {}
        name, revision = str(info.get("model_id")), info.get("model_sha")
        if self.model not in (name, f"{name}@{revision}"):
            self._seen = None
            raise unusable(f"model {name[:80]!r} at {str(revision)[:40]!r} instead of {self.model!r}")
        self._seen = now

    def request(self, texts: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """Never truncated: two long texts with one beginning would get one vector."""
        return "/embed", {"inputs": list(texts), "truncate": False, "normalize": True}

    def rows(self, body: Any) -> list[Any]:
        """A bare list, in order."""
        if not isinstance(body, list):
            raise unusable("no list of vectors")
        return cast(list[Any], body)
