"""Who may answer, in which roles, and with which keys; and the exact bytes a signed answer covers."""

from __future__ import annotations

import base64
import re
import unicodedata
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AwareDatetime, Field, StringConstraints, model_validator

from models.canonical import Digest, canonical
from models.loop import Frozen, Name

NAMESPACE = "countersign-verdict-v1"
"""The namespace of `ssh-keygen -Y sign`: a signature made for anything else is none here."""

ORDINARY = "ssh-ed25519"
SECURITY_KEYS = ("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com")
"""Kinds of keys that a FIDO device keeps to itself and asks a person's touch for."""
_KINDS = "|".join(re.escape(kind) for kind in (ORDINARY, *SECURITY_KEYS))

PERSON = re.compile(r"[^\s\x00-\x1f]{1,200}")
PersonId = Annotated[str, StringConstraints(pattern=f"^{PERSON.pattern}$")]
"""How a person is called in answers and in the ledger; an opaque id serves as well as an address."""


class Key(Frozen):
    """An SSH public key and when it counts."""

    public: Annotated[str, StringConstraints(pattern=rf"^({_KINDS}) [A-Za-z0-9+/=]{{40,}}( .*)?$")]
    """As in an allowed-signers file, `id_ed25519.pub` or `id_ed25519_sk.pub`."""
    valid_after: AwareDatetime | None = None
    valid_before: AwareDatetime | None = None
    revoked: bool = False
    """From now on nothing it signed may lead to an effect any more."""
    no_touch_required: bool = False
    """Of a security key: what it signed counts without anybody having touched it."""
    verify_required: bool = False
    """Of a security key: it must have asked for a PIN or a fingerprint."""

    @model_validator(mode="after")
    def _asks_only_what_a_device_can_tell(self) -> Self:
        if (self.no_touch_required or self.verify_required) and self.kind not in SECURITY_KEYS:
            raise ValueError("only a security key can be asked for touch or verification; leave it out")
        return self

    @property
    def kind(self) -> str:
        """What its line calls it; what it is, its own bytes say."""
        return self.public.split(" ", 1)[0]

    @property
    def blob(self) -> bytes:
        """The key itself; empty if its line holds none."""
        try:
            return base64.b64decode(self.public.split()[1], validate=True)
        except ValueError:
            return b""


class Person(Frozen):
    """Someone who may answer."""

    name: PersonId
    roles: tuple[Name, ...] = ()
    keys: tuple[Key, ...] = ()


def _all_differ(people: tuple[Person, ...]) -> tuple[Person, ...]:
    """One person is not two, by a second spelling of their name or by somebody else's key."""
    names: dict[str, str] = {}
    keys: dict[bytes, str] = {}
    for person in people:
        if (name := folded(person.name)) in names:
            raise ValueError(f"{names[name]} and {person.name} are one name; name each person once")
        names[name] = person.name
        for blob in filter(None, (key.blob for key in person.keys)):
            if blob in keys:
                raise ValueError(f"a key of {keys[blob]} stands there again at {person.name}; name it once")
            keys[blob] = person.name
    return people


def folded(name: str) -> str:
    """What all spellings of a name have in common."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


Everybody = Annotated[tuple[Person, ...], AfterValidator(_all_differ)]
"""People whose names and keys differ."""


class People(Frozen):
    """Everyone who may answer; with nobody named, any name counts as `claimed`."""

    people: Everybody = ()

    def of(self, name: str) -> Person | None:
        """The person of that name."""
        return next((person for person in self.people if person.name == name), None)


def unfit(people: People, roles: tuple[Name, ...], name: str | None) -> str | None:
    """Why somebody may not do what needs one of these roles; `None` if they may.

    Args:
        people: everyone who is named; with nobody named, and no role needed, any name will do.
        roles: any one of them is enough; empty is anybody.
        name: who they say they are, or `None` where that is not known.
    """
    wanted = f"one of the roles {', '.join(roles)}"
    if name is None:
        return f"it takes {wanted}; say who asks for it" if roles else None
    person = people.of(name)
    if person is None and (people.people or roles):
        return "nobody of that name is known; see people in settings"
    if person is not None and roles and not set(roles) & set(person.roles):
        return f"it takes {wanted}; they have {', '.join(person.roles) or 'none'}"
    return None


class Statement(Frozen):
    """What a signed answer says; its canonical bytes are what is signed."""

    schema_version: Literal[1] = 1
    tenant: Name
    digest: Digest
    decision: Literal["approve", "reject", "revise", "delegate"]
    approver: PersonId
    role: Name | None = None
    to: PersonId | None = None
    until: AwareDatetime | None = None
    """When a delegation ends."""
    break_glass: bool = False
    """It goes ahead without the others."""
    review: bool = False
    """It is about what was done so."""
    comment_sha256: Digest
    nonce: str = Field(min_length=16, max_length=64, pattern=r"^[0-9a-f]+$")
    issued_at: AwareDatetime
    expires_at: AwareDatetime

    def bytes(self) -> bytes:
        """RFC 8785 bytes; later fields only where they say something, so what was signed before holds."""
        without = {name for name in ("until", "break_glass", "review") if not getattr(self, name)}
        return canonical(self.model_dump(mode="json", exclude=without))
