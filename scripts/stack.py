"""The whole of Countersign on one machine: which processes, in which order, on which ports.

Everything that would make a start fail half-way (a second launcher on the same data, a taken port) is refused
before the first process starts.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from models.errors import InvalidInput
from models.loop import LOCAL
from models.memory import EmbeddingSettings
from models.settings import Settings, TierSettings
from scripts.supervisor import Child, NotReady, Report, Supervisor
from temporal import dev_server
from temporal.client import connect
from temporal.search_attributes import register
from workers import config

TEMPORAL = "temporal"
CODEC = "codec"
POLL_SECONDS = 0.05
MODEL_TIMEOUT = 180.0
"""The first start converts the embedding weights."""
THREADS = 1
"""More threads than free cores make a model slower by an order of magnitude."""

Migrate = Callable[[Settings], None]


@dataclass(frozen=True, slots=True)
class Port:
    """A port the stack will listen on, and the setting that says so."""

    setting: str
    host: str
    number: int


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs."""

    settings: Settings
    supervisor: Supervisor

    @property
    def addresses(self) -> dict[str, str]:
        """Where to look."""
        return addresses(self.settings)


@asynccontextmanager
async def stack(
    settings: Settings,
    report: Report = lambda note: None,
    migrate: Migrate | None = None,
    grace: float = 15.0,
) -> AsyncGenerator[Stack]:
    """Run everything the settings ask for; what is inside runs once all of it is ready.

    Raises:
        InvalidInput: the data folder is in use, or a port is taken; nothing was started.
        NotReady: a part did not come up; everything was stopped again.
    """
    wanted = ports(settings)
    with locked(settings):
        refuse_taken(wanted)
        await asyncio.to_thread(migrate or migrate_database, settings)
        await _reach_temporal(settings)
        kept = run_folder(settings) / "settings.json"
        config.snapshot(settings, kept)
        try:
            parts = children(settings, kept, grace)
            async with Supervisor(parts, log_folder(settings), report) as supervisor:
                yield Stack(settings, supervisor)
        finally:
            kept.unlink(missing_ok=True)


async def run_stack(
    settings: Settings, until: asyncio.Event, report: Report = lambda note: None
) -> dict[str, str]:
    """Run everything until the event is set; returns where things were."""
    async with stack(settings, report) as running:
        await until.wait()
        return running.addresses


def children(settings: Settings, kept: Path, grace: float = 15.0) -> list[Child]:
    """Every process, with `kept` as the settings file the workers read."""
    parts = [_model(name, kind, tiers, settings, grace) for name, kind, tiers in _models(settings)]
    before: tuple[str, ...] = ()
    if has_codec(settings):
        parts.append(_codec(settings, kept, grace))
    if settings.temporal.managed:
        parts.append(_temporal(settings, grace))
        before = (TEMPORAL,)
    return parts + [_role(role, settings, kept, before, grace) for role in settings.roles]


def addresses(settings: Settings) -> dict[str, str]:
    """Where to look, by name."""
    found = {f"site {site.name}": site.address for site in settings.sites}
    if settings.desk.found_at and "desk" in settings.roles:
        found["desk"] = settings.desk.found_at
    found["logs"] = str(log_folder(settings))
    if has_codec(settings):
        found["sealed payloads"] = f"{codec_address(settings)}/signin"
    if settings.temporal.managed:
        host, _ = dev_server.endpoint(settings.temporal.address)
        ui = f"http://{host}:{settings.temporal.ui_port}/namespaces/{settings.temporal.namespace}/workflows"
        return {"Temporal UI": ui, **found}
    return {"Temporal": settings.temporal.address, **found}


def run_folder(settings: Settings) -> Path:
    """Lock, settings and readiness files of a running stack."""
    return settings.data.resolve() / "run"


def log_folder(settings: Settings) -> Path:
    """One log per process."""
    return settings.data.resolve() / "log"


@contextmanager
def locked(settings: Settings) -> Generator[None]:
    """Hold the data folder for this process alone.

    Raises:
        InvalidInput: another launcher has it, or it cannot be written.
    """
    path = run_folder(settings) / "up.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise InvalidInput.field(
            "data", str(settings.data), f"name a folder you can write ({error.strerror})"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput.field("data", str(settings.data), _in_use(path)) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def holder(settings: Settings) -> str | None:
    """Process id of the launcher that runs on this data folder, if one does."""
    path = run_folder(settings) / "up.lock"
    with suppress(FileNotFoundError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "unknown"
    return None


def ports(settings: Settings) -> list[Port]:
    """Every port the stack will listen on.

    Raises:
        InvalidInput: a managed address is not on this machine, or two parts want one port.
    """
    found = _managed_ports(settings)
    if settings.temporal.managed:
        host, number = dev_server.endpoint(settings.temporal.address)
        found += [Port("temporal.address", host, number)]
        found += [Port("temporal.ui_port", host, settings.temporal.ui_port)]
    if has_codec(settings):
        found += [Port("encryption.server.port", "127.0.0.1", settings.sealing.server.port)]
    if "desk" in settings.roles:
        served = (site for site in settings.sites if site.serve)
        found += [_port(f"sites.{site.name}.address", site.address) for site in served]
        if settings.desk.found_at:
            found += [Port("desk.port", "127.0.0.1", settings.desk.port)]
    seen: dict[int, str] = {}
    for port in found:
        if port.host not in LOCAL:
            raise InvalidInput.field(port.setting, port.host, "what is started here listens on 127.0.0.1")
        if other := seen.get(port.number):
            raise InvalidInput.field(port.setting, port.number, f"{other} has that port; choose another")
        seen[port.number] = port.setting
    return found


def refuse_taken(wanted: Sequence[Port]) -> None:
    """Refuse ports somebody listens on.

    Raises:
        InvalidInput: names the port, its setting and the remedy.
    """
    for port in wanted:
        if is_taken(port):
            variable = config.PREFIX + port.setting.replace(".", "__").replace("-", "_").upper()
            raise InvalidInput.field(
                port.setting,
                port.number,
                f"the port is taken; stop what listens there, or set {port.setting} in {config.FILE} "
                f"(or {variable}) to a free one",
            )


def is_taken(port: Port) -> bool:
    """Whether a server could not listen there now."""
    family = socket.AF_INET6 if ":" in port.host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do: a port that only waits out old connections is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host, port.number))
        except OSError as error:
            return error.errno in (errno.EADDRINUSE, errno.EACCES)
    return False


def migrate_database(settings: Settings) -> None:
    """Bring the database to today's tables."""
    from activities.services.migrations import migrate

    migrate(settings.database_url)
    if settings.region_url is not None:
        migrate(settings.region_url)


async def healthy(url: str, client: httpx.AsyncClient) -> bool:
    """Whether a model server answers now."""
    try:
        return (await client.get(url.rstrip("/") + "/health")).is_success
    except httpx.HTTPError:
        return False


async def _reach_temporal(settings: Settings) -> None:
    if settings.temporal.managed or not settings.roles:
        return
    try:
        await asyncio.wait_for(dev_server.wait_ready(settings.temporal), 30)
    except TimeoutError:
        raise NotReady(
            f"temporal.address: {settings.temporal.address} did not answer within 30 s for namespace "
            f"{settings.temporal.namespace}; start it, or set temporal.managed to true"
        ) from None
    await register(await connect(settings.temporal))


def _temporal(settings: Settings, grace: float) -> Child:
    async def ready(pid: int) -> None:
        await dev_server.wait_ready(settings.temporal, dev_server.search_attributes())

    codec = codec_address(settings) if has_codec(settings) else ""
    argv = dev_server.argv(dev_server.binary(), settings.temporal, settings.data, codec)
    return Child(TEMPORAL, argv, ready, grace=grace)


def has_codec(settings: Settings) -> bool:
    """Whether the codec server is started: payloads are sealed, and it has a token and a port."""
    server = settings.sealing.server
    return settings.sealing.enabled and server.token is not None and server.port != 0


def codec_address(settings: Settings) -> str:
    """Where the codec server listens."""
    return f"http://127.0.0.1:{settings.sealing.server.port}"


def _codec(settings: Settings, kept: Path, grace: float) -> Child:
    async def ready(pid: int) -> None:
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            while not await _signs_in(settings, client):  # noqa: ASYNC110 - as for a model
                await asyncio.sleep(POLL_SECONDS)

    argv = (sys.executable, "-m", "scripts.cli", "codec")
    return Child(CODEC, argv, ready, env={config.SNAPSHOT: str(kept)}, grace=grace)


async def _signs_in(settings: Settings, client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get(f"{codec_address(settings)}/signin")).is_success
    except httpx.HTTPError:
        return False


def _role(role: str, settings: Settings, kept: Path, after: tuple[str, ...], grace: float) -> Child:
    file = run_folder(settings) / f"{role}.ready"

    async def ready(pid: int) -> None:
        await _until(lambda: _says(file, pid))

    argv = (sys.executable, "-m", "workers", role)
    return Child(role, argv, ready, after=after, env={config.SNAPSHOT: str(kept)}, grace=grace)


def _model(
    name: str,
    kind: str,
    servers: Sequence[TierSettings | EmbeddingSettings],
    settings: Settings,
    grace: float,
) -> Child:
    url = servers[0].url
    tiers = [server for server in servers if isinstance(server, TierSettings)]

    async def ready(pid: int) -> None:
        async with httpx.AsyncClient(timeout=5) as client:
            while not await healthy(url, client):  # noqa: ASYNC110 - another process has no event to await
                await asyncio.sleep(POLL_SECONDS)

    # No --parent-pid: the server would soften the leash's death signal to one it can outlast.
    argv = (
        *(sys.executable, "-m", "workers.model_server", kind, "--port", str(_port(name, url).number)),
        *("--data", str(settings.data.resolve()), "--threads", str(THREADS)),
        *("--parallel", str(max((tier.concurrency for tier in tiers), default=1))),
        *("--context", str(max((tier.context_tokens for tier in tiers), default=4096))),
    )
    return Child(name, argv, ready, timeout=MODEL_TIMEOUT, grace=grace)


def _models(
    settings: Settings,
) -> Iterator[tuple[str, str, list[TierSettings | EmbeddingSettings]]]:
    """Name, kind and users of every model server; tiers with one url share one."""
    by_url: dict[str, list[TierSettings | EmbeddingSettings]] = {}
    for tier in settings.tiers:
        if tier.managed:
            by_url.setdefault(tier.url, []).append(tier)
    for tiers in by_url.values():
        names = "-".join(tier.name for tier in tiers if isinstance(tier, TierSettings))
        yield f"model-{names}", "chat", tiers
    if settings.embeddings and settings.embeddings.managed:
        yield "model-embeddings", "embed", [settings.embeddings]


def _managed_ports(settings: Settings) -> list[Port]:
    urls: dict[str, str] = {}
    for tier in settings.tiers:
        if tier.managed:
            urls.setdefault(tier.url, f"tiers.{tier.name}.url")
    found = [_port(setting, url) for url, setting in urls.items()]
    if settings.embeddings and settings.embeddings.managed:
        found.append(_port("embeddings.url", settings.embeddings.url))
    return found


def _port(setting: str, url: str) -> Port:
    parts = urlsplit(url)
    try:
        number = parts.port
    except ValueError:
        number = None
    if parts.hostname is None or not number:
        raise InvalidInput.field(setting, url, "write it with host and port, as http://127.0.0.1:8090")
    return Port(setting, parts.hostname, number)


def _in_use(path: Path) -> str:
    pid = path.read_text().strip() or "unknown"
    return f"`countersign up` already runs on it (pid {pid}); stop that one, or set data to another folder"


def _says(file: Path, pid: int) -> bool:
    with suppress(FileNotFoundError):
        return file.read_text().strip() == str(pid)
    return False


async def _until(happened: Callable[[], bool]) -> None:
    while not happened():  # noqa: ASYNC110 - another process has no event to await
        await asyncio.sleep(POLL_SECONDS)
