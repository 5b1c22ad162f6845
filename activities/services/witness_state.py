"""What a co-signer has seen, in a folder that one process holds; its whole worth is that it does not forget.

A state that is gone or broken is never begun anew under the same key: with it the key could cosign a fork.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from activities.services.cosignatures import WitnessKey
from activities.services.key_files import private_key, sync_folder
from models.errors import InvalidInput

FORMAT = "countersign-witness/1"
KEY_FILE, STATE_FILE, LOCK_FILE, EVIDENCE = "witness.pem", "state.json", "lock", "evidence"
MOST_EVIDENCE = 100
EMPTY = hashlib.sha256(b"").digest()


@dataclass(frozen=True, slots=True)
class Seen:
    """The last checkpoint of a log that was cosigned."""

    size: int = 0
    root: bytes = EMPTY
    note: str = ""


class State:
    """The key, and what was cosigned with it."""

    def __init__(self, folder: Path, name: str) -> None:
        """Take hold of a folder; it is made, with a key in it, on first use.

        Raises:
            InvalidInput: another process has it, it is another co-signer's, or it is not whole.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self.name = folder, name
        self._lock = _hold(folder / LOCK_FILE)
        try:
            self._seen, public = self._found()
            if public and not (folder / KEY_FILE).exists():
                raise _unusable(folder / KEY_FILE, "the key is gone")
            self.private = private_key(folder / KEY_FILE)
            self._public = b64encode(self.private.public_key().public_bytes_raw()).decode()
            if public not in ("", self._public):
                raise _unusable(folder / KEY_FILE, "it is not the key that the state belongs to")
            self._write(self._seen)
        except BaseException:
            self.close()
            raise

    def seen(self, origin: str) -> Seen:
        """The last checkpoint of a log; of one that is new, the empty one."""
        return self._seen.get(origin, Seen())

    def remember(self, origin: str, seen: Seen) -> None:
        """Keep a checkpoint: on the disk first, and only then is it so.

        Raises:
            OSError: it could not be written; what was seen before still stands.
        """
        after = self._seen | {origin: seen}
        self._write(after)
        self._seen = after

    def keep_evidence(self, origin: str, note: str) -> None:
        """Keep two notes of one size with two roots, both signed: they show anybody that the log lies."""
        folder = self._folder / EVIDENCE
        folder.mkdir(exist_ok=True)
        path = folder / f"{hashlib.sha256(note.encode()).hexdigest()[:32]}.txt"
        if not path.exists() and len(list(folder.iterdir())) < MOST_EVIDENCE:
            _replace(path, f"{self.seen(origin).note}\n{note}")

    def close(self) -> None:
        """Let go of the folder; may be called twice."""
        self._lock.close()

    def _found(self) -> tuple[dict[str, Seen], str]:
        """What was seen, and the public key that it belongs to; an empty one before the first use."""
        path = self._folder / STATE_FILE
        if not path.exists():
            if (self._folder / KEY_FILE).exists():
                raise _unusable(path, "it is gone")
            # Before the key, so that a key without a state is always one that has forgotten.
            _replace(path, _text(self.name, "", {}))
        try:
            plain = json.loads(path.read_text("utf-8"))
            if (plain["format"], plain["name"]) != (FORMAT, self.name):
                raise ValueError(f"it is that of {plain['name']}")
            return {origin: _seen(one) for origin, one in plain["logs"].items()}, str(plain["public"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unusable(path, f"{type(error).__name__}: {error}") from None

    def _write(self, seen: Mapping[str, Seen]) -> None:
        _replace(self._folder / STATE_FILE, _text(self.name, self._public, seen))


def key_of(folder: Path) -> WitnessKey:
    """The key of the co-signer in a folder, whether it runs or not.

    Raises:
        InvalidInput: there is none.
    """
    try:
        plain = json.loads((folder / STATE_FILE).read_text("utf-8"))
        public = b64decode(plain["public"], validate=True)
        if not public:
            raise ValueError("it was stopped before it had a key")
        return WitnessKey(str(plain["name"]), public)
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidInput.field(
            "--state", str(folder), "there is no co-signer in it; serve it once"
        ) from None


def _text(name: str, public: str, seen: Mapping[str, Seen]) -> str:
    logs = {
        origin: {"size": one.size, "root": b64encode(one.root).decode(), "note": one.note}
        for origin, one in seen.items()
    }
    return json.dumps({"format": FORMAT, "name": name, "public": public, "logs": logs}, indent=1)


def _seen(plain: Any) -> Seen:
    size, root, note = plain["size"], b64decode(plain["root"], validate=True), plain["note"]
    if type(size) is not int or size < 0 or len(root) != len(EMPTY) or not isinstance(note, str):
        raise ValueError("a checkpoint in it is none")
    return Seen(size, root, note)


def _hold(path: Path) -> TextIO:
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InvalidInput.field(
            "--state", str(path.parent), "another process serves it; two would cosign past each other"
        ) from None
    return file


def _replace(path: Path, text: str) -> None:
    """Another content for a file, in full or not at all, and on the disk when this returns."""
    aside = path.with_suffix(".next")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def _unusable(path: Path, why: str) -> InvalidInput:
    remedy = f"{why}; restore it as it was last, or begin in a new folder with a new key"
    return InvalidInput.field("--state", str(path), remedy)
