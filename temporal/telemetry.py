"""Metrics and traces of one process, Temporal's own among them, sent to a collector by OTLP over HTTP.

Loaded only where a collector is configured. It refuses to matter: what cannot be delivered is dropped, said
once, and holds nothing up, the end of the process least of all.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import requests
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.metrics.view import View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import NoOpTracer, Tracer
from temporalio.contrib.opentelemetry import MetricsExporter
from temporalio.runtime import MetricBuffer, Runtime, TelemetryConfig

from models.telemetry import SCOPE, TelemetrySettings
from temporal.observing import Ids, Observing

LOG = logging.getLogger(__name__)
PATIENCE = 3.0
"""Seconds for one delivery, repetitions included."""
LAST = 5.0
"""Seconds for all that is left when the process ends."""
BUFFERED = 20_000
"""Changes of Temporal's metrics between two looks at them, a second apart."""
TEMPORAL = "temporal_*"
LABELS = frozenset(
    {
        "namespace",
        "task_queue",
        "activity_type",
        "operation",
        "status_code",
        "failure_reason",
        "poller_type",
        "worker_type",
    }
)
"""What Temporal's metrics are told apart by. Not the type of a workflow, which is whatever somebody typed."""


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What a client and its workers are given."""

    runtime: Runtime
    observing: Observing
    meter: Meter
    tracer: Tracer


class _Said:
    """Says that a collector does not answer, and that it does again; not each time."""

    def __init__(self, signal: str) -> None:
        self._signal = signal
        self._fine = True

    def saw(self, fine: bool) -> None:
        if fine and not self._fine:
            LOG.warning("the collector takes %s again", self._signal)
        if not fine and self._fine:
            LOG.warning("the collector does not take %s; they are dropped until it does", self._signal)
        self._fine = fine


class _Metrics(OTLPMetricExporter):
    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._said = _Said("metrics")

    def export(
        self, metrics_data: MetricsData, timeout_millis: float | None = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        result = super().export(metrics_data, timeout_millis, **kwargs)
        self._said.saw(result is MetricExportResult.SUCCESS)
        return result


class _Spans(OTLPSpanExporter):
    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._said = _Said("traces")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        self._said.saw(result is SpanExportResult.SUCCESS)
        return result


@asynccontextmanager
async def sending(settings: TelemetrySettings, role: str) -> AsyncGenerator[Telemetry]:
    """Measure and trace for as long as the block lasts, then deliver what is left."""
    # Its own words, one line for each attempt, are replaced by ours.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    who = {"service.name": SCOPE, "service.instance.id": str(uuid.uuid4()), "countersign.role": role}
    resource, ids = Resource(who), Ids()
    meters = _meters(settings, resource)
    ends: list[Callable[[], None]] = [meters.shutdown]
    tracer: Tracer = NoOpTracer()
    if settings.traces:
        tracers = TracerProvider(resource=resource, id_generator=ids, shutdown_on_exit=False)
        tracers.add_span_processor(BatchSpanProcessor(_Spans(**_delivery(settings, "traces"))))
        tracer = tracers.get_tracer(SCOPE)
        ends.append(tracers.shutdown)
    buffer = MetricBuffer(BUFFERED)
    runtime = Runtime(telemetry=TelemetryConfig(metrics=buffer, attach_service_name=False))
    try:
        async with MetricsExporter(buffer, meters):
            meter = meters.get_meter(SCOPE)
            yield Telemetry(runtime, Observing(meter, tracer, ids), meter, tracer)
    finally:
        await asyncio.to_thread(_end, ends)


def _meters(settings: TelemetrySettings, resource: Resource) -> MeterProvider:
    exporter = _Metrics(**_delivery(settings, "metrics"))
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=settings.seconds * 1000)
    return MeterProvider(
        metric_readers=[reader],
        resource=resource,
        views=[View(instrument_name=TEMPORAL, attribute_keys=set(LABELS))],
        # An exemplar has the labels that were left out.
        exemplar_filter=AlwaysOffExemplarFilter(),
        shutdown_on_exit=False,
    )


def _delivery(settings: TelemetrySettings, signal: str) -> dict[str, Any]:
    session = requests.Session()
    # Where things are sent is settings' business, and no variable's.
    session.trust_env = False
    token = settings.token
    headers = {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}
    endpoint = f"{(settings.otlp_endpoint or '').rstrip('/')}/v1/{signal}"
    return {"endpoint": endpoint, "headers": headers, "session": session, "timeout": PATIENCE}


def _end(ends: Sequence[Callable[[], None]]) -> None:
    """Deliver what is left, side by side; what is not gone by then is lost."""
    threads = [threading.Thread(target=end, daemon=True) for end in ends]
    for thread in threads:
        thread.start()
    until = time.monotonic() + LAST
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
