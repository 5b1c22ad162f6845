from __future__ import annotations

import asyncio
import hashlib
import json
import os
import struct
import threading
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from activities.services import merkle
from activities.services.cosignatures import WitnessKey, body_of, cosign, cosigned_at, cosigners, forged
from activities.services.cosigner import SIZE_TYPE, Cosigner, Reply
from activities.services.cosigner_server import LIMIT_BYTES, CosignerServer
from activities.services.notes import NoteKey, Tree, checkpoint_text, sign
from activities.services.witness_state import EVIDENCE, STATE_FILE, Seen, State, key_of
from models.errors import InvalidInput

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
ORIGIN = "ledger.example.com/default"
LOG = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = NoteKey(ORIGIN, LOG.public_key().public_bytes_raw())
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
WITNESS = WitnessKey("witness.example.com/w1", PRIVATE.public_key().public_bytes_raw())


class Leaves:
    """A log in memory; `fork` is another one that begins with the same leaves."""

    def __init__(self, count: int, fork: int | None = None) -> None:
        self.hashes = [
            merkle.leaf_hash(f"{'fork' if fork is not None and n >= fork else 'leaf'} {n}".encode())
            for n in range(count)
        ]

    def root(self, size: int) -> bytes:
        return merkle.root_of(merkle.extend(0, [], self.hashes[:size])[0])

    def note(self, size: int, key: NoteKey = KEY, private: Ed25519PrivateKey = LOG) -> str:
        return sign(checkpoint_text(Tree(key.name, size, self.root(size))), key, private)

    def proof(self, old: int, new: int) -> list[bytes]:
        def subtree(level: int, index: int) -> bytes:
            part = self.hashes[index << level : (index + 1) << level]
            return merkle.root_of(merkle.extend(0, [], part)[0])

        return merkle.consistency_proof(old, new, subtree) if old else []

    def request(self, old: int, new: int, proof: list[bytes] | None = None) -> bytes:
        return request(old, self.proof(old, new) if proof is None else proof, self.note(new))


def request(old: int, proof: list[bytes], note: str) -> bytes:
    lines = "".join(f"{b64encode(one).decode()}\n" for one in proof)
    return f"old {old}\n{lines}\n{note}".encode()


LEAVES = Leaves(40)
FORK = Leaves(40, fork=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "witness"


@pytest.fixture
def state(folder: Path) -> Iterator[State]:
    made = State(folder, "witness.example.com/w1")
    yield made
    made.close()


@pytest.fixture
def cosigner(state: State) -> Cosigner:
    return Cosigner(state, [KEY], lambda: NOW)


def is_cosigned(reply: Reply, note: str, cosigner: Cosigner) -> bool:
    at = cosigned_at(body_of(note), reply.text.removesuffix("\n"), cosigner.key)
    return reply.status == 200 and at == NOW


# The format.


def test_a_cosignature_is_what_the_specification_says() -> None:
    note = LEAVES.note(7)
    line = cosign(body_of(note), WITNESS, PRIVATE, NOW)
    mark, name, encoded = line.split(" ")
    data = b64decode(encoded)
    name_bytes = b"witness.example.com/w1"
    assert (mark, name) == ("—", name_bytes.decode())
    assert data[:4] == hashlib.sha256(name_bytes + b"\n\x04" + WITNESS.public).digest()[:4]
    seconds = int(NOW.timestamp())
    assert data[4:12] == struct.pack(">Q", seconds)
    text = note.partition("\n\n")[0] + "\n"
    PRIVATE.public_key().verify(data[12:], f"cosignature/v1\ntime {seconds}\n{text}".encode())
    assert cosigned_at(text, line, WITNESS) == NOW


def test_the_key_ids_of_the_examples_in_the_specification_have_the_length_of_ours() -> None:
    # c2sp.org/tlog-cosignature: the example line of witness.example.com/w1.
    line = (
        "— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1n"
        "PZqhf5nNo0xUe+mbIUBkBIfZ+qnA=="
    )
    data = b64decode(line.split(" ")[2])
    assert len(data) == len(b64decode(cosign("a\n", WITNESS, PRIVATE, NOW).split(" ")[2])) == 76
    assert struct.unpack(">Q", data[4:12]) == (1679315147,)


def test_a_witness_key_is_written_and_read_back_and_is_no_log_key() -> None:
    assert WitnessKey.parse(str(WITNESS)) == WITNESS
    with pytest.raises(InvalidInput, match="witness key: "):
        WitnessKey.parse(str(NoteKey(WITNESS.name, WITNESS.public)))
    with pytest.raises(InvalidInput, match="key: "):
        NoteKey.parse(str(WITNESS))


def test_any_changed_character_of_a_cosignature_is_seen() -> None:
    note = LEAVES.note(7)
    line = cosign(body_of(note), WITNESS, PRIVATE, NOW)
    for place, character in enumerate(line):
        for other in {"A", "B", "9", "=", " "} - {character}:
            changed = line[:place] + other + line[place + 1 :]
            assert cosigned_at(body_of(note), changed, WITNESS) is None, (place, other)
    assert cosigned_at(body_of(LEAVES.note(8)), line, WITNESS) is None


def test_one_key_under_two_names_is_one_witness() -> None:
    twin = WitnessKey("other.example.com", WITNESS.public)
    note = LEAVES.note(7)
    both = note + "".join(f"{cosign(body_of(note), key, PRIVATE, NOW)}\n" for key in (WITNESS, twin))
    assert len(cosigners(both, [WITNESS, twin])) == 1
    assert forged(both, [WITNESS, twin]) == []
    stolen = cosign(body_of(LEAVES.note(6)), WITNESS, PRIVATE, NOW)
    assert forged(f"{note}{stolen}\n", [WITNESS, twin]) == [WITNESS.name]


# What is answered.


def test_a_log_that_grows_is_cosigned_each_time(cosigner: Cosigner) -> None:
    old = 0
    for size in (1, 2, 3, 7, 8, 8, 21, 40):
        assert is_cosigned(cosigner.add(LEAVES.request(old, size)), LEAVES.note(size), cosigner), size
        old = size


def test_a_wrong_old_size_is_told_the_right_one(cosigner: Cosigner) -> None:
    assert cosigner.add(LEAVES.request(0, 7)).status == 200
    for old, new in ((0, 9), (3, 9), (6, 6), (8, 9)):
        assert cosigner.add(LEAVES.request(old, new)) == Reply(409, "7\n", SIZE_TYPE)


def test_a_fork_is_never_cosigned_and_two_notes_of_one_size_are_kept_as_evidence(
    cosigner: Cosigner, folder: Path
) -> None:
    assert cosigner.add(LEAVES.request(0, 7)).status == 200
    assert cosigner.add(request(7, [], FORK.note(7))) == Reply(409, "7\n", SIZE_TYPE)
    for proof in ([], FORK.proof(7, 12), LEAVES.proof(7, 12)):
        assert cosigner.add(request(7, proof, FORK.note(12))).status == 422
    for _ in range(2):
        assert cosigner.add(request(7, [], FORK.note(7))).status == 409
    [evidence] = (folder / EVIDENCE).iterdir()
    assert evidence.read_text() == f"{LEAVES.note(7)}\n{FORK.note(7)}"
    assert is_cosigned(cosigner.add(LEAVES.request(7, 12)), LEAVES.note(12), cosigner)


def test_strangers_and_unknown_logs_are_refused(cosigner: Cosigner) -> None:
    thief = Ed25519PrivateKey.generate()
    assert cosigner.add(request(0, [], LEAVES.note(7, private=thief))).status == 403
    other = NoteKey("elsewhere.example.com/default", KEY.public)
    assert cosigner.add(request(0, [], LEAVES.note(7, key=other))).status == 404
    tampered = LEAVES.note(7).replace("\n7\n", "\n8\n")
    assert cosigner.add(request(0, [], tampered)).status == 403


def test_a_log_whose_key_was_rotated_has_two_keys(state: State) -> None:
    newer = Ed25519PrivateKey.generate()
    key = NoteKey(ORIGIN, newer.public_key().public_bytes_raw())
    cosigner = Cosigner(state, [KEY, key], lambda: NOW)
    assert cosigner.add(LEAVES.request(0, 7)).status == 200
    assert cosigner.add(request(7, LEAVES.proof(7, 9), LEAVES.note(9, key, newer))).status == 200


def test_lines_that_a_checkpoint_adds_are_cosigned_with_it(cosigner: Cosigner) -> None:
    note = sign(f"{checkpoint_text(Tree(ORIGIN, 7, LEAVES.root(7)))}more\n", KEY, LOG)
    assert is_cosigned(cosigner.add(request(0, [], note)), note, cosigner)


GOOD = LEAVES.request(3, 7).decode()
BAD: dict[str, Callable[[str], str]] = {
    "nothing": lambda good: "",
    "no old size": lambda good: good.replace("old 3\n", ""),
    "a size with a zero in front": lambda good: good.replace("old 3", "old 03"),
    "a negative size": lambda good: good.replace("old 3", "old -3"),
    "a size in other digits": lambda good: good.replace("old 3", "old ٣"),
    "a size beyond all": lambda good: good.replace("old 3", "old " + "9" * 5000),
    "two spaces": lambda good: good.replace("old 3", "old  3"),
    "a carriage return": lambda good: good.replace("old 3\n", "old 3\r\n"),
    "a proof that is no base64": lambda good: good.replace("old 3\n", "old 3\n!!!\n"),
    "a hash that is too short": lambda good: good.replace("old 3\n", "old 3\nAAAA\n"),
    "a proof of 64 lines": lambda good: good.replace("old 3\n", "old 3\n" + f"{'A' * 43}=\n" * 64),
    "no empty line": lambda good: good.replace("\n\n", "\n"),
    "no signature": lambda good: good.rpartition("\n\n")[0] + "\n",
    "no end of line": lambda good: good.removesuffix("\n"),
    "a root that is none": lambda good: good.replace("\n7\n", "\n7\nAAAA\n"),
    "a size that is none": lambda good: good.replace("\n7\n", "\nseven\n"),
    "an old size that is larger": lambda good: good.replace("old 3", "old 8"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_malformed_is_a_bad_request_and_changes_nothing(cosigner: Cosigner, bad: str) -> None:
    assert cosigner.add(LEAVES.request(0, 3)).status == 200
    assert cosigner.add(BAD[bad](GOOD).encode()).status == 400
    assert cosigner.add(GOOD.encode()).status == 200


@given(st.binary(max_size=400) | st.text(max_size=400).map(lambda text: f"old 0\n\n{text}".encode()))
def test_rubbish_is_answered_and_never_an_exception(body: bytes) -> None:
    class Nothing(State):
        def __init__(self) -> None:
            self.name, self.private = "w", PRIVATE

    assert Cosigner(Nothing(), [KEY], lambda: NOW).add(body).status in (400, 403, 404)


def test_no_flipped_bit_of_a_request_is_cosigned_as_something_else() -> None:
    class Remembering(State):
        def __init__(self) -> None:
            self.name, self.private = "w", PRIVATE
            self.kept = Seen(3, LEAVES.root(3), LEAVES.note(3))

        def seen(self, origin: str) -> Seen:
            return self.kept

        def remember(self, origin: str, seen: Seen) -> None:
            self.kept = seen

        def keep_evidence(self, origin: str, note: str) -> None:
            raise AssertionError("nobody signed another root")

    state, good = Remembering(), GOOD.encode()
    for at in range(len(good)):
        for bit in range(8):
            changed = good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :]
            assert Cosigner(state, [KEY], lambda: NOW).add(changed).status != 200, (at, bit)
    assert state.kept.size == 3


# What is remembered.


def test_what_was_cosigned_is_on_the_disk_before_the_signature_leaves(
    cosigner: Cosigner, state: State, folder: Path
) -> None:
    assert cosigner.add(LEAVES.request(0, 7)).status == 200
    plain = json.loads((folder / STATE_FILE).read_text())
    assert plain["logs"][ORIGIN]["size"] == 7
    state.close()
    again = State(folder, "witness.example.com/w1")
    after = Cosigner(again, [KEY], lambda: NOW)
    assert after.key == cosigner.key == key_of(folder)
    assert after.add(request(7, FORK.proof(7, 9), FORK.note(9))).status == 422
    assert after.add(LEAVES.request(0, 9)) == Reply(409, "7\n", SIZE_TYPE)
    assert after.add(LEAVES.request(7, 9)).status == 200
    again.close()


def test_nothing_is_cosigned_that_could_not_be_written(cosigner: Cosigner, folder: Path) -> None:
    assert cosigner.add(LEAVES.request(0, 7)).status == 200
    (folder / "state.next").mkdir()
    with pytest.raises(OSError):
        cosigner.add(LEAVES.request(7, 9))
    (folder / "state.next").rmdir()
    assert cosigner.add(LEAVES.request(9, 12)) == Reply(409, "7\n", SIZE_TYPE)
    assert cosigner.add(LEAVES.request(7, 12)).status == 200


def test_a_write_that_was_cut_short_leaves_the_state_before_it(
    cosigner: Cosigner, state: State, folder: Path
) -> None:
    assert cosigner.add(LEAVES.request(0, 7)).status == 200
    state.close()
    (folder / "state.next").write_text('{"format": "countersign-wit')
    again = State(folder, "witness.example.com/w1")
    assert again.seen(ORIGIN).size == 7
    again.close()


def test_a_co_signer_that_has_forgotten_does_not_begin_anew_under_its_key(
    cosigner: Cosigner, state: State, folder: Path
) -> None:
    assert cosigner.add(LEAVES.request(0, 7)).status == 200
    state.close()
    path = folder / STATE_FILE
    whole = path.read_text()
    for broken in (whole[:-30], "{}", "[]", whole.replace('"size": 7', '"size": -7'), ""):
        path.write_text(broken)
        with pytest.raises(InvalidInput, match="--state"):
            State(folder, "witness.example.com/w1")
    path.unlink()
    with pytest.raises(InvalidInput, match="it is gone"):
        State(folder, "witness.example.com/w1")
    path.write_text(whole)
    with pytest.raises(InvalidInput, match="that of witness.example.com/w1"):
        State(folder, "another")
    (folder / "witness.pem").rename(folder / "elsewhere.pem")
    with pytest.raises(InvalidInput, match="the key is gone"):
        State(folder, "witness.example.com/w1")
    assert not (folder / "witness.pem").exists()


def test_two_processes_cannot_have_one_state(state: State, folder: Path) -> None:
    with pytest.raises(InvalidInput, match="another process"):
        State(folder, "witness.example.com/w1")
    state.close()
    State(folder, "witness.example.com/w1").close()


def test_a_crash_before_the_key_was_made_is_no_loss(folder: Path) -> None:
    folder.mkdir()
    (folder / STATE_FILE).write_text(
        json.dumps({"format": "countersign-witness/1", "name": "w", "public": "", "logs": {}})
    )
    with pytest.raises(InvalidInput, match="serve it once"):
        key_of(folder)
    State(folder, "w").close()
    assert key_of(folder).name == "w"


def test_of_many_requests_at_once_one_lineage_is_cosigned(cosigner: Cosigner) -> None:
    """Threads race with a log and its fork; whatever was cosigned must continue one from the other."""
    assert cosigner.add(LEAVES.request(0, 3)).status == 200
    start, signed = threading.Barrier(8), list[tuple[int, bytes]]()

    def push(leaves: Leaves, sizes: range) -> None:
        start.wait()
        for size in sizes:
            told = 3
            for _ in range(40):
                reply = cosigner.add(leaves.request(told, size) if told <= size else b"old 0\n\n")
                if reply.status == 200:
                    signed.append((size, leaves.root(size)))
                if reply.status != 409:
                    break
                told = int(reply.text)

    crowd = [
        threading.Thread(target=push, args=(leaves, range(4 + n, 40, 4)))
        for leaves in (LEAVES, FORK)
        for n in range(4)
    ]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    assert signed
    assert all(root == LEAVES.root(size) for size, root in signed) or all(
        root == FORK.root(size) for size, root in signed
    )


# Over HTTP.


@pytest.fixture
async def address(cosigner: Cosigner) -> AsyncIterator[str]:
    server = CosignerServer(cosigner)
    await server.start()
    yield f"http://127.0.0.1:{server.port}"
    await server.close()


async def test_the_answers_go_over_http_with_their_types(cosigner: Cosigner, address: str) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        good = await client.post(f"{address}/add-checkpoint", content=LEAVES.request(0, 7))
        assert (good.status_code, good.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        assert cosigned_at(body_of(LEAVES.note(7)), good.text.removesuffix("\n"), cosigner.key) == NOW
        stale = await client.post(f"{address}/add-checkpoint", content=LEAVES.request(0, 7))
        assert (stale.status_code, stale.text) == (409, "7\n")
        assert stale.headers["content-type"].startswith(SIZE_TYPE)
        assert (await client.post(f"{address}/add-checkpoint", content=b"\xff")).status_code == 400
        assert (await client.get(f"{address}/add-checkpoint")).status_code == 405
        assert (await client.get(f"{address}/")).status_code == 404


async def test_a_request_that_is_too_large_is_not_read(address: str) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        large = b"old 0\n" + b"A" * LIMIT_BYTES
        assert (await client.post(f"{address}/add-checkpoint", content=large)).status_code == 413
        assert (await client.post(f"{address}/add-checkpoint", content=LEAVES.request(0, 7))).is_success


async def test_a_state_that_cannot_be_written_is_an_error_of_the_server(address: str, folder: Path) -> None:
    (folder / "state.next").mkdir()
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        reply = await client.post(f"{address}/add-checkpoint", content=LEAVES.request(0, 7))
    assert reply.status_code == 500
    assert "—" not in reply.text


async def test_many_clients_get_one_lineage(address: str) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        bodies = [leaves.request(0, size) for leaves in (LEAVES, FORK) for size in range(4, 14)]
        replies = await asyncio.gather(
            *(client.post(f"{address}/add-checkpoint", content=body) for body in bodies)
        )
    assert sorted(reply.status_code for reply in replies) == [200] + [409] * (len(bodies) - 1)


def test_the_folder_is_its_owners_only(state: State, folder: Path) -> None:
    for path in (folder / "witness.pem", folder / STATE_FILE):
        assert os.stat(path).st_mode & 0o077 == 0
