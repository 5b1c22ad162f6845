"""Whether a text is what its schema asks for; believed of no server, however it promises it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.exceptions import Unresolvable


def holds(text: str, schema: Mapping[str, Any]) -> bool:
    """Whether the text is JSON and satisfies the schema."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
        return _validator(json.dumps(schema, sort_keys=True)).is_valid(value)
    except (ValueError, RecursionError, Unresolvable):
        return False


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Draft202012Validator:
    # With a registry of its own it never fetches a `$ref` from the network.
    registry: Registry[Any] = Registry()
    return Draft202012Validator(json.loads(schema), registry=registry)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
