"""A real Weaviate for tests, in a folder and on ports of its own, that can be killed and started again."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

import httpx

from models.memory import WeaviateSettings

ROOT = Path(__file__).parents[1]
BINARY = ROOT / "var" / "bin" / "weaviate-server"
PORTS = 6
MISSING = "run scripts/targets/weaviate.sh install first"


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_block()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> WeaviateSettings:
        return WeaviateSettings(port=self.port, grpc_port=self.port + 1)

    def start(self) -> None:
        script = ROOT / "scripts" / "targets" / "weaviate.sh"
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log", "ab") as log:
            argv = ["sh", str(script), "run", str(self.folder), str(self.port)]
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        give_up = time.monotonic() + 60
        while not self._ready():
            assert self.process.poll() is None and time.monotonic() < give_up, (
                self.folder / "log"
            ).read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def _ready(self) -> bool:
        try:
            url = f"http://127.0.0.1:{self.port}/v1/.well-known/ready"
            return httpx.get(url, trust_env=False, timeout=2).is_success
        except httpx.HTTPError:
            return False


def _free_block() -> int:
    """The first of six ports that are free now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        if first + PORTS < 65536 and all(_free(port) for port in range(first, first + PORTS)):
            return first


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
