"""Whether a text is what its schema asks for; believed of no server, however it promises it.

JSON is read strictly: what two readers may take for different things, or what no database can keep, is none.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.exceptions import Unresolvable


def holds(text: str, schema: Mapping[str, Any]) -> bool:
    """Whether the text is JSON and satisfies the schema."""
    try:
        return validator_of(schema).is_valid(value_of(text))
    except (ValueError, RecursionError, Unresolvable):
        return False


def value_of(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, names something twice, or holds a number or character that is none.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(
        text, parse_constant=_no_constant, parse_float=_number, object_pairs_hook=_each_name_once
    )
    # Half a character passes for one in an escape, and for nothing once it is to be stored.
    json.dumps(value, ensure_ascii=False).encode()
    return value


def validator_of(schema: Mapping[str, Any]) -> Draft202012Validator:
    """The rules of a schema."""
    return _validator(json.dumps(schema, sort_keys=True))


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Draft202012Validator:
    # With a registry of its own it never fetches a `$ref` from the network.
    registry: Registry[Any] = Registry()
    return Draft202012Validator(json.loads(schema), registry=registry)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _number(written: str) -> float:
    number = float(written)
    if math.isinf(number):
        raise ValueError("a number beyond all numbers")
    return number


def _each_name_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name that stands twice")
    return value
