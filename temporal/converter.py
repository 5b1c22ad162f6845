"""How values become payloads: pydantic models, and nothing a stranger sends can break a handler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue
from temporalio.contrib.pydantic import PydanticPayloadConverter, pydantic_data_converter
from temporalio.converter import DataConverter


class LenientPayloadConverter(PydanticPayloadConverter):
    """As pydantic's, but a payload that nobody gave a type and that cannot be read arrives raw.

    Without this the SDK drops such a signal, and no trace of the attempt would stand in the ledger.
    """

    def from_payloads(self, payloads: Sequence[Payload], type_hints: list[type] | None = None) -> list[Any]:
        """Read payloads; only untyped ones may arrive as `RawValue`."""
        if type_hints is not None:
            return super().from_payloads(payloads, type_hints)
        return [self._read(payload) for payload in payloads]

    def _read(self, payload: Payload) -> Any:
        try:
            return super().from_payloads([payload])[0]
        except Exception:
            # Whatever went wrong, the handler records that something unreadable came.
            return RawValue(payload)


def data_converter() -> DataConverter:
    """The converter of clients, workers, replay and tests."""
    return replace(pydantic_data_converter, payload_converter_class=LenientPayloadConverter)
