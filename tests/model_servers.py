"""Starts the bundled model server in a process of its own, for tests that want a real one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def model_server(role: str, data: Path, *arguments: str) -> Iterator[str]:
    """The address of a server that answers; it is gone afterwards."""
    command = [sys.executable, "-m", "workers.model_server", role, "--port", "0", "--data", str(data)]
    command += ["--parent-pid", str(os.getpid()), *arguments]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stderr is not None
        try:
            yield _address(process.stderr)
        finally:
            process.terminate()
            process.stderr.close()
            assert process.wait(30) == 0


def _address(lines: Iterator[str]) -> str:
    said: list[str] = []
    for line in lines:
        said.append(line)
        if " listening on " in line:
            return line.split()[-1]
    raise AssertionError("the model server ended: " + "".join(said))
