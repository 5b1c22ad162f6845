#!/usr/bin/env python3
"""Check a Countersign ledger without Countersign: this file, Python's own library, and `cryptography`.

    verify_ledger.py export FILE --key KEY [--checkpoint NOTE]   an export, from its first byte to its last
    verify_ledger.py proof FILE --key KEY                        a proof that one event stands in the log

KEY is what `countersign ledger key` prints, from where you trust it; repeat it for each key that signed.
NOTE is a file with a checkpoint kept outside; --witness-key KEY wants one that a co-signer cosigned.
--signers FILE holds what people signed against their keys, in OpenSSH's form of allowed signers.
Exit 0: sound. 1: tampered, with the first bad event. 2: not to be told, something is missing.
"""

import argparse
import gc
import hashlib
import json
import marshal
import re
import sys
import time
import unicodedata
from base64 import b64decode, b64encode
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from datetime import datetime, timedelta
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

Plain = dict[str, Any]
Run = dict[str, set[Any]]  # digests and action keys, by what they have in common
Verdicts = list[tuple[Plain, str]]
Others = tuple[list["Key"], int]  # co-signers, and how many of them are needed
Signers = dict[str, dict[bytes, Plain]]  # by a person's name and the key itself, what stands beside it
Doubt = tuple[str, list[str]]  # what is wrong with a signed answer, else what cannot be told of it
FORMAT, POLICY, PART = "countersign-ledger/1", "gate_policy", 4 << 20  # bytes of an export, read at once
SHOWN = ("signed", "witnessed", "cosigned", "signatures", "unchecked")
EFFECTS, LEVELS = ("apply", "compensation", "receipt"), ("claimed", "principal", "signed")
CLASSES = ("read_only", "reversible", "correctable", "irreversible")
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
moment = datetime.fromisoformat
EPOCH = moment("1970-01-01T00:00:00+00:00")
plainly = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
# Beyond ASCII, names are sorted as UTF-16, and Python sorts otherwise: there, any order is taken.
canonical = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, sort_keys=True).encode
exactly = json.JSONDecoder(parse_float=Decimal, parse_constant=Decimal).raw_decode  # no fraction has one form
sorted_out = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode

# What people sign: SSH signatures of a statement, by an ordinary key or by one that a FIDO device keeps.
NAMESPACE, LARGEST, LONGEST = "countersign-verdict-v1", 1 << 20, 4_000  # bytes of a file, of a signature
BEGIN, END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
HASHES = {b"sha256": hashlib.sha256, b"sha512": hashlib.sha512}
KINDS = {b"ssh-ed25519": 1, b"sk-ssh-ed25519@openssh.com": 2, b"sk-ecdsa-sha2-nistp256@openssh.com": 3}
WORDS, SKEW = ("no-touch-required", "verify-required", "revoked"), timedelta(minutes=5)
PERSON, NAME, HEX = r"[^\s\x00-\x1f]{1,200}", r"[a-z][a-z0-9_.\-]{0,62}", "[0-9a-f]{64}"
TIME = r".{19}(\.[0-9]{6})?(Z|[+-][0-9]{2}:[0-9]{2})"
KIND, NONCE = "approve|reject|revise|delegate", "[0-9a-f]{16,64}"
SAID = {"digest": HEX, "approver": PERSON, "role": NAME, "to": PERSON, "comment_sha256": HEX, "nonce": NONCE}
DATES = {"issued_at": TIME, "expires_at": TIME}
LINE = re.compile(
    r'([^ \t]+)[ \t]+(?:((?:[^ \t"]|"[^"]*")+)[ \t]+)??([a-z0-9@.-]+)[ \t]+([A-Za-z0-9+/=]{40,})([ \t].*)?'
)
OPTION = re.compile(r'(namespaces|valid-after|valid-before)="([^"]+)"(?:,(?=.)|$)', re.IGNORECASE)
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")


def shape(plain: Plain) -> tuple[Any, ...]:
    """Names and types of what stands in an object, in its order."""
    return (*plain, *map(type, plain.values()))


# The bytes of an event; first, the beginning; an intent before its event; a signed note after the last event
# that it covers; an erased payload before its event, and a destroyed key right after the beginning.
written = {"actor_kind": "", "actor_ref": "", "body": {}, "causation_id": None, "correlation_id": ""}
written |= dict.fromkeys(("event_id", "log_id", "recorded_at"), "") | {"seq": 0}
written |= dict.fromkeys(("span_id", "stream", "trace_id", "type"), "") | {"version": 0}
forms = {shape(written), shape(written | {"causation_id": ""}), shape({"data_base64": "", "intent": ""})}
forms |= {shape({"format": "", "origin": "", "root": "", "size": 0, "tenant": ""}), shape({"checkpoint": ""})}
forms |= {shape({"at": at, "gone": "", "key": key}) for at in ("", None) for key in ("", None)}


def node(left: bytes, right: bytes) -> bytes:
    """The hash of two neighbours in the tree."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(peaks: list[bytes]) -> bytes:
    """The hash of a tree from its complete subtrees, largest first."""
    return reduce(lambda right, left: node(left, right), peaks[::-1] or [hashlib.sha256(b"").digest()])


def is_included(leaf: bytes, index: int, size: int, path: list[bytes], root: bytes) -> bool:
    """Whether a path leads from a leaf to a root: by the index at first, then with all on its left."""
    inner = (index ^ (size - 1)).bit_length()
    if not 0 <= index < size or len(path) != inner + (index >> inner).bit_count():
        return False
    for level, sibling in enumerate(path):
        leaf = node(leaf, sibling) if level < inner and not index >> level & 1 else node(sibling, leaf)
    return leaf == root


class Key:
    """A key that signs notes under a name, or one that cosigns them, at a time (C2SP tlog-cosignature)."""

    def __init__(self, text: str, kind: bytes = b"\x01") -> None:
        self.text, self.cosigns = text.strip(), kind == b"\x04"
        self.name, short, encoded = [*text.strip().split("+", 2), "", ""][:3]
        self.raw = b64decode(encoded, validate=True)
        self.hash = hashlib.sha256(self.name.encode() + b"\n" + self.raw).digest()[:4]
        if self.raw[:1] != kind or len(self.raw) != 33 or self.hash.hex() != short:
            raise ValueError(f"{text}: is no Ed25519 key for this in the form NAME+HASH+BASE64")
        self.public = Ed25519PublicKey.from_public_bytes(self.raw[1:])

    def claims(self, line: str) -> bytes:
        """What a line that says it is this key's encodes; empty if it does not say so."""
        start, said, encoded = line.partition(f"— {self.name} ")
        try:
            data = b64decode(encoded, validate=True) if said and not start else b""
        except ValueError:
            return b""
        return data if data[:4] == self.hash else b""

    def signed(self, text: str, line: str) -> bool:
        """Whether a signature line is this key's, over this text; who signs is named after the log."""
        data = self.claims(line)
        time = f"cosignature/v1\ntime {int.from_bytes(data[4:12])}\n" if self.cosigns else ""
        try:
            self.public.verify(data[12 if self.cosigns else 4 :], f"{time}{text}".encode())
        except InvalidSignature:
            return False
        mine = self.cosigns or text.startswith(f"{self.name}\n")
        return mine and f"— {self.name} {b64encode(data).decode()}" == line


def successors(body: Plain, keys: list[Key]) -> list[Key]:
    """The key that takes the place of one of these; it must have signed that."""
    text = f"countersign key.rotated/1\n{body.get('old')}\n{body.get('new')}\n".encode()
    old = [key for key in keys if body.get("purpose") == "ledger" and key.text == body.get("old")]
    for key in old:
        key.public.verify(b64decode(body["by_old"], validate=True), text)
    return [Key(body["new"])] if old else []


def read_note(note: str) -> tuple[str, int, bytes]:
    """Origin, size and root of a checkpoint."""
    origin, size, root = note.partition("\n\n")[0].split("\n")
    data = b64decode(root, validate=True)
    if f"{int(size)}" != size or int(size) < 0 or len(data) != 32 or b64encode(data).decode() != root:
        raise ValueError("a size is written plainly, a root has 32 bytes")
    return origin, int(size), data


def is_signed(note: str, keys: list[Key]) -> bool:
    """Whether one of the keys signed a note."""
    text, _, signatures = note.partition("\n\n")
    *lines, last = signatures.split("\n")
    return last == "" and any(key.signed(f"{text}\n", line) for line in lines for key in keys)


def cosigners(note: str, keys: list[Key]) -> tuple[int, list[str]]:
    """How many of the co-signers cosigned a note, and whose cosignature under it is not theirs."""
    text, lines = note.partition("\n\n")[0], note.partition("\n\n")[2].split("\n")
    said = [(key, key.signed(f"{text}\n", one)) for key in keys for one in lines if key.claims(one)]
    return len({key.raw for key, good in said if good}), [key.name for key, good in said if not good]


def strings(data: bytes, many: int) -> tuple[list[bytes], bytes]:
    """So many strings as SSH writes them, and what follows."""
    found = list[bytes]()
    for _ in range(many):
        size = 4 + int.from_bytes(data[:4])
        if len(data) < size:
            raise ValueError("it ends too early")
        found.append(data[4:size])
        data = data[size:]
    return found, data


def parts_of(key: bytes) -> tuple[bytes, bytes, list[bytes]]:
    """Kind and point of an SSH key, and of a security key what it signs for."""
    (kind,), data = strings(key, 1)
    many = KINDS.get(kind, 0)
    parts, rest = strings(data, many)
    if rest or not many or (many == 3 and parts.pop(0) != b"nistp256"):
        raise ValueError("it is no Ed25519 key, nor one of a security key")
    return kind, parts[0], parts[1:]


def positive(number: bytes) -> int:
    """A number in the one form in which SSH writes it."""
    value = int.from_bytes(number, signed=True)
    if value < 0 or number != value.to_bytes((value.bit_length() + 8) // 8 if value else 0):
        raise ValueError("a number is not written as SSH writes it")
    return value


def signed_by(armoured: str, message: bytes) -> tuple[bytes, bytes]:
    """The key whose signature of a message this is, and what its device says: flags and a counter."""
    text = armoured.strip()
    if len(text) > LONGEST or not text.startswith(BEGIN) or not text.endswith(END):
        raise ValueError("it is no SSH signature")
    blob = b64decode("".join(text[len(BEGIN) : -len(END)].split()), validate=True)
    (key, space, _, algorithm, made), rest = strings(blob[10:], 5)
    if blob[:10] != b"SSHSIG\0\0\0\1" or rest or space != NAMESPACE.encode():
        raise ValueError("it was made for another purpose")
    (kind, point, application), ((its, value), device) = parts_of(key), strings(made, 2)
    if its != kind or len(device) != 5 * len(application):
        raise ValueError("it is of another kind than its key")
    parts = (space, b"", algorithm, HASHES[algorithm](message).digest())
    data = b"SSHSIG" + b"".join(len(part).to_bytes(4) + part for part in parts)
    if application:  # A device sees hashes: of what it signs for, and of the data.
        data = hashlib.sha256(application[0]).digest() + device + hashlib.sha256(data).digest()
    if KINDS[kind] == 3:
        numbers, rest = strings(value, 2)
        if rest:
            raise ValueError("something follows the signature")
        public = EllipticCurvePublicKey.from_encoded_point(SECP256R1(), point)
        public.verify(encode_dss_signature(*map(positive, numbers)), data, ECDSA(SHA256()))
    else:
        Ed25519PublicKey.from_public_bytes(point).verify(value, data)
    return key, device


def read_signers(path: str) -> Signers:
    """Who may sign by which keys, as in ssh-keygen(1), ALLOWED SIGNERS; what is not understood is refused."""
    found, keys, spelled = Signers(), set[bytes](), dict[str, str]()
    with open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"signers: give a file of at most {LARGEST} bytes")
    for number, line in enumerate(data.decode().split("\n"), start=1):
        try:
            names, key, beside = read_signer(line.strip(" \t\r"))
            if key in keys or any(spelled.setdefault(folded(one), one) != one for one in names):
                raise ValueError("its key, or a name in another spelling, stands there already")
        except UNREADABLE as error:
            raise ValueError(f"signers, line {number}: {line[:80]!r}: {error}") from None
        keys |= {key} if names else set()
        for name in names:
            found.setdefault(name, {})[key] = beside
    return found


def folded(name: str) -> str:
    """What all spellings of a name have in common."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def read_signer(line: str) -> tuple[list[str], bytes, Plain]:
    """Names, key and what stands beside it in a line; no names if it is for another purpose."""
    if not line or line[0] == "#":
        return [], b"", {}
    parts, given = LINE.fullmatch(line), dict[str, str]()
    if parts is None or UNPRINTABLE.search(line):
        raise ValueError("write NAMES OPTIONS KEYTYPE KEY COMMENT")
    names, options, kind, text, comment = parts.groups("")
    while options:
        option = OPTION.match(options)
        if option is None or option[1].lower() in given:
            raise ValueError("namespaces, valid-after and valid-before, each once and in quotes, count here")
        given[option[1].lower()], options = option[2], options[option.end() :]
    if NAMESPACE not in exact(given.get("namespaces", NAMESPACE)):
        return [], b"", {}
    after, before = (dated(given.get(name)) for name in ("valid-after", "valid-before"))
    words, key = ours(comment), b64decode(text, validate=True)
    if (after and before and after >= before) or parts_of(key)[0] != kind.encode():
        raise ValueError("it ends before it begins, or is a key of another kind")
    if KINDS[kind.encode()] == 1 and {"no-touch-required", "verify-required"} & words.keys():
        raise ValueError("only a security key can be touched")
    people = exact(names)
    if len(set(people)) != len(people) or not all(re.fullmatch(PERSON, one) for one in people):
        raise ValueError("write each name once, as verdicts do")
    return people, key, words | {"after": after, "before": before}


def exact(text: str) -> list[str]:
    """Names with commas between them."""
    if re.search(r'[*?!"]', text):
        raise ValueError("no patterns and no quotes; write every name as it is")
    return text.split(",")


def dated(text: str | None) -> datetime | None:
    """A moment; where OpenSSH would take this machine's zone, UTC, so that every machine says the same."""
    if text is None:
        return None
    if not re.fullmatch("[0-9]{8}([0-9]{4}([0-9]{2})?)?Z?", text):
        raise ValueError("write YYYYMMDD, YYYYMMDDHHMM or YYYYMMDDHHMMSS, with a Z behind it")
    digits = text.removesuffix("Z").ljust(14, "0")
    return moment(f"{digits[:8]}T{digits[8:]}Z")


def ours(comment: str) -> Plain:
    """Our words in a comment; what only looks like one of them would be missed in silence."""
    said: Plain = {}
    for word in comment.split():
        name, is_given, value = word.partition("=")
        if name.casefold().replace("_", "-") in (*WORDS, *("role", "roles") * bool(is_given)):
            roles = value.split(",") if value else []
            known = name == "roles" if is_given else name in WORDS
            if not known or name in said or not all(re.fullmatch(NAME, role) for role in roles):
                raise ValueError(f"write roles=NAME,NAME, {', '.join(WORDS)}, each once")
            said[name] = roles
    return said


def statement(event: Plain) -> bytes:
    """The bytes that a signed answer must have been made over."""
    body, flags = event["body"], ("break_glass", "review")
    said: Plain = {"schema_version": 1, "tenant": event["log_id"], "decision": body["kind"]}
    said |= {name: body.get(name) for name in (*SAID, *DATES)}
    said |= {"until": body["until"]} if body.get("until") is not None else {}
    said |= {name: body[name] for name in flags if body.get(name, False) is not False}
    for name, form in (SAID | DATES | {"tenant": NAME, "decision": KIND, "until": TIME}).items():
        if said.get(name) is None and name in ("role", "to", "until"):
            continue
        text = said[name]
        is_plain = form != TIME or moment(text).isoformat().replace("+00:00", "Z") == text
        if not (is_plain and re.fullmatch(form, text)):
            raise ValueError(f"{name} is not written as verdicts are")
    return canonical(said).encode()


def doubted(event: Plain, signers: Signers) -> Doubt:
    """What is wrong with an answer that calls itself signed, or what of it cannot be told."""
    body, now, gaps = event["body"], moment(event["recorded_at"]), list[str]()
    try:
        key, device = signed_by(body["signature"], statement(event))
        line, (issued, expires) = signers[body["approver"]][key], (moment(body[name]) for name in DATES)
        name = f"SHA256:{b64encode(hashlib.sha256(key).digest()).decode().rstrip('=')}"
        flags, hardware, role = device[0] if device else 0, body.get("hardware", False), body.get("role")
    except (InvalidSignature, *UNREADABLE) as error:
        why = f"{type(error).__name__}: {error}"[:100]
        return f"it is signed by no key of who is said to have answered: {why}", []
    reasons = (
        (name != body.get("key"), "it is signed by another key than the one recorded"),
        (hardware is not False and (hardware is not True or not device), "no security key signed it"),
        (device and not flags & 1 and "no-touch-required" not in line, "nobody touched the security key"),
        ("verify-required" in line and not flags & 4, "the security key asked for no PIN"),
        (line["after"] and now < line["after"], "its key was not valid yet"),
        (line["before"] and now >= line["before"], "its key was not valid any more"),
        (role is not None and role not in line.get("roles", [role]), "who signed it has no such role"),
        (issued - now > SKEW, "it came before it was made"),
        (expires - issued > timedelta(days=1), "it was to count for more than a day"),
    )
    gaps += ["it came after it had ended"] * (now >= expires)
    gaps += ["its key was revoked, since when is not said (see valid-before)"] * ("revoked" in line)
    return next((why for is_so, why in reasons if is_so), ""), gaps


def is_attested(event: Plain) -> bool:
    """Whether it is an answer that calls itself signed."""
    return event["type"] in ("verdict", "review") and event["body"].get("assurance") == "signed"


def alone(intent: Plain) -> bool:
    """Whether an intent needs no person: by its gate's limits, or by the narrow grant bound into it."""
    gate, plans, use = intent["gate"], intent["plans"], intent.get("use")
    people = any(plan["connector"] == POLICY for plan in plans)
    if use and not people and use["number"] <= use["grant"]["max_uses"] and covers(use["grant"], intent):
        return True
    limit = CLASSES.index(gate.get("automatic_up_to", "reversible"))
    harmless = gate["automatic"] and all(CLASSES.index(plan["reversibility"]) <= limit for plan in plans)
    harmless = bool(harmless and not people and little(gate.get("automatic_within") or {}, plans))
    if not harmless or gate.get("automatic_amount") is None:
        return harmless
    costs, currency = [plan["cost"] for plan in plans], gate["automatic_currency"]
    known = all(cost["amount"] is not None and cost["currency"] == currency for cost in costs)
    return known and sum(Decimal(cost["amount"]) for cost in costs) <= Decimal(gate["automatic_amount"])


def little(limits: Plain, plans: list[Plain]) -> bool:
    """Whether all numbers that are moved, as far as they are known, lie within the limits."""
    part, most = limits.get("at_most_permille"), limits.get("at_most_minor")
    moved = [change for plan in plans for change in plan.get("changes", ())]
    apart = part is None or len({plan["target"] for plan in plans}) == len(plans)
    small = part is None or all(1000 * abs(one["new"] - one["old"]) <= part * one["old"] for one in moved)
    same = most is None or all(one["currency"] == limits["currency"] for one in moved)
    sums = most is None or sum(abs(one["new"] - one["old"]) for one in moved) <= most
    known = all(plan.get("changes") for plan in plans) or part is most is None
    return known and apart and small and same and sums


def covers(grant: Plain, intent: Plain) -> bool:
    """Whether all that is planned lies within a grant at the time of the intent."""
    in_time = moment(intent["created_at"]) <= moment(grant["valid_until"]) and little(grant, intent["plans"])
    return in_time and all(
        plan["connector"] == grant["connector"]
        and plan["operation"] in grant["operations"]
        and any(fnmatchcase(plan["target"], pattern) for pattern in grant["targets"])
        and CLASSES.index(plan["reversibility"]) <= CLASSES.index(grant["up_to"])
        for plan in intent["plans"]
    )


def broken(intent: Plain, verdict: Plain) -> bool:
    """Whether the glass of an intent was rightly broken, so that one answer is enough."""
    glass = intent["gate"].get("break_glass") or {"roles": (), "classes": ()}
    worst = max((plan["reversibility"] for plan in intent["plans"]), key=CLASSES.index, default="read_only")
    known = verdict["assurance"] == "signed" and sure(intent["gate"], verdict)
    own = verdict["approver"].casefold() == intent["proposer"].casefold()
    return known and verdict.get("role") in glass["roles"] and worst in glass["classes"] and not own


def sure(gate: Plain, verdict: Plain) -> bool:
    """Whether an approver was known as surely as the gate asks."""
    level, least = (LEVELS.index(one.get("assurance", "claimed")) for one in (verdict, gate))
    return level >= least and (verdict.get("hardware") is True or not gate.get("hardware"))


def passed(intent: Plain, verdicts: Verdicts) -> bool:
    """Whether verdicts, in the order in which they were recorded, are enough for an intent."""
    gate, approved = intent["gate"], dict[str, str | None]()
    if alone(intent):
        return True
    asked = None if gate.get("self_approval") else intent.get("requester")
    wanting = {one.casefold() for one in (intent["proposer"], asked) if one is not None}
    for verdict, _ in verdicts:
        if verdict["kind"] in ("reject", "revise"):
            return False
        plain = not verdict.get("break_glass")
        if verdict["kind"] == "approve" and not plain and broken(intent, verdict):
            return True
        counts = plain and verdict["kind"] == "approve" and sure(gate, verdict)
        if counts and verdict["approver"].casefold() not in wanting:
            approved[verdict["approver"].casefold()] = verdict.get("role")
            if len(approved) >= gate["approvals"] and set(approved.values()) >= set(gate["roles"]):
                return True
    return False


def loose(intent: Plain) -> bool:
    """Whether it would change a policy, under a gate that is too wide for that."""
    gate, actions = intent["gate"], intent["proposal"]["actions"]
    about = any(one["connector"] == POLICY for one in (*actions, *intent["plans"]))
    wide = gate["automatic"] or gate.get("self_approval") or gate.get("break_glass") or not gate["roles"]
    named = intent["proposer"] == "policy" and len(actions) == 1 and intent.get("requester") is not None
    return about and bool(wide or not named or gate.get("assurance") != "signed")


def outrun(verdicts: Verdicts) -> bool:
    """Whether somebody approved after what was delegated to them had ended."""
    ends: dict[str, str | None] = {}
    for verdict, at in verdicts:
        until = ends.get(verdict["approver"].casefold())
        plain = verdict["kind"] == "approve" and not verdict.get("break_glass")
        if plain and until is not None and moment(at) > moment(until):
            return True
        if verdict["kind"] == "delegate" and verdict.get("to"):
            ends[verdict["to"].casefold()] = verdict.get("until")
    return False


def forbidden(run: Run, intent: Plain, digest: str, action: int, event: Plain, verdicts: Verdicts) -> str:
    """Why an effect of this intent was not allowed at that time; empty if it was."""
    due, limit, now = intent["proposal"]["not_before"], moment(intent["expires_at"]), event["recorded_at"]
    bound, here = (intent["workflow_id"], intent["tenant"]), (event["correlation_id"], event["log_id"])
    reasons = (
        (bound != here, "its intent was bound for another run"),
        (all(plan["action"] != action for plan in intent["plans"]), "it is not part of the intent"),
        (loose(intent), "its gate is too wide for a change of policy"),
        (digest not in run["intents"], "no such intent stands before it"),
        (digest not in run["last"], "a later intent replaced this one"),
        (digest in run["over"], "the intent expired, drifted or was being taken back"),
        (any(moment(at) > limit for _, at in verdicts), "a verdict was recorded after the absolute limit"),
        (due is not None and moment(now) < moment(due), f"it was not to happen before {due}"),
        (outrun(verdicts), "an approval was recorded after the delegation to its giver had ended"),
        (not passed(intent, verdicts), "the verdicts before it are not enough"),
    )
    return next((why for is_so, why in reasons if is_so), "")


class Conduct:
    """Whether what the log tells of was allowed."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = defaultdict(lambda: defaultdict(set))
        self.verdicts: dict[str, Verdicts] = defaultdict(list)
        self.intents, self.streams, self.missing = dict[str, Plain](), dict[str, str](), set[str]()
        self.ordered, self.orders = dict[str | None, datetime](), dict[str, str]()
        self.gone: list[tuple[int, str, str | None, datetime | None]] = []

    def take(self, event: Plain) -> list[str]:
        """What is wrong with the next event, given those before it."""
        name, stream, kind, body = event["correlation_id"], event["stream"], event["type"], event["body"]
        run = self.runs[name]
        if kind in ("erasure_order", "erasure"):
            return self._of_erasure(event, kind, body)
        if kind == "policy.changed":
            return self._of_policy(run, event, body)
        if stream == name and kind not in ("apply", "receipt"):
            return self._of_run(run, event, kind, body, str(body.get("digest")))
        if stream != f"{name}/act":
            return ["it is an effect, and does not stand in the stream of its run"] * (kind in EFFECTS)
        if kind in EFFECTS:
            return self._of_effect(run, event, kind, str(body.get("key")))
        if kind in ("absent", "in_doubt"):
            run[kind].add(str(body.get("key")))
        return []

    def _of_run(self, run: Run, event: Plain, kind: str, body: Plain, digest: str) -> list[str]:
        here, wrong = event["stream"], list[str]()
        if kind == "intent":
            run["intents"].add(digest)
            run["last"] = {digest}
            bound = self.intents.get(digest, {"workflow_id": here})["workflow_id"]
            if self.streams.setdefault(digest, here) != here or bound != here:
                wrong.append(f"intent {digest} belongs to another run")
        elif kind == "verdict":
            self.verdicts[digest].append((body, event["recorded_at"]))
            if self.streams.get(digest) != here:
                wrong.append("it is a verdict on an intent that does not stand before it in this run")
        elif kind in ("drift", "compensation") or (kind == "gate" and body.get("standing") == "expired"):
            run["over"].add(digest)
            run["undo"].update((digest, one) for one in body.get("actions", ()) if kind == "compensation")
        elif kind == "outcome":
            run["ended"].add(body.get("status"))
            for one in run.pop("intents", ()):
                self.intents.pop(one, None)
        return wrong

    def _of_policy(self, run: Run, event: Plain, body: Plain) -> list[str]:
        key, digest = str(body.get("key")), str(body.get("digest"))
        plans = self.intents.get(digest, {"plans": []})["plans"]
        fits = key == f"{digest}.0" + ".undo" * ("withdraws" in body)
        fits = fits and event["stream"] == f"policy/{body.get('agent')}"
        fits = fits and all(plan["connector"] == POLICY for plan in plans)
        allowed = key in run["tried"] and key not in run["done"] | run["changed"] | run["absent"]
        run["changed"].add(key)
        return [] if fits and allowed else [f"policy was changed under {key}, and nobody had agreed to that"]

    def _of_erasure(self, event: Plain, kind: str, body: Plain) -> list[str]:
        if kind == "erasure":
            answers = self.orders.pop(str(body.get("order")), None) == event["stream"]
            return [] if answers else ["it is the receipt of an erasure, and nobody had ordered that"]
        self.orders[event["event_id"]] = event["stream"]
        for name in (*body.get("payloads", ()), body.get("key", "")):
            self.ordered.setdefault(str(name), moment(event["recorded_at"]))
        return []

    def unordered(self) -> Iterator[tuple[int, str]]:
        """What is gone without an order to erase it, or before one."""
        for seq, name, key, at in self.gone:
            when = [self.ordered[one] for one in (name, key) if one in self.ordered]
            if not when or (at is not None and at < min(when)):
                yield seq, f"{name} is gone, and nobody had ordered it to be erased"

    def _of_effect(self, run: Run, event: Plain, kind: str, key: str) -> list[str]:
        digest, action = str(event["body"].get("digest")), int(event["body"].get("action", -1))
        undo, done, receipt = key.endswith(".undo"), key in run["done"], kind == "receipt"
        if key != f"{digest}.{action}" + ".undo" * undo or (not receipt and undo != (kind == "compensation")):
            return [f"action key {key} does not fit a {kind} of action {action} of intent {digest}"]
        open_ = {"in_doubt", "compensation_failed" * undo}  # for want of an answer, which may still come
        late = run["ended"] - open_ and key not in run["in_doubt"]
        why = "" if receipt or done else self._unallowed(run, event, digest, action, undo)
        run["done" if receipt else "tried"].add(key)
        reasons = (
            (key in run["absent"], "was closed before"),
            (done, "was done already"),
            (receipt and key not in run["tried"], "has a receipt and was never attempted"),
            (receipt and late, "happened after the run had ended"),
            (why, f"was not allowed: {why}"),
        )
        return [f"action {key} {what}" for is_so, what in reasons if is_so]

    def _unallowed(self, run: Run, event: Plain, digest: str, action: int, undo: bool) -> str:
        if run["ended"]:
            return "the run has ended"
        decided = (digest, action) in run["undo"] and f"{digest}.{action}" in run["done"]
        if undo:
            return "" if decided else "nobody decided to take it back, or it was not applied"
        if digest not in self.intents:
            self.missing.add(digest)
            return ""
        return forbidden(run, self.intents[digest], digest, action, event, self.verdicts[digest])


class Check:
    """One pass over an export."""

    def __init__(
        self, keys: list[Key], old: list[str], others: Others = ([], 0), signers: Signers | None = None
    ) -> None:
        self.signers, self.signatures, self.unchecked, self.latest = signers, 0, 0, EPOCH
        self.nonces, self.hands = set[tuple[str, str, str]](), dict[tuple[str, str], str]()
        self.keys, self.old = list(keys), [(*read_note(note), note) for note in old]
        self.others, self.needed = others
        self.wrong, self.gaps, self.peaks = list[tuple[int, str]](), list[str](), list[bytes]()
        self.header: Plain | None = None
        self.size = self.signed = self.cosigned = self.witnessed = self.matched = 0
        self.versions, self.ids, self.conduct = dict[str, int](), set[str](), Conduct()

    def _find(self, what: str, seq: int | None = None) -> None:
        self.wrong.append((self.size + 1 if seq is None else seq, what))

    def take(self, item: Any) -> None:
        """Take what the next line holds."""
        if not isinstance(item, str):
            return self._event(*item)
        try:
            plain = json.loads(item)
            if "specversion" in plain:
                return self._event(b64decode(plain["data_base64"], validate=True), ())
            self._other(plain, sorted_out(plain) == item)
        except UNREADABLE as error:
            self._find(f"a line cannot be read: {type(error).__name__}: {error}")

    def _other(self, plain: Plain, known: bool) -> None:
        if not known or shape(plain) not in forms or plain.get("format", FORMAT) != FORMAT:
            raise ValueError("it is not written as an export writes it")
        if "format" in plain:
            b64decode(plain["root"], validate=True)
            if self.header is not None or self.size:
                self._find("a second beginning stands in the middle")
            self.header = plain
            for origin in {origin for origin, *_ in self.old} - {plain["origin"]}:
                self._find(f"the log calls itself {plain['origin']}, the note given is of {origin}", 0)
        elif "intent" in plain:
            data = b64decode(plain["data_base64"], validate=True)
            if b64encode(data).decode() != plain["data_base64"]:
                raise ValueError("its base64 has another spelling")
            if hashlib.sha256(data).hexdigest() != plain["intent"]:
                self._find(f"what stands for intent {plain['intent']} has another digest")
            self.conduct.intents[plain["intent"]] = json.loads(data)
        elif "gone" in plain:
            at = None if plain["at"] is None else max(moment(plain["at"]), EPOCH)
            self.conduct.gone.append((self.size + 1, plain["gone"], plain["key"], at))
        else:
            self._note(plain["checkpoint"])

    def _event(self, its: bytes, values: tuple[Any, ...], doubt: Doubt | None = None) -> None:
        leaf = its if values else hashlib.sha256(b"\x00" + its).digest()
        try:
            event = dict(zip(written, values, strict=True)) if values else exactly(its.decode())[0]
            if not values and expected(event, leaf, its):
                self._find("what stands beside the event does not fit its bytes")
            found = (*self._order(event), *self._attested(event, doubt), *self.conduct.take(event))
            self.wrong += [(self.size + 1, what) for what in found]
            if event["type"] == "key.rotated":
                self.keys += successors(event["body"], self.keys)
        except InvalidSignature:
            self._find("a key that is trusted did not sign who follows it")
        except UNREADABLE as error:
            self._find(f"the event cannot be read: {type(error).__name__}")
        index, self.size = self.size, self.size + 1
        while index & 1:
            leaf, index = node(self.peaks.pop(), leaf), index >> 1
        self.peaks.append(leaf)
        for _, size, root, note in self.old:
            if size == self.size and self._matches(size, root, "the note given"):
                self.witnessed = max(self.witnessed, size)
                self._vouched(size, note)

    def _order(self, event: Plain) -> Iterator[str]:
        stream, version, name = event["stream"], event["version"], event["event_id"]
        last, self.versions[stream] = self.versions.get(stream, 0), version
        if self.header is not None and event["log_id"] != self.header["tenant"]:
            yield f"it belongs to log {event['log_id']}"
        if (event["seq"], version) != (self.size + 1, last + 1):
            yield f"it is event {event['seq']}, and version {version} of {stream} follows version {last}"
        if name in self.ids:
            yield "its id stands already"
        self.ids.add(name)

    def _attested(self, event: Plain, doubt: Doubt | None) -> Iterator[str]:
        """Whether an answer that calls itself signed was; a nonce counts once, and a key for one name."""
        if self.signers is None:
            self.unchecked += is_attested(event)
            return
        before, now, body = self.latest, moment(event["recorded_at"]), event["body"]
        self.latest = max(before, now)
        if not is_attested(event):
            return
        why, gaps = doubt or doubted(event, self.signers)
        self.signatures += 1
        if why:
            yield why
            return
        once, hand = (event["type"], body["digest"], body["nonce"]), (body["digest"], body["key"])
        if once in self.nonces or self.hands.setdefault(hand, body["approver"]) != body["approver"]:
            yield "this very answer counted before, or its key answered under another name"
            return
        self.nonces.add(once)
        gaps += ["events before it were recorded later than it"] * (before - now > SKEW)
        self.gaps += [f"event {self.size + 1}: {one}; whether it counted cannot be told" for one in gaps]

    def _note(self, text: str) -> None:
        origin, size, root = read_note(text)
        if self.header is not None and origin != self.header["origin"]:
            self._find(f"a checkpoint of {origin} stands in the log of {self.header['origin']}")
        elif size != self.size:
            self._find(f"a checkpoint of {size} events stands where there are {self.size}")
        elif self.keys and not is_signed(text, self.keys):
            self._find(f"the checkpoint of {size} events is signed by none of the keys given")
        elif self._matches(size, root, "the checkpoint") and self.keys:
            self.signed = size
            self._vouched(size, text)

    def _vouched(self, size: int, note: str) -> None:
        many, forged = cosigners(note, self.others)
        for name in forged:
            self._find(f"{name} did not make the cosignature under the checkpoint of {size} events", size)
        self.cosigned = max(self.cosigned, size) if self.others and many >= self.needed else self.cosigned

    def _matches(self, size: int, root: bytes, whose: str) -> bool:
        if root == root_of(self.peaks):
            self.matched = max(self.matched, size)
            return True
        what = f"{whose} of {size} events has another root: something from event {self.matched + 1} on"
        self._find(what, self.matched + 1)
        return False

    def end(self) -> None:
        """What only the end shows."""
        header, root = self.header, b64encode(root_of(self.peaks)).decode()
        for size in (size for _, size, *_ in self.old if size > self.size):
            self._find(f"the log ends at {self.size}, the note given covers {size}: it was cut")
        if header is None:
            self.gaps.append("the export has no beginning")
        elif header["size"] != self.size:
            self._find(f"the log ends at {self.size} events, its beginning says {header['size']}")
        elif header["root"] != root:
            self._find("the root is not the one its beginning names", self.matched + 1)
        self.wrong = sorted((*self.wrong, *self.conduct.unordered()), key=lambda one: one[0])
        if not self.keys:
            self.gaps.append("no key was given, so nobody vouches for the log")
        elif not all(is_signed(note, self.keys) for *_, note in self.old):
            self.gaps.append("a note given is signed by none of the keys given, nor by one that follows them")
        elif self.size and not self.signed and not self.witnessed:
            self.gaps.append("no checkpoint has been signed yet")
        if self.others and self.size and not self.cosigned:
            self.gaps.append(f"no checkpoint has cosignatures by {self.needed} of the co-signers given")
        self.gaps += [f"the bytes of intent {d} are missing" for d in sorted(self.conduct.missing)]


def expected(event: Plain, leaf: bytes, envelope: bytes) -> str:
    """The line that an event's bytes belong in, if they are those in which the ledger writes it."""
    text = canonical(event) if envelope.isascii() else plainly(event)
    known = shape(event) in forms and max(moment(event["recorded_at"]), EPOCH)
    if not known or known.isoformat() != event["recorded_at"] or text.encode() != envelope:
        raise ValueError("it is not written as the ledger writes events")
    correlation, name, stream = map(sorted_out, (event["correlation_id"], event["event_id"], event["stream"]))
    source, kind = sorted_out(f"countersign/{event['log_id']}"), sorted_out(f"countersign.{event['type']}")
    return (
        f'{{"correlationid":{correlation},"data_base64":"{b64encode(envelope).decode()}",'
        f'"datacontenttype":"application/json","id":{name},"leafhash":"{leaf.hex()}",'
        f'"sequence":{event["seq"]},"source":{source},"specversion":"1.0","streamversion":{event["version"]},'
        f'"subject":{stream},"time":"{event["recorded_at"]}","type":{kind}}}'
    )


def read(part: bytes, signers: Signers | None = None) -> bytes:
    """Hash, values and doubts of each event that stands in its line as it should; any other line as it is."""
    items: list[Any] = part.removesuffix(b"\n").decode("utf-8", "surrogateescape").split("\n")
    for place, line in enumerate(items):
        try:
            envelope = b64decode(line.partition(',"data_base64":"')[2].partition('"')[0], validate=True)
            (event, _), leaf = exactly(envelope.decode()), hashlib.sha256(b"\x00" + envelope).digest()
            if expected(event, leaf, envelope) == line:
                doubt = doubted(event, signers) if signers is not None and is_attested(event) else None
                items[place] = leaf, (*event.values(),), doubt
        except UNREADABLE:
            continue
    return marshal.dumps(items)


def check_export(
    path: str, keys: list[Key], old: list[str], others: Others = ([], 0), signers: Signers | None = None
) -> tuple[int, Plain]:
    """Check a whole export: other processes read ahead what is judged here, in its order."""
    check, began, ahead = Check(keys, old, others, signers), time.perf_counter(), deque[Future[bytes]]()
    pools = ProcessPoolExecutor if Path(path).stat().st_size > PART else ThreadPoolExecutor
    with open(path, "rb") as file, pools(3) as pool:
        while (part := file.read(PART) + file.readline()) or ahead:
            ahead += [pool.submit(read, part, signers)] if part else []
            for item in marshal.loads(ahead.popleft().result()) if len(ahead) > 6 or not part else ():
                check.take(item)
    check.end()
    report: Plain = {"events": check.size, "root": root_of(check.peaks).hex()}
    report |= {name: getattr(check, name) for name in SHOWN}
    report |= {"first_bad_event": check.wrong[0][0] if check.wrong else None, "gaps": check.gaps[:20]}
    report |= {"findings": [f"event {seq}: {what}" for seq, what in check.wrong[:20]]}
    return 1 if check.wrong else 2 if check.gaps else 0, report | {"seconds": time.perf_counter() - began}


def check_proof(path: str, keys: list[Key], others: Others = ([], 0)) -> tuple[int, Plain]:
    """Check that one event stands in a signed log."""
    proof = json.loads(Path(path).read_text("utf-8"))
    began, note, index = time.perf_counter(), proof["checkpoint_note"], proof["leaf_index"]
    envelope = b64decode(proof["envelope_b64"], validate=True)
    (_, size, root), siblings = read_note(note), [b64decode(one, validate=True) for one in proof["path"]]
    event, leaf = json.loads(envelope), hashlib.sha256(b"\x00" + envelope).digest()
    reasons = (
        (size != proof["tree_size"], "the proof is of another size than its checkpoint"),
        (not is_included(leaf, index, size, siblings, root), "the event is not in the tree that was signed"),
        (event["seq"] != index + 1, "the event does not stand where the proof says"),
        (keys and not is_signed(note, keys), "the checkpoint is signed by none of the keys given"),
    )
    many, forged = cosigners(note, others[0])
    wrong = [what for is_so, what in reasons if is_so] + [f"{one} did not cosign it" for one in forged]
    gaps = [] if keys else ["no key was given, so nobody vouches for the checkpoint"]
    gaps += [f"{many} of {others[1]} co-signers have cosigned the checkpoint"] * (many < others[1])
    code = 1 if wrong else 2 if gaps else 0
    return code, {"event": event, "findings": wrong, "gaps": gaps, "seconds": time.perf_counter() - began}


def main(argv: list[str]) -> int:
    """Check what is named; prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("export", "proof"))
    parser.add_argument("file")
    parser.add_argument("--key", action="append", default=[], help="NAME+HASH+BASE64")
    parser.add_argument("--checkpoint", action="append", default=[], help="a file with a note kept outside")
    parser.add_argument("--witness-key", action="append", default=[], help="a co-signer, NAME+HASH+BASE64")
    parser.add_argument("--witnesses", type=int, help="how many of them must have cosigned; default: all")
    parser.add_argument("--signers", help="a file of allowed signers; of an export only")
    options = parser.parse_args(argv)
    try:
        keys, others = [*map(Key, options.key)], [Key(text, b"\x04") for text in options.witness_key]
        there = len({key.raw for key in others})
        given = others, there if options.witnesses is None else options.witnesses
        if not min(there, 1) <= given[1] <= there:
            raise ValueError(f"--witnesses {given[1]}: {there} keys are given")
        if options.what == "proof" and options.signers is not None:
            raise ValueError("--signers: give it with an export")
        if options.what == "proof":
            code, report = check_proof(options.file, keys, given)
        else:
            notes = [Path(one).read_text("utf-8") for one in options.checkpoint]
            signers = None if options.signers is None else read_signers(options.signers)
            code, report = check_export(options.file, keys, notes, given, signers)
    except (OSError, RuntimeError, *UNREADABLE) as error:
        code, report = 2, {"gaps": [f"{type(error).__name__}: {error}"]}
    print(json.dumps({"status": ("sound", "tampered", "incomplete")[code]} | report, indent=2))
    return code


if __name__ == "__main__":
    gc.disable()  # nothing here refers to itself, and all that is remembered would be gone through again
    sys.exit(main(sys.argv[1:]))
