"""Where measurements and traces go, and under which name."""

from __future__ import annotations

import re

from pydantic import Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError

from models.loop import Frozen

SCOPE = "countersign"
"""What OpenTelemetry knows our instruments by."""


class TelemetrySettings(Frozen):
    """An OpenTelemetry collector; without one nothing is measured and nothing is traced."""

    otlp_endpoint: str | None = None
    """Takes OTLP over HTTP, as `http://127.0.0.1:4318`; the path of each signal is added."""
    token: SecretStr | None = None
    """Sent as `Authorization: Bearer`, if the collector wants one."""
    traces: bool = True
    """Send traces besides metrics."""
    seconds: int = Field(default=15, ge=1)
    """Between two reports of the metrics."""

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_the_whole_of_one(cls, given: str | None) -> str | None:
        base = r"https?://[^\s/?#]+(?!.*/v1/(metrics|traces)/?$)(/[^\s?#]*)?"
        if given is not None and not re.fullmatch(base, given):
            remedy = "write it as http://127.0.0.1:4318; v1/metrics and v1/traces are added to it"
            raise PydanticCustomError("refused", remedy)
        return given
