"""Co-signers as settings name them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from models.loop import Frozen


class CosignerSettings(Frozen):
    """A process of somebody else that cosigns the ledger's checkpoints (C2SP tlog-witness)."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s]+$")]
    """Where `add-checkpoint` is asked for. Nothing secret goes there, and what comes back is signed."""
    key: Annotated[str, StringConstraints(pattern=r"^[^\s+]+\+[0-9a-f]{8}\+[A-Za-z0-9+/]{44}$")]
    """Name and public key, as `countersign witness key` prints them; from where you trust them."""
    timeout_seconds: int = Field(default=10, ge=1, le=120)
    """For the whole answer."""
