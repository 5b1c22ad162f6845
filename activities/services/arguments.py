"""Reads an action's arguments into a model; what does not fit is refused by field, value and remedy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from models.errors import InvalidInput

T = TypeVar("T", bound=BaseModel)


def load_arguments(data: bytes) -> dict[str, Any]:
    """The arguments of an action, as they are stored.

    Raises:
        InvalidInput: they are no JSON object.
    """
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict):
        raise InvalidInput.field(
            "arguments", f"{len(data)} bytes", "an action's arguments are one JSON object"
        )
    return cast("dict[str, Any]", plain)


def read_arguments(model: type[T], arguments: Mapping[str, Any], remedies: Mapping[str, str]) -> T:
    """Validate arguments.

    Args:
        model: what they must look like.
        arguments: as given.
        remedies: what to write instead, by field.

    Raises:
        InvalidInput: the first field that does not fit.
    """
    try:
        return model.model_validate(dict(arguments))
    except ValidationError as error:
        raise _refusal(error.errors()[0], remedies) from None


def _refusal(first: ErrorDetails, remedies: Mapping[str, str]) -> InvalidInput:
    place = [str(part) for part in first["loc"]] or ["arguments"]
    path = ".".join(place)
    if first["type"] == "missing":
        return InvalidInput.field(path, None, f"it is required: {remedies.get(place[0], 'give it')}")
    if first["type"] == "extra_forbidden":
        return InvalidInput.field(path, first["input"], f"remove it; known are {', '.join(sorted(remedies))}")
    return InvalidInput.field(path, first["input"], remedies.get(place[0], first["msg"]))
