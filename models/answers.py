"""What people send to a run, who they are as far as it can be established, and how that is recorded."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import AwareDatetime, Field, StringConstraints

from models.canonical import Digest, sha256
from models.loop import Assurance, Frozen, Name, Ref


class Kind(StrEnum):
    """The four answers."""

    APPROVE = "approve"
    REJECT = "reject"
    REVISE = "revise"
    DELEGATE = "delegate"


Person = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\s\x00-\x1f]+$")]
"""How somebody is called; never blank, or nobody could answer for them."""


class Answer(Frozen):
    """What a person sends: the digest they read, who they say they are, and why."""

    digest: Digest
    approver: Person
    comment: str = Field(default="", max_length=4000)
    """For revise: the feedback the agent gets."""
    to: Person | None = None
    """For delegate: who should answer instead."""
    until: AwareDatetime | None = None
    """For delegate: when that ends, and whoever it was handed to may not answer any more."""
    role: Name | None = None
    break_glass: bool = False
    """For approve: go ahead without the others, who review it afterwards; the comment says why."""
    review: bool = False
    """It is about what was done by breaking the glass."""
    nonce: str | None = Field(default=None, pattern=r"^[0-9a-f]{16,64}$")
    issued_at: AwareDatetime | None = None
    expires_at: AwareDatetime | None = None
    signature: str | None = Field(default=None, max_length=4000)
    """Of the statement that these fields make, by `ssh-keygen -Y sign`."""


class Identity(Frozen):
    """Who answered, as far as it could be established."""

    assurance: Assurance = Assurance.CLAIMED
    roles: tuple[Name, ...] | None = None
    """The roles they have; `None` when no people are configured, and any may be claimed."""
    key: str | None = None
    """Fingerprint of the key that signed."""
    hardware: bool = False
    """A security key signed, and was touched."""
    field: str = ""
    remedy: str = ""
    """Why the answer cannot count, whatever it says."""


ANYBODY = Identity()
"""Who answers where no people are configured."""


class Verdict(Frozen):
    """An answer that was given to one intent."""

    kind: Kind
    digest: Digest
    approver: str
    assurance: Assurance = Assurance.CLAIMED
    comment: Ref | None = None
    to: str | None = None
    until: AwareDatetime | None = None
    role: Name | None = None
    key: str | None = None
    hardware: bool = Field(default=False, exclude_if=lambda said: not said)
    """The key is a security key; who acts looks at the signature again."""
    nonce: str | None = None
    issued_at: AwareDatetime | None = None
    expires_at: AwareDatetime | None = None
    signature: str | None = None
    break_glass: bool = False
    review: bool = False
    comment_sha256: Digest | None = None
    """With the fields above, what was signed can be put together and checked again."""


class Refusal(Frozen):
    """Why an answer does not count, and what would."""

    kind: Kind
    field: str
    remedy: str
    approver: str = "unknown"


def recorded(kind: Kind, answer: Answer, identity: Identity) -> Verdict:
    """The answer as it is recorded, with what was signed."""
    same = ("digest", "approver", "to", "until", "role", "break_glass", "review")
    return Verdict(
        kind=kind,
        assurance=identity.assurance,
        key=identity.key,
        hardware=identity.hardware,
        **{name: getattr(answer, name) for name in same},
        **_signed_parts(answer, identity),
    )


def _signed_parts(answer: Answer, identity: Identity) -> dict[str, Any]:
    if identity.assurance is not Assurance.SIGNED:
        return {}
    return {
        "nonce": answer.nonce,
        "issued_at": answer.issued_at,
        "expires_at": answer.expires_at,
        "signature": answer.signature,
        "comment_sha256": sha256(answer.comment.encode()),
    }
