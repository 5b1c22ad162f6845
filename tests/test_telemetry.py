from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import ValidationError
from temporalio.client import WorkflowFailureError
from temporalio.runtime import Runtime

from activities.services.model_calls import ModelCalls
from activities.tiers.scripted import Scripted
from models.errors import TierUnavailable
from models.gate import Kind
from models.inference import Ending
from models.loop import GateRule, Request
from models.policy import AgentPolicy, Policy
from models.settings import Settings, TemporalSettings, TierSettings
from models.telemetry import TelemetrySettings
from scripts.bench._agents import TASK, Stub, line_task
from temporal.client import Started, submit
from temporal.observing import Ids, Observing
from temporal.telemetry import Telemetry, sending
from tests.collector import Collector, collecting, labels, points
from tests.conftest import Stack, a_key, note, serving, settings_for, stack_of
from tests.databases import migrated
from tests.variants import AGENTS
from workers import config
from workers.compose import Parts

EDGE = TierSettings(
    name="edge",
    kind="llama_cpp",
    url="http://127.0.0.1:9",
    price_per_million_input="2",
    price_per_million_output="4",
    currency="EUR",
)
LOOK = """
import asyncio, json, pathlib, signal, sys, threading
import psutil
from models.visibility import Role
from workers import config
from workers.__main__ import run

async def look(settings):
    ready = settings.data / "run" / "decide.ready"
    running = asyncio.create_task(run(settings, Role.DECIDE))
    while not ready.exists() and not running.done():
        await asyncio.sleep(0.01)
    unwanted = ("temporal.telemetry", "temporal.observing", "opentelemetry.sdk", "opentelemetry.exporter")
    seen = {
        "loaded": [name for name in unwanted if name in sys.modules],
        "threads": [one.name for one in threading.enumerate() if "tel" in one.name.lower()],
        "listening": [one.laddr for one in psutil.Process().net_connections() if one.status == "LISTEN"],
    }
    signal.raise_signal(signal.SIGTERM)
    await running
    print(json.dumps(seen))

asyncio.run(look(config.restore(pathlib.Path(sys.argv[1]))))
"""
"""What a worker has of telemetry once it is ready."""
ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120


@pytest.fixture(scope="module")
def temporal_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TemporalSettings]:
    """A server with no runs of other tests, which would be taken up here."""
    with serving(tmp_path_factory.mktemp("temporal")) as settings:
        yield settings


PARTS = Parts(
    agents=(Stub, *AGENTS),
    tasks={TASK: line_task()},
    endpoints={"edge": Scripted("edge", lambda prompt: "a secret answer")},
)


def settings_of(temporal: TemporalSettings, folder: Path) -> Settings:
    one = AgentPolicy(connectors=("null",), gate=GateRule(remind_seconds=None))
    agents = {name: one for name in ("external", "short", "stub")}
    return settings_for(temporal, folder, tiers=(EDGE,), probe=False, policy=Policy(agents=agents))


async def decided(stack: Stack) -> Started:
    """One decision of an agent that asks a model, from request to outcome."""
    ref = await stack.content.put("default", b'{"text": "a secret request"}', "application/json")
    run = await submit(stack.client, Request(agent="stub", key=a_key(), body=ref), stack.settings.temporal)
    async with asyncio.timeout(LIMIT):
        await stack.approve(run)
        assert (await run.handle.result()).status == "executed"
    return run


def connected(spans: list[Span]) -> bool:
    """Whether each span but one hangs on another."""
    ids = {span.span_id for span in spans}
    [root] = [span for span in spans if not span.parent_span_id]
    return root.name == "RunWorkflow:Stub" and all(
        span.parent_span_id in ids for span in spans if span is not root
    )


def counted(collector: Collector, name: str) -> dict[str, dict[str, Any]]:
    """The last state of a metric in each process, by the words on it."""
    kept: dict[str, dict[str, Any]] = {}
    for metric in collector.metrics()[name]:
        for point in points(metric):
            words = labels(point.attributes)
            kept[json.dumps(words, sort_keys=True)] = words | {"point": point}
    return kept


def only(collector: Collector, name: str) -> dict[str, Any]:
    [one] = counted(collector, name).values()
    return one


async def test_one_decision_is_one_trace_and_counts_once(
    temporal_alone: TemporalSettings, tmp_path: Path
) -> None:
    with collecting() as collector:
        where = TelemetrySettings(otlp_endpoint=f"{collector.url}/", token="s3cret")
        async with sending(where, "all") as telemetry:
            settings = settings_of(temporal_alone, tmp_path)
            async with stack_of(settings, PARTS, telemetry=telemetry) as stack:
                started = await decided(stack)
    spans, run = collector.spans(), (await started.handle.describe()).run_id
    assert {span.trace_id for span in spans} == {uuid.UUID(run).bytes}
    assert connected(spans), [(span.name, span.parent_span_id) for span in spans]
    names = {span.name for span in spans}
    steps = ("admit", "recall", "route", "answer", "plan", "present", "record", "apply", "verify", "conclude")
    assert names >= {f"RunActivity:{step}" for step in steps[:7]} | {"RunActivity:apply", "chat edge"}
    assert "RunActivity:conclude" in names
    [chat] = [span for span in spans if span.name == "chat edge"]
    [asked] = [span for span in spans if span.name == "RunActivity:answer"]
    assert chat.parent_span_id == asked.span_id
    assert not any(span.events or span.status.message for span in spans)
    assert collector.authorizations == {"Bearer s3cret"}

    decision = only(collector, "countersign.decision.duration")
    assert (decision["countersign.agent"], decision["countersign.status"]) == ("stub", "executed")
    waited = only(collector, "countersign.wait.duration")
    assert (waited["countersign.agent"], waited["countersign.verdict"]) == ("stub", "approve")
    effect = only(collector, "countersign.effects")
    assert (effect["countersign.effect"], effect["countersign.step"]) == ("applied", "apply")
    answer = only(collector, "countersign.answers")
    assert (answer["countersign.source"], answer["countersign.tier"]) == ("model", "edge")
    assert [one["point"].count for one in (decision, waited)] == [1, 1]
    assert [one["point"].as_int for one in (effect, answer)] == [1, 1]
    call = only(collector, "gen_ai.client.operation.duration")
    assert (call["gen_ai.operation.name"], call["countersign.task"]) == ("chat", "bench.line")
    tokens = counted(collector, "gen_ai.client.token.usage").values()
    assert {one["gen_ai.token.type"] for one in tokens} == {"input", "output"}
    assert only(collector, "countersign.model.cost")["countersign.currency"] == "EUR"
    own = collector.metrics()
    assert {"temporal_activity_schedule_to_start_latency", "temporal_workflow_completed"} <= own.keys()
    assert not any(
        "workflow_type" in labels(p.attributes) for m in own.values() for n in m for p in points(n)
    )
    for kept in (started.workflow_id, socket.gethostname(), "secret", "ann@example.test"):
        assert kept.encode() not in collector.raw


@pytest.mark.parametrize("listens", [False, True])
async def test_a_collector_that_does_not_answer_changes_nothing_and_is_mentioned_once(
    temporal_alone: TemporalSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, listens: bool
) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        if listens:
            deaf.listen()
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        async with sending(TelemetrySettings(otlp_endpoint=url, seconds=1), "all") as telemetry:
            settings = settings_of(temporal_alone, tmp_path)
            async with stack_of(settings, PARTS, telemetry=telemetry) as stack:
                for _ in range(3):
                    run = await decided(stack)
                assert (await stack.types(run))[-1] == "outcome"
    said = [one.getMessage() for one in caplog.records if one.name.startswith(("temporal.", "opentelemetry"))]
    each = [
        f"the collector does not take {one}; they are dropped until it does" for one in ("metrics", "traces")
    ]
    assert said and set(said) <= set(each) and len(said) == len(set(said))


async def test_a_collector_that_is_back_is_mentioned_and_gets_what_follows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with collecting() as collector:
        collector.status = 400
        async with sending(TelemetrySettings(otlp_endpoint=collector.url, seconds=1), "all") as telemetry:
            telemetry.meter.create_counter("tried").add(1)
            async with asyncio.timeout(LIMIT):
                while "does not take metrics" not in caplog.text:
                    await asyncio.sleep(0.01)
                collector.status = 200
                while "takes metrics again" not in caplog.text:
                    await asyncio.sleep(0.01)
    assert collector.metrics()["tried"]
    assert caplog.text.count("does not take metrics") == 1


async def test_a_worker_delivers_what_is_left_when_it_is_told_to_stop(
    temporal_alone: TemporalSettings, tmp_path: Path
) -> None:
    with collecting() as collector:
        where = TelemetrySettings(otlp_endpoint=collector.url, seconds=3600)
        settings = settings_of(temporal_alone, tmp_path).model_copy(update={"telemetry": where})
        assert (await looked(settings))["loaded"]
    assert {path for path, _ in collector.bodies} == {"/v1/metrics"}
    assert "temporal_worker_start" in collector.metrics() and b"decide" in collector.raw


class Watched:
    """Workers of this process, and the spans and metrics of all that they did."""

    def __init__(self) -> None:
        self.exporter, self.reader, ids = InMemorySpanExporter(), InMemoryMetricReader(), Ids()
        tracers = TracerProvider(id_generator=ids)
        tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        meters = MeterProvider([self.reader])
        meter, tracer = meters.get_meter("test"), tracers.get_tracer("test")
        self.telemetry = Telemetry(Runtime.default(), Observing(meter, tracer, ids), meter, tracer)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def counts(self, name: str) -> list[tuple[dict[str, Any], int]]:
        data = json.loads(self.reader.get_metrics_data().to_json())
        metrics = [
            one
            for whose in data["resource_metrics"]
            for scope in whose["scope_metrics"]
            for one in scope["metrics"]
        ]
        points = [point for one in metrics if one["name"] == name for point in one["data"]["data_points"]]
        return [(point["attributes"], point.get("count", point.get("value"))) for point in points]


async def test_a_run_that_changes_its_worker_and_is_continued_stays_one_trace(
    temporal_alone: TemporalSettings, tmp_path: Path
) -> None:
    settings, before, after = settings_of(temporal_alone, tmp_path), Watched(), Watched()
    async with stack_of(settings, PARTS, telemetry=before.telemetry) as stack:
        run = await stack.propose(a_key(), note(), agent="short")
        first = (await run.handle.describe()).run_id
        await stack.answer(run, Kind.REVISE, await stack.digest(run), comment="once more")
        await stack.digest(run, 2)
    async with stack_of(settings, PARTS, telemetry=after.telemetry) as stack:
        await stack.answer(run, Kind.REVISE, await stack.digest(run, 2), comment="once more")
        await stack.approve(run, 3)
        assert (await run.handle.result()).status == "executed"
    spans = [*before.spans, *after.spans]
    assert {span.context.trace_id for span in spans if span.context} == {uuid.UUID(first).int}
    assert [span.attributes for span in after.named("RunWorkflow:Short")] == [
        {"countersign.status": "continued"},
        {"countersign.status": "executed"},
    ]
    ids = {span.context.span_id for span in spans if span.context}
    [root] = [span for span in spans if span.parent is None]
    assert root in after.named("RunWorkflow:Short")
    assert all(span.parent is None or span.parent.span_id in ids for span in spans)
    assert after.counts("countersign.wait.duration") == [
        ({"countersign.agent": "short", "countersign.verdict": "revise"}, 1),
        ({"countersign.agent": "short", "countersign.verdict": "approve"}, 1),
    ]
    assert after.counts("countersign.decision.duration") == [
        ({"countersign.agent": "short", "countersign.status": "executed"}, 1)
    ]
    assert before.counts("countersign.decision.duration") == []


async def test_what_strangers_type_is_in_no_name_of_a_span(
    temporal_alone: TemporalSettings, tmp_path: Path
) -> None:
    watched = Watched()
    async with stack_of(settings_for(temporal_alone, tmp_path), telemetry=watched.telemetry) as stack:
        run = await stack.client.start_workflow("a secret word", id=a_key(), task_queue="decide")
        with pytest.raises(WorkflowFailureError):
            await run.result()
    [span] = watched.spans
    assert span.name == "RunWorkflow:Unknown" and not span.status.is_ok
    assert "secret" not in span.to_json()


async def test_without_a_collector_nothing_is_loaded_started_or_listening(
    temporal_alone: TemporalSettings, tmp_path: Path
) -> None:
    seen = await looked(settings_of(temporal_alone, tmp_path))
    assert seen == {"loaded": [], "threads": [], "listening": []}


async def looked(settings: Settings) -> dict[str, Any]:
    """What a worker process has of telemetry; it is told to stop then."""
    migrated(settings.database_url)
    config.snapshot(settings, settings.data / "settings.json")
    argv = [sys.executable, "-c", LOOK, str(settings.data / "settings.json")]
    ran = await asyncio.to_thread(
        subprocess.run, argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_what_fails_is_told_by_its_kind_and_never_in_its_words() -> None:
    reader, exporter = InMemoryMetricReader(), InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    calls = ModelCalls(MeterProvider([reader]).get_meter("test"), tracers.get_tracer("test"))
    with pytest.raises(TierUnavailable), calls.made(EDGE, "some.task"):
        raise TierUnavailable("a secret word", {"tier": "edge", "ending": Ending.OVERLOADED.value})
    [span] = exporter.get_finished_spans()
    assert span.attributes is not None and span.attributes["error.type"] == "overloaded"
    assert "secret" not in span.to_json() and span.events == ()
    assert "secret" not in str(reader.get_metrics_data())


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:4318", "grpc://x:4317", "http://", "http://x y", "http://x?a=b", "http://x:4318/v1/traces"],
)
def test_an_endpoint_that_is_none_is_refused_with_one_that_is(url: str) -> None:
    with pytest.raises(ValidationError, match="write it as http"):
        TelemetrySettings(otlp_endpoint=url)


@pytest.mark.parametrize("url", ["http://x:4318", "https://x/", "http://x:9090/api/v1/otlp"])
def test_an_endpoint_may_have_a_path(url: str) -> None:
    assert TelemetrySettings(otlp_endpoint=url).otlp_endpoint == url
