"""How values become payloads: pydantic models, and nothing a stranger sends can break a handler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from pydantic import ValidationError
from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue
from temporalio.contrib.pydantic import PydanticPayloadConverter, pydantic_data_converter
from temporalio.converter import DataConverter
from temporalio.exceptions import FailureError

from models.errors import InvalidInput


class LenientPayloadConverter(PydanticPayloadConverter):
    """As pydantic's, but a payload that nobody gave a type and that cannot be read arrives raw.

    Without this the SDK drops such a signal, and no trace of the attempt would stand in the ledger.
    """

    def from_payloads(self, payloads: Sequence[Payload], type_hints: list[type] | None = None) -> list[Any]:
        """Read payloads; only untyped ones may arrive as `RawValue`.

        Raises:
            InvalidInput: a typed one does not fit; a run that was started with it fails, instead of trying
                its first task for ever.
        """
        if type_hints is None:
            return [self._read(payload) for payload in payloads]
        try:
            return super().from_payloads(payloads, type_hints)
        except ValidationError as error:
            raise refused(error) from None
        except FailureError:
            raise
        except Exception as error:
            raise InvalidInput.field(
                "input", type(error).__name__, f"send JSON for {', '.join(map(_name, type_hints))}"
            ) from None

    def _read(self, payload: Payload) -> Any:
        try:
            return super().from_payloads([payload])[0]
        except Exception:
            # Whatever went wrong, the handler records that something unreadable came.
            return RawValue(payload)


def refused(error: ValidationError) -> InvalidInput:
    """The first thing that does not fit, with field, value and remedy."""
    first = cast(dict[str, Any], error.errors(include_url=False)[0])
    field = ".".join(str(part) for part in first["loc"]) or "input"
    return InvalidInput.field(field[:80], first.get("input"), f"{error.title}: {first['msg']}")


def _name(hint: type) -> str:
    return getattr(hint, "__name__", str(hint))


def data_converter() -> DataConverter:
    """The converter of clients, workers, replay and tests."""
    return replace(pydantic_data_converter, payload_converter_class=LenientPayloadConverter)
