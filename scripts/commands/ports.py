"""Other ports for a short-lived stack where the usual ones are taken, as by a Temporal of your own."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

from models.memory import EmbeddingSettings
from models.settings import Settings, SiteSettings, TierSettings
from scripts.stack import Port, is_taken, ports

Part = TypeVar("Part", TierSettings, SiteSettings, EmbeddingSettings)


def with_free_ports(settings: Settings, tell: Callable[[str], None]) -> Settings:
    """The settings with a free port for each taken one; `tell` hears of each."""
    for port in ports(settings):
        if is_taken(port):
            other = free_port()
            tell(f"port {port.number} ({port.setting}) is taken; {other} serves this time")
            settings = moved(settings, port, other)
    return settings


def moved(settings: Settings, port: Port, other: int) -> Settings:
    """The settings with one port replaced wherever it stands."""
    temporal = settings.temporal
    match port.setting.partition(".")[0], port.setting:
        case _, "temporal.address":
            temporal = temporal.model_copy(update={"address": f"{port.host}:{other}"})
            return settings.model_copy(update={"temporal": temporal})
        case _, "temporal.ui_port":
            return settings.model_copy(update={"temporal": temporal.model_copy(update={"ui_port": other})})
        case "desk", _:
            return settings.model_copy(update={"desk": settings.desk.model_copy(update={"port": other})})
        case "tiers", _:
            tiers = tuple(_moved(tier, "url", tier.url, port, other) for tier in settings.tiers)
            return settings.model_copy(update={"tiers": tiers})
        case "sites", _:
            sites = tuple(_moved(site, "address", site.address, port, other) for site in settings.sites)
            return settings.model_copy(update={"sites": sites})
        case _:
            embeddings = settings.embeddings
            if embeddings is not None:
                embeddings = _moved(embeddings, "url", embeddings.url, port, other)
            return settings.model_copy(update={"embeddings": embeddings})


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _moved(part: Part, name: str, address: str, port: Port, other: int) -> Part:
    parts = urlsplit(address)
    if parts.hostname != port.host or parts.port != port.number:
        return part
    return part.model_copy(update={name: urlunsplit(parts._replace(netloc=f"{port.host}:{other}"))})
