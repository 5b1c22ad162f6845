"""Canonical bytes and their names: one value, one byte string, one digest.

RFC 8785 (JSON Canonicalization Scheme) without floats: money and large numbers travel as strings, so that no
two languages can disagree about what was approved.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from json.encoder import encode_basestring
from typing import Annotated, Any, cast

import rfc8785
from pydantic import BaseModel, StringConstraints

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in lower-case hex."""

NAMESPACE = uuid.UUID("6f1f2b52-5f0c-5d0e-9a42-0c1d5b8c2e11")
MAX_SAFE_INTEGER = 2**53 - 1
_WORDS = {True: "true", False: "false", None: "null"}


def sha256(data: bytes) -> str:
    """Name bytes by their SHA-256, lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def canonical(value: BaseModel | dict[str, Any]) -> bytes:
    """Return the RFC 8785 bytes of a model or mapping.

    Raises:
        ValueError: a float or an integer beyond 2**53-1 stands in it; the path is named.
    """
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = plain_text(plain)
    if text is not None:
        return text.encode()
    _refuse_inexact(plain, "$")
    if _has_plain_keys(plain):
        # Same bytes, six times as fast: only the order of names beyond ASCII differs between the two.
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode()
    return rfc8785.dumps(cast(Any, plain))


def plain_text(value: dict[str, Any]) -> str | None:
    """The canonical text of what is JSON as it stands; `None` if anything is to be converted or refused."""
    try:
        return _plain(value)
    except _NotPlain:
        return None


def digest_of(value: BaseModel | dict[str, Any]) -> str:
    """SHA-256 of the canonical bytes."""
    return sha256(canonical(value))


def derived_id(*parts: str | int) -> str:
    """uuid5 over length-prefixed parts, so that ("a","bc") and ("ab","c") differ."""
    text = "".join(f"{len(str(part))}:{part}" for part in parts)
    return str(uuid.uuid5(NAMESPACE, text))


def subject_id(tenant: str, subject: str) -> str:
    """What a subject is called where its own name must not stand; who knows both can find it."""
    return derived_id("subject", tenant, subject)


class _NotPlain(Exception):
    """Something is to be converted, refused or sorted with care."""


def _plain(value: Any) -> str:
    """By exact types and in one pass, because everything that is recorded goes through here."""
    kind = type(value)
    if kind is str:
        return encode_basestring(value)
    if kind is dict:
        return _plain_dict(value)
    if kind is list:
        return f"[{','.join(map(_plain, value))}]"
    if value is None or kind is bool:
        return _WORDS[value]
    if kind is int and -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER:
        return str(value)
    raise _NotPlain


def _plain_dict(value: dict[Any, Any]) -> str:
    names = list(value)
    if not _are_plain(names):
        raise _NotPlain
    names.sort()
    # Most are texts, and a call costs more than the question.
    written = [
        f"{encode_basestring(name)}:"
        f"{encode_basestring(item) if type(item := value[name]) is str else _plain(item)}"
        for name in names
    ]
    return f"{{{','.join(written)}}}"


def _are_plain(names: list[Any]) -> bool:
    try:
        return "".join(names).isascii()
    except TypeError:
        return False


def _has_plain_keys(value: Any) -> bool:
    if isinstance(value, dict):
        named = cast(dict[Any, Any], value)
        return all(
            isinstance(key, str) and key.isascii() and _has_plain_keys(item) for key, item in named.items()
        )
    if isinstance(value, list | tuple):
        return all(map(_has_plain_keys, cast(list[Any], value)))
    return True


def _refuse_inexact(value: Any, path: str) -> None:
    if isinstance(value, float):
        raise ValueError(f"{path}: floats have no canonical form here; write the number as a string")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_SAFE_INTEGER:
        raise ValueError(f"{path}: integers beyond 2**53-1 are not exact in JSON; write it as a string")
    if isinstance(value, dict):
        for key, item in cast(dict[str, Any], value).items():
            _refuse_inexact(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(cast(list[Any], value)):
            _refuse_inexact(item, f"{path}[{index}]")
