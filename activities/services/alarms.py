"""Alarms about the ledger, told on channels: no run waits for them, and nobody reads log files at night."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from activities.services.notices import Channel
from models.canonical import derived_id
from models.errors import CountersignError

log = logging.getLogger(__name__)
Key = tuple[str, str, str]


class Alarm(NamedTuple):
    """What is wrong with the log of a tenant."""

    tenant: str
    kind: str
    """One of the words in docs/ledger.md."""
    witness: str
    """Who says so; empty is this process itself."""
    text: str

    @property
    def key(self) -> Key:
        """What makes it the same alarm, however its text goes on."""
        return self.tenant, self.kind, self.witness


@dataclass(frozen=True, slots=True)
class Raised:
    """An alarm as channels tell it."""

    alarm: Alarm
    since: datetime
    """When it was first seen; seen again after it was over, it is another one."""

    @property
    def id(self) -> str:
        """The same for every attempt."""
        return f"alarm-{derived_id('alarm', *self.alarm.key, self.since.isoformat())}"

    @property
    def title(self) -> str:
        """In one line."""
        return f"ALARM: the ledger of {self.alarm.tenant}: {self.alarm.kind}"

    def text(self) -> str:
        """What is wrong, and what to do first."""
        return (
            f"{self.alarm.text}\n\nSeen since {self.since.isoformat()}. Stop what acts, keep the database "
            "as it is, and look:\n\n    countersign ledger verify\n"
        )

    def body(self) -> bytes:
        """For programs."""
        said = {"id": self.id, "tenant": self.alarm.tenant, "alarm": self.alarm.kind}
        return json.dumps(said | {"since": self.since.isoformat()}, sort_keys=True).encode()


class Alarms:
    """Tells each alarm once on every channel for as long as it lasts; what one does not take, again later."""

    def __init__(self, channels: Mapping[str, Channel], clock: Callable[[], datetime]) -> None:
        """The channels that are to hear of it, by name."""
        self._channels = channels
        self._clock = clock
        self._lasting = dict[Key, Raised]()
        self._told = set[tuple[str, Key]]()

    async def tell(self, alarms: Sequence[Alarm]) -> None:
        """Tell what is wrong now, all of it; what is not among it any more is over."""
        now = self._clock()
        known = self._lasting
        self._lasting = {one.key: known.get(one.key) or Raised(one, now) for one in alarms}
        self._told = {(name, key) for name, key in self._told if key in self._lasting}
        for name, channel in self._channels.items():
            for key, raised in self._lasting.items():
                if (name, key) not in self._told and await _taken(name, channel, raised, now):
                    self._told.add((name, key))


async def _taken(name: str, channel: Channel, raised: Raised, now: datetime) -> bool:
    try:
        await channel.send(raised, now)
    except CountersignError as error:
        log.error("channel %s was not told that %s: %s", name, raised.title, error.message)
        return False
    return True
