"""Whose SSH keys count, as a file that an auditor brings: OpenSSH's allowed signers, and how we write it.

Format: ssh-keygen(1), ALLOWED SIGNERS. What OpenSSH has no word for stands in a key's comment, so that
`ssh-keygen -Y verify -f FILE` reads the same file. What is not understood is refused, never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import TypeAdapter, ValidationError

from activities.services.signatures import kind_of
from models.errors import InvalidInput
from models.loop import Name
from models.people import NAMESPACE, ORDINARY, PERSON, SECURITY_KEYS, Key, Person, folded

LARGEST = 1 << 20
"""Bytes of a file: some 4,000 keys."""
BLANK = " \t\r"
LINE = re.compile(
    r'([^ \t]+)[ \t]+(?:((?:[^ \t"]|"[^"]*")+)[ \t]+)??([a-z0-9@.-]+)[ \t]+([A-Za-z0-9+/=]+)([ \t].*)?'
)
OPTION = re.compile(r'([A-Za-z-]+)(?:="([^"]*)")?(?:,(?=.)|$)')
MOMENT = re.compile(r"([0-9]{8}(?:[0-9]{4}(?:[0-9]{2})?)?)Z?")
WORDS = ("no-touch-required", "verify-required", "revoked")
PATTERNS = re.compile(r'[*?!"]')
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
ROLES = TypeAdapter(tuple[Name, ...])


@dataclass(frozen=True, slots=True)
class Line:
    """A key, and what stands beside it."""

    names: tuple[str, ...]
    key: Key
    roles: tuple[str, ...] | None = None
    """`None` where the line says nothing of roles: any will do."""
    revoked: bool = False
    """Since when is not said, so no date is wrong and none is right."""


class Signers:
    """Everybody whose signature counts, and by which keys."""

    def __init__(self) -> None:
        """Nobody yet."""
        self._keys = dict[str, list[Key]]()
        self._people = dict[str, Person]()
        self._spelled = dict[str, str]()
        self._lines = dict[bytes, Line]()

    def of(self, name: str) -> Person | None:
        """The person of that name."""
        if name in self._keys and name not in self._people:
            self._people[name] = Person(name=name, keys=tuple(self._keys[name]))
        return self._people.get(name)

    def line(self, key: Key) -> Line:
        """What stands beside a key."""
        return self._lines[key.blob]

    def add(self, line: Line) -> str | None:
        """Take a line; says why it cannot be, if it cannot."""
        if line.key.blob in self._lines:
            return "this key stands in an earlier line; name it once, with all its names"
        self._lines[line.key.blob] = line
        self._people.clear()
        for name in line.names:
            if (other := self._spelled.setdefault(folded(name), name)) != name:
                return f"{other} and {name} are one name; write it in one way"
            self._keys.setdefault(name, []).append(line.key)
        return None


class _Wrong(Exception):
    """What is wrong with a line."""

    def __init__(self, value: object, remedy: str) -> None:
        super().__init__(remedy)
        self.value, self.remedy = value, remedy


def read_signers(data: bytes) -> Signers:
    """Everybody whom a file of allowed signers names for answers; lines for other purposes are left out.

    Raises:
        InvalidInput: it is no such file, or says something that is not understood; names the line.
    """
    if len(data) > LARGEST:
        raise InvalidInput.field("--signers", data[:20], f"give a file of at most {LARGEST} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput.field("--signers", data[error.start : error.end], "write it in UTF-8") from None
    found = Signers()
    for number, line in enumerate(text.split("\n"), start=1):
        if (line := line.strip(BLANK)) and not line.startswith("#"):
            try:
                read = _line(line)
                why = found.add(read) if read is not None else None
            except _Wrong as error:
                raise InvalidInput.field(f"line {number} of --signers", error.value, error.remedy) from None
            if why is not None:
                raise InvalidInput.field(f"line {number} of --signers", line, why)
    return found


def _line(line: str) -> Line | None:
    """What a line says; `None` if it is for another purpose."""
    parts = LINE.fullmatch(line)
    if parts is None or UNPRINTABLE.search(line):
        raise _Wrong(line, "write NAMES OPTIONS KEYTYPE KEY COMMENT, as in ssh-keygen(1), ALLOWED SIGNERS")
    names, options, kind, key, comment = parts.groups(default="")
    given = _options(options)
    if "namespaces" in given and NAMESPACE not in _exact(given["namespaces"]):
        return None
    after, before = _moment(given.get("valid-after")), _moment(given.get("valid-before"))
    if after is not None and before is not None and after >= before:
        raise _Wrong(options, "it ends before it begins; let valid-before be later than valid-after")
    said = _comment(comment.split())
    fields: dict[str, object] = {"valid_after": after, "valid_before": before}
    fields |= {word.replace("-", "_"): True for word in WORDS[:2] if word in said}
    return Line(_names(names), _key(kind, key, fields), said.get("roles"), "revoked" in said)


def _names(text: str) -> tuple[str, ...]:
    names = _exact(text)
    if not all(map(PERSON.fullmatch, names)) or len(set(names)) != len(names):
        raise _Wrong(text, "write each name once, as verdicts do: at most 200 characters, none of them blank")
    return names


def _exact(text: str) -> tuple[str, ...]:
    if PATTERNS.search(text):
        raise _Wrong(text, "no patterns and no quotes; write every name as it is")
    return tuple(text.split(","))


def _options(text: str) -> dict[str, str]:
    given, place = dict[str, str](), 0
    while place < len(text):
        option = OPTION.match(text, place)
        if option is None:
            raise _Wrong(text[place:], 'write options as NAME="VALUE", with commas between them')
        name, value = option[1].lower(), option[2]
        if name == "cert-authority":
            raise _Wrong(option[0], "certificates do not count here; name each person's own key")
        if name not in ("namespaces", "valid-after", "valid-before") or not value or name in given:
            raise _Wrong(option[0], "namespaces, valid-after and valid-before, each once, are known here")
        given[name], place = value, option.end()
    return given


def _moment(text: str | None) -> datetime | None:
    """A moment; where OpenSSH would take this machine's zone, UTC, so that every machine says the same."""
    if text is None:
        return None
    read = MOMENT.fullmatch(text)
    digits = read[1].ljust(14, "0") if read else ""
    try:
        year, *rest = (int(digits[:4]), *(int(digits[at : at + 2]) for at in range(4, 14, 2)))
        return datetime(year, *rest, tzinfo=UTC)
    except ValueError:
        raise _Wrong(text, "write YYYYMMDD, YYYYMMDDHHMM or YYYYMMDDHHMMSS, with a Z behind it") from None


def _comment(words: list[str]) -> dict[str, tuple[str, ...]]:
    """Ours among the words; what only looks like one of ours would be missed in silence."""
    said = dict[str, tuple[str, ...]]()
    for word in words:
        name, is_given, value = word.partition("=")
        meant = name.casefold().replace("_", "-")
        if meant not in (*WORDS, *(("role", "roles") if is_given else ())):
            continue
        if name in said or (name != "roles" if is_given else name not in WORDS):
            raise _Wrong(word, f"write roles=NAME,NAME, {', '.join(WORDS)}, each once")
        try:
            said[name] = ROLES.validate_python(value.split(",") if value else ())
        except ValidationError:
            raise _Wrong(word, "write roles as settings do: a-z, 0-9, dots, dashes and underscores") from None
    return said


def _key(kind: str, text: str, fields: dict[str, object]) -> Key:
    if kind not in (ORDINARY, *SECURITY_KEYS):
        raise _Wrong(kind, f"keys of these kinds count: {', '.join((ORDINARY, *SECURITY_KEYS))}")
    try:
        key = Key.model_validate({"public": f"{kind} {text}"} | fields)
    except ValidationError:
        raise _Wrong(f"{kind} {text}", "copy the key whole; only a security key can be touched") from None
    if kind_of(key) != kind:
        raise _Wrong(text, f"it is no key of kind {kind}; copy the line whole")
    return key


def signers_lines(people: Iterable[Person]) -> Iterator[tuple[Person, Key, str]]:
    """The line of each key of these people.

    Raises:
        InvalidInput: a name or key cannot be written so that it means the same there.
    """
    for person in people:
        if PATTERNS.search(person.name) or "," in person.name or person.name.startswith("#"):
            remedy = "such a file would read it as another name; write the file by hand"
            raise InvalidInput.field("people", person.name, remedy)
        for key in person.keys:
            line = _written(person, key)
            try:
                read_signers(line.encode())
            except InvalidInput as error:
                raise InvalidInput.field("people", person.name, f"a key of theirs: {error.message}") from None
            yield person, key, line


def _written(person: Person, key: Key) -> str:
    options = [f'namespaces="{NAMESPACE}"']
    if key.valid_after is not None:
        options.append(f'valid-after="{_second(key.valid_after)}"')
    if key.valid_before is not None:
        # The file knows whole seconds: rather a moment too long than a good answer that is found.
        options.append(f'valid-before="{_second(key.valid_before + timedelta(microseconds=999_999))}"')
    words = [word for word in WORDS if getattr(key, word.replace("-", "_"))]
    # A comment of theirs could hold words that mean something here.
    kind, text = key.public.split()[:2]
    return " ".join((person.name, ",".join(options), kind, text, f"roles={','.join(person.roles)}", *words))


def _second(at: datetime) -> str:
    return re.sub("[-:T]", "", at.astimezone(UTC).isoformat()[:19]) + "Z"
