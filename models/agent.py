"""What an agent says of itself."""

from __future__ import annotations

from datetime import timedelta

from models.loop import Frozen, Name


class AgentSpec(Frozen):
    """An agent's name and habits; policy decides what it may do."""

    name: Name
    summary: str
    """One line for lists and for the Temporal UI."""
    revisions_per_run: int = 20
    """After so many intents the run continues as new, so that its history stays small."""
    think: timedelta = timedelta(hours=6)
    """How long proposing may take before the run fails."""
