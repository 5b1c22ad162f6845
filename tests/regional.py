"""A region for tests: its settings, a process of its own, and everything that leaves it."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from activities.tiers.scripted import Scripted
from models.settings import Settings
from models.visibility import Role
from scripts.supervisor import LEASH
from temporal.client import connect
from temporal.converter import codec_of
from tests.shared import LIMIT
from tests.test_agents_content import copywriter
from workers import config, logs
from workers.compose import Parts, role

ROOT = Path(__file__).parent.parent
ROLES = (Role.DECIDE, Role.INFER, Role.REMEMBER, Role.ACT, Role.DESK)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, PADDED = 0, 8
MOST = 1_000_000


@dataclass
class Recorder:
    """A proxy before Temporal that keeps every byte that is sent to it."""

    to: str
    sent: list[bytearray] = field(default_factory=list[bytearray])
    port: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        host, port = self.to.split(":")
        there, back = await asyncio.open_connection(host, int(port))
        kept = bytearray()
        self.sent.append(kept)
        with suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(_pump(reader, back, kept), _pump(there, writer, None))
        for one in (writer, back):
            one.close()

    def bytes(self) -> Iterator[bytes]:
        """What was sent, as it was, and each message of it unpacked."""
        for kept in self.sent:
            yield bytes(kept)
            yield from messages(bytes(kept))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray | None) -> None:
    while data := await reader.read(65536):
        if kept is not None:
            kept += data
        writer.write(data)
        await writer.drain()
    writer.close()


def messages(sent: bytes) -> Iterator[bytes]:
    """The gRPC messages of one client connection."""
    assert sent.startswith(PREFACE), sent[:40]
    streams: dict[int, bytearray] = {}
    at = len(PREFACE)
    while at + 9 <= len(sent):
        size, kind, flags = int.from_bytes(sent[at : at + 3]), sent[at + 3], sent[at + 4]
        stream, payload = int.from_bytes(sent[at + 5 : at + 9]), sent[at + 9 : at + 9 + size]
        at += 9 + size
        if kind == DATA and payload:
            cut = payload[0] if flags & PADDED else 0
            streams.setdefault(stream, bytearray()).extend(
                payload[1 : len(payload) - cut] if flags & PADDED else payload
            )
    for data in streams.values():
        yield from _unframed(bytes(data))


def _unframed(data: bytes) -> Iterator[bytes]:
    while len(data) >= 5:
        size = int.from_bytes(data[1:5])
        body = data[5 : 5 + size]
        yield gzip.decompress(body) if data[0] and len(body) == size else body
        data = data[5 + size :]


def forms(word: str) -> set[bytes]:
    """How a word may stand in a file or message."""
    plain = word.encode()
    escaped = json.dumps(word)[1:-1].encode()
    shifted = {_inner(b"\0" * shift + one, shift) for one in (plain, escaped) for shift in range(3)}
    return {plain, escaped, word.encode("utf-16-le"), plain.hex().encode(), *shifted}


def _inner(data: bytes, shift: int) -> bytes:
    """The part of a word's base64 that does not depend on what stands around it."""
    return base64.b64encode(data)[(0, 2, 3)[shift] : len(data) * 8 // 6]


def stands(word: str, data: bytes) -> bool:
    """Whether a word stands in some bytes: plain, escaped, encoded or packed."""
    wanted = forms(word)
    return any(form in piece for piece in _unpacked(data) for form in wanted)


def _unpacked(data: bytes) -> Iterator[bytes]:
    yield data
    seen = memoryview(data)
    for found in re.finditer(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]", data):
        with suppress(zlib.error):
            packed = seen[found.start() : found.start() + MOST]
            yield zlib.decompressobj(wbits=47).decompress(packed, MOST)


# The region's process.


@asynccontextmanager
async def process(settings: Settings) -> AsyncGenerator[subprocess.Popen[bytes]]:
    """All roles of a region in a process of its own; its log is `<data>/log`."""
    kept = settings.data / "settings.json"
    config.snapshot(settings, kept)
    argv = (sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), "--")
    argv = (*argv, sys.executable, "-m", "tests.regional")
    env = {**os.environ, config.SNAPSHOT: str(kept)}
    with open(settings.data / "log", "wb") as log:
        child = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        ready = settings.data / "ready"
        async with asyncio.timeout(LIMIT * 4):
            while not ready.exists():
                assert child.poll() is None, (settings.data / "log").read_text()
                await asyncio.sleep(0.05)
        yield child
    finally:
        child.terminate()
        await asyncio.to_thread(child.wait)


def connections(pid: int) -> set[int]:
    """Ports that a process has connections to."""
    own: set[str] = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # It was closed meanwhile.
            own.add(os.readlink(path).removeprefix("socket:[").rstrip("]"))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(row[2].split(":")[1], 16) for row in rows if row[9] in own and row[3] == "01"}


async def _main() -> None:
    settings = config.load()
    logs.start(discreet=settings.sealing.enabled)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    client = await connect(settings.temporal, codec_of(settings.sealing, settings.data))
    parts = Parts(endpoints={tier.name: Scripted(tier.name, copywriter) for tier in settings.tiers})
    async with AsyncExitStack() as stack:
        for name in ROLES:
            await stack.enter_async_context(role(client, settings, name, parts))
        ready = settings.data / "ready"
        ready.write_text(str(os.getpid()))
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(_main())
