"""Settings of the channels on which people hear that something waits."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import quote

from pydantic import Field, SecretStr, StringConstraints

from models.business_hours import is_known
from models.loop import Frozen, Name
from models.notices import INBOX, named_in
from models.policy import Policy

Address = Annotated[str, StringConstraints(pattern=r"^[^\s@<>,;]{1,100}@[^\s@<>,;]{1,200}$")]


class EmailSettings(Frozen):
    """E-mail by SMTP."""

    name: Name
    kind: Literal["email"]
    host: str
    port: int = Field(default=25, ge=1, le=65535)
    starttls: bool = False
    user: str | None = None
    token: SecretStr | None = None
    """The password that goes with `user`."""
    sender: Address
    to: tuple[Address, ...] = Field(min_length=1)
    timeout_seconds: int = Field(default=20, ge=1)


class WebhookSettings(Frozen):
    """A signed POST."""

    name: Name
    kind: Literal["webhook"]
    url: Annotated[str, StringConstraints(pattern=r"^https?://\S+$")]
    token: SecretStr = Field(min_length=16)
    """The key of the HMAC; the receiver has the same one."""


class TerminalSettings(Frozen):
    """A file per notice in `<data>/notices/<name>`, for somebody who watches that folder."""

    name: Name
    kind: Literal["terminal"]


ChannelSettings = Annotated[EmailSettings | WebhookSettings | TerminalSettings, Field(discriminator="kind")]


class DeskSettings(Frozen):
    """The pages on which people read what waits, and answer it; programs too."""

    port: int = Field(default=8236, ge=0, le=65535)
    """On 127.0.0.1."""
    token: SecretStr | None = None
    """At least 16 characters, for everybody who may read and answer; without it there are no pages."""
    address: str = Field(default="", pattern=r"^(https?://[^/\s]+)?$")
    """Where people find them, if something stands in front, as `https://desk.example.com`."""

    @property
    def found_at(self) -> str:
        """Where people find the pages; empty if there are none."""
        served = self.token is not None and self.port != 0
        return (self.address or f"http://127.0.0.1:{self.port}") if served else ""


def path_of(run: str) -> str:
    """Where the desk has the page of a run."""
    return f"/runs/{quote(run, safe='')}"


def mistake(
    channels: tuple[ChannelSettings, ...], policy: Policy, alarmed: tuple[str, ...] = ()
) -> str | None:
    """What is wrong between the channels and those who name them, if anything; the ledger names `alarmed`."""
    names = [channel.name for channel in channels]
    if INBOX in names or len(set(names)) < len(names):
        return f"names must differ, and {INBOX} is always there; rename one"
    if lost := [name for name in alarmed if name not in names]:
        return f"ledger.notify names {lost[0]}, which is no channel; add it under [[channels]]"
    for agent, one in policy.agents.items():
        unknown = [name for name in named_in(one.gate) if name not in names]
        if unknown:
            return f"policy of {agent} names {unknown[0]}, which is no channel; add it under [[channels]]"
        hours = one.gate.hours
        if hours is not None and not is_known(hours.zone):
            return f"policy of {agent} names the time zone {hours.zone!r}; write one as Europe/Berlin"
    return None
