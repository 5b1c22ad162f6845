"""A target that is slow and promises nothing: a letter that was sent arrives a while later, whatever happens
to its sender, and one that is sent twice arrives twice.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from activities.connectors.base import Applied, Dry, Work
from models.errors import ConnectorRejected, ConnectorUnavailable
from models.loop import Guarantee, Reversibility

QUICK, SLOW = 0.4, 4.0
"""Seconds until a letter arrives. A slow one arrives long after its sender was missed and replaced."""
SETTLE = timedelta(seconds=SLOW + 0.5)
POLL = 0.02
VERSION = "0"


class Letters:
    """Sends letters. `asked`: those that arrived can be looked up. `blind`: nothing can."""

    def __init__(
        self,
        folder: Path,
        guarantee: Guarantee,
        clock: Callable[[], datetime],
        sent: Callable[[str], None],
    ) -> None:
        """`sent` is told `sent` when a letter is on its way, before it arrives."""
        self.name: str = guarantee.value
        self.guarantee = guarantee
        self.settle = SETTLE
        self._folder = folder / guarantee.value
        self._folder.mkdir(parents=True, exist_ok=True)
        self._clock = clock
        self._sent = sent

    async def plan(self, work: Work) -> Dry:
        """Show the letter."""
        text = str(work.arguments["text"])
        return Dry(f"{self.name}:letters", VERSION, f"+{text}\n", Reversibility.IRREVERSIBLE, "not at all")

    async def find(self, key: str, work: Work) -> Applied | None:
        """Look for a letter that has arrived."""
        if self.guarantee is Guarantee.BLIND:
            raise ConnectorUnavailable("letters: nobody can be asked")
        return next((Applied(path.name, VERSION) for path in self._arrived() if _key(path) == key), None)

    async def apply(self, key: str, work: Work, expected: str, deadline: datetime) -> Applied:
        """Send a letter and wait until it arrives."""
        if self._clock() >= deadline:
            raise ConnectorUnavailable("letters: the attempt's deadline has passed; nothing was sent")
        path = self._folder / uuid.uuid4().hex
        draft = path.with_suffix(".draft")
        # By a clock that all processes share, and that nobody can set.
        draft.write_text(
            json.dumps({"key": key, "arrives": time.monotonic() + float(work.arguments["seconds"])})
        )
        draft.rename(path)
        self._sent("sent")
        while path not in self._arrived():  # noqa: ASYNC110 - the post has no event to await
            await asyncio.sleep(POLL)
        return Applied(path.name, VERSION)

    async def verify(self, work: Work, applied: Applied) -> Applied:
        """The answer was the proof."""
        return applied

    async def undo(self, key: str, work: Work, applied: Applied, deadline: datetime) -> Applied:
        """A letter cannot be called back."""
        raise ConnectorRejected("letters: cannot be called back")

    def keys(self) -> list[str]:
        """The key of every letter that was sent, as often as it was."""
        return [_key(path) for path in self._letters()]

    def _letters(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if not path.suffix]

    def _arrived(self) -> list[Path]:
        now = time.monotonic()
        return [path for path in self._letters() if json.loads(path.read_text())["arrives"] <= now]


def _key(path: Path) -> str:
    return str(json.loads(path.read_text())["key"])
