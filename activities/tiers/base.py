"""What a model server is to us: one question, one answer, and whether it is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from models.inference import Completion, DataClass, Prompt


class Endpoint(Protocol):
    """One server of one tier. Retries nothing; times out by itself."""

    @property
    def name(self) -> str:
        """The tier's name."""
        ...

    async def complete(self, prompt: Prompt) -> Completion:
        """Ask once.

        Raises:
            RateLimited: the server is full; `next_retry_delay` when it said for how long.
            TierUnavailable: no answer in time, 408 or 5xx, or an answer that is none.
            InvalidInput: the server refuses the prompt for good, for instance too long.
            CredentialsRejected: 401 or 403.
            OutputInvalid: the server cannot honour the answer schema.
        """
        ...

    async def ready(self) -> bool:
        """Whether it would answer now."""
        ...

    async def aclose(self) -> None:
        """Give connections back."""
        ...


class Embedder(Protocol):
    """Turns texts into unit vectors."""

    @property
    def model(self) -> str:
        """Identity of model and revision; vectors of different models never mix."""
        ...

    @property
    def sees(self) -> frozenset[DataClass]:
        """The data classes that it may be shown; its callers see to it."""
        ...

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One unit vector per text, in order.

        Raises:
            MemoryUnavailable: the server is away.
        """
        ...
