"""Processes that write to one SQLite file take turns, first come, first served.

SQLite only tries again after longer and longer naps, so that a busy process starves the others. It stays
correct without: this lock is a courtesy, and whoever holds it for long, perhaps stopped, is passed over.
"""

from __future__ import annotations

import fcntl
import os
import queue
import threading
from contextlib import suppress

COURTESY_SECONDS = 1.0


class Turns:
    """The turns of one process, which has one writer; without a path everybody always has theirs."""

    def __init__(self, path: str | None, courtesy: float = COURTESY_SECONDS) -> None:
        """Open nothing yet; wait for others for `courtesy` seconds."""
        self._path = path
        self._courtesy = courtesy
        self._file: int | None = None
        self._held = False
        self._line: _Line | None = None

    def __enter__(self) -> None:
        """Wait for the turn."""
        if self._path is None:
            return
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._held = self._take(self._file) or self._queue(self._file)

    def __exit__(self, *_: object) -> None:
        """Let the next one have theirs."""
        if self._held and self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._held = False

    def close(self) -> None:
        """Give the file back."""
        if self._line is not None and not self._line.leave():
            return  # Whoever still stands in line needs the file, until the end of the process.
        if self._file is not None:
            os.close(self._file)
            self._file = self._line = None

    def _take(self, file: int) -> bool:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def _queue(self, file: int) -> bool:
        if self._line is None:
            self._line = _Line(file)
        return self._line.wait(self._courtesy)


class _Line:
    """Stands in the kernel's line for the lock, which is in order of arrival but knows no time-out."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._granted = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._awaited = self._standing = False
        # Nothing must wait for a thread that waits for another process.
        self._thread = threading.Thread(target=self._run, name="database-turns", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether the lock is held now; given up after so long, and not tried while that goes on."""
        with self._lock:
            if self._standing:
                return False
            self._awaited = self._standing = True
        self._asked.put(True)
        if self._granted.acquire(timeout=seconds):
            return True
        with self._lock:
            self._awaited = False
        # It may have been granted in that very moment.
        return self._granted.acquire(blocking=False)

    def leave(self) -> bool:
        """End, unless it still stands in line."""
        with self._lock:
            if self._standing:
                return False
        self._asked.put(False)
        self._thread.join()
        return True

    def _run(self) -> None:
        while self._asked.get():
            fcntl.flock(self._file, fcntl.LOCK_EX)
            with self._lock:
                self._standing = False
                if self._awaited:
                    self._granted.release()
                else:
                    fcntl.flock(self._file, fcntl.LOCK_UN)
