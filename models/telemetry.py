"""Where measurements and traces go, and under which name."""

from __future__ import annotations

from pydantic import Field, SecretStr

from models.loop import Frozen

SCOPE = "countersign"
"""What OpenTelemetry knows our instruments by."""


class TelemetrySettings(Frozen):
    """An OpenTelemetry collector; without one nothing is measured and nothing is traced."""

    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$")
    """Takes OTLP over HTTP, as `http://127.0.0.1:4318`; the path of each signal is added."""
    token: SecretStr | None = None
    """Sent as `Authorization: Bearer`, if the collector wants one."""
    traces: bool = True
    """Send traces besides metrics."""
    seconds: int = Field(default=15, ge=1)
    """Between two reports of the metrics."""
