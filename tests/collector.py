"""A collector that takes OTLP over HTTP and keeps what it was sent."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """What arrived, as bytes and decoded."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.status = 200
        self.bodies: list[tuple[str, bytes]] = []
        self.authorizations: set[str | None] = set()

    @property
    def raw(self) -> bytes:
        return b"\n".join(body for _, body in self.bodies)

    def spans(self) -> list[Span]:
        sent = [
            ExportTraceServiceRequest.FromString(body) for path, body in self.bodies if path == "/v1/traces"
        ]
        scopes = (scope for one in sent for whose in one.resource_spans for scope in whose.scope_spans)
        return [span for scope in scopes for span in scope.spans]

    def metrics(self) -> dict[str, list[Metric]]:
        """By name, in the order in which they came."""
        known: dict[str, list[Metric]] = defaultdict(list)
        for path, body in self.bodies:
            if path == "/v1/metrics":
                for whose in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    for scope in whose.scope_metrics:
                        for metric in scope.metrics:
                            known[metric.name].append(metric)
        return known


def points(metric: Metric) -> list[Any]:
    return list(getattr(metric, str(metric.WhichOneof("data"))).data_points)


def labels(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in attributes}


@contextmanager
def collecting() -> Generator[Collector]:
    """One that runs for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if collector.status == 200:
                collector.bodies.append((self.path, body))
            collector.authorizations.add(self.headers["Authorization"])
            self.send_response(collector.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()
