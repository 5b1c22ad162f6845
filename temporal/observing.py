"""What workflows and activities tell OpenTelemetry, as one interceptor of a worker; replays tell nothing.

A run is one trace, and its id is the run's, so that nothing has to be handed over, and whoever goes on with a
run after a crash goes on with its trace. Labels are words of code and settings: no id that derives from a
request, no text, no message of an error.
"""

from __future__ import annotations

import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from opentelemetry.context import Context
from opentelemetry.metrics import Meter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)
from temporalio import activity, workflow
from temporalio.api.common.v1 import Payload
from temporalio.exceptions import FailureError
from temporalio.worker import (
    ActivityInboundInterceptor,
    ContinueAsNewInput,
    ExecuteActivityInput,
    ExecuteWorkflowInput,
    Interceptor,
    StartActivityInput,
    StartLocalActivityInput,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
    WorkflowOutboundInterceptor,
)

from models.inference import Answered, Ask
from models.ledger import Append, EventType
from models.loop import Outcome
from models.orders import Effect, EffectOrder, Fell
from workflows.loop import Loop

CHAIN = "countersign-chain"
"""Header of activities whose run was continued: the first run, whose trace they belong to."""
TOLD = "countersign_told"
EFFECTS = frozenset({"apply", "settle", "undo"})
WAITS = (1, 5, 15, 60, 300, 900, 3600, 14400, 86400, 604800)
"""Seconds: people take as long as people take."""
FAILED, CONTINUED, ENDED = "run_failed", "continued", "ended"
"""How runs end that have no outcome."""
Labels = dict[str, str]


class Ids(RandomIdGenerator):
    """Random ids, but for a span whose ids follow from its run."""

    def __init__(self) -> None:
        """No ids are given."""
        super().__init__()
        self._given: ContextVar[tuple[int, int] | None] = ContextVar("ids", default=None)

    @contextmanager
    def given(self, trace: int, span: int) -> Generator[None]:
        """Spans that start inside have these."""
        token = self._given.set((trace, span))
        try:
            yield
        finally:
            self._given.reset(token)

    def generate_trace_id(self) -> int:
        """The given one, or any."""
        given = self._given.get()
        return super().generate_trace_id() if given is None else given[0]

    def generate_span_id(self) -> int:
        """The given one, or any."""
        given = self._given.get()
        return super().generate_span_id() if given is None else given[1]


@dataclass(frozen=True, slots=True)
class Ran:
    """A run that has ended, or was continued as a new one."""

    kind: str
    run: str
    chain: str
    """The first run."""
    began: datetime
    ended: datetime
    status: str


@dataclass(frozen=True, slots=True)
class Decided:
    """A request has its outcome."""

    agent: str
    status: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Waited:
    """Somebody has answered."""

    agent: str
    kind: str
    seconds: float


class Observing(Interceptor):
    """Tells meters and tracer what a worker's workflows and activities come to."""

    def __init__(self, meter: Meter, tracer: Tracer, ids: Ids) -> None:
        """Take where to tell it; the tracer's ids must be these."""
        self._tracer = tracer
        self._ids = ids
        self._decisions = meter.create_histogram(
            "countersign.decision.duration",
            unit="s",
            description="From a request to its outcome",
            explicit_bucket_boundaries_advisory=WAITS,
        )
        self._waits = meter.create_histogram(
            "countersign.wait.duration",
            unit="s",
            description="From an intent's delivery to an answer of a person",
            explicit_bucket_boundaries_advisory=WAITS,
        )
        self._effects = meter.create_counter(
            "countersign.effects", unit="{effect}", description="What became of actions, by step"
        )
        self._answers = meter.create_counter(
            "countersign.answers", unit="{answer}", description="Answers that runs got, and where from"
        )
        self._fallbacks = meter.create_counter(
            "countersign.fallbacks", unit="{fallback}", description="Tiers that failed or were not sure"
        )

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        """Stand before every activity."""
        return _Activities(next, self)

    def workflow_interceptor_class(
        self, input: WorkflowInterceptorClassInput
    ) -> type[WorkflowInboundInterceptor]:
        """Stand around every workflow, and be told from inside the sandbox."""
        input.unsafe_extern_functions[TOLD] = self.told
        return _Workflows

    @contextmanager
    def step(self, info: activity.Info, headers: Mapping[str, Payload]) -> Generator[None]:
        """An activity of a run, as a span for as long as the block lasts."""
        labels: dict[str, str | int] = {"countersign.step": info.activity_type, "attempt": info.attempt}
        with self._tracer.start_as_current_span(
            f"RunActivity:{info.activity_type}",
            context=_inside(info.workflow_run_id, headers),
            kind=SpanKind.SERVER,
            attributes=labels,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise

    def learned(self, step: str, given: object, result: object) -> None:
        """Count what an activity came to."""
        match given, result:
            case Ask(), Answered():
                source = "cache" if result.cached else "similar" if result.similar else "model"
                labels = {"tier": given.tier, "task": given.call.task, "source": source}
                self._answers.add(1, _ours(labels | {"unsure": str(result.unsure).lower()}))
            case EffectOrder(), Effect() if step in EFFECTS:
                self._effects.add(1, _ours({"effect": result.what.value, "step": step}))
            case Fell(), _:
                to = given.to or "none"
                labels = {"tier": given.tier, "to": to, "task": given.task, "kind": given.kind}
                self._fallbacks.add(1, _ours(labels))
            case _:
                pass

    def told(self, what: Ran | Decided | Waited) -> None:
        """Take what a workflow says, outside its sandbox."""
        match what:
            case Ran():
                self._ran(what)
            case Decided():
                labels = _ours({"agent": what.agent, "status": what.status})
                self._decisions.record(what.seconds, labels)
            case Waited():
                self._waits.record(what.seconds, _ours({"agent": what.agent, "verdict": what.kind}))

    def _ran(self, ran: Ran) -> None:
        trace, span = _trace_of(ran.chain), _span_of(ran.run)
        context = Context() if ran.run == ran.chain else _within(trace, _span_of(ran.chain))
        with self._ids.given(trace, span):
            made = self._tracer.start_span(
                f"RunWorkflow:{ran.kind}",
                context=context,
                kind=SpanKind.SERVER,
                start_time=_nanoseconds(ran.began),
                attributes=_ours({"status": ran.status}),
            )
        if ran.status == FAILED:
            made.set_status(StatusCode.ERROR)
        made.end(_nanoseconds(ran.ended))


class _Activities(ActivityInboundInterceptor):
    def __init__(self, next: ActivityInboundInterceptor, observing: Observing) -> None:
        super().__init__(next)
        self._observing = observing

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        info = activity.info()
        with self._observing.step(info, input.headers):
            result = await super().execute_activity(input)
        self._observing.learned(info.activity_type, input.args[0] if input.args else None, result)
        return result


class _Workflows(WorkflowInboundInterceptor):
    def init(self, outbound: WorkflowOutboundInterceptor) -> None:
        super().init(_Orders(outbound))

    async def execute_workflow(self, input: ExecuteWorkflowInput) -> Any:
        try:
            result = await super().execute_workflow(input)
        except FailureError:
            _ran(FAILED)
            raise
        _ran(result.status.value if isinstance(result, Outcome) else ENDED)
        loop = _loop()
        if loop is not None and loop.journal.is_open and isinstance(result, Outcome):
            began = loop.journal.admitted.entries[0].recorded_at
            _tell(Decided(loop.request.agent, result.status.value, _seconds(began)))
        return result


class _Orders(WorkflowOutboundInterceptor):
    def continue_as_new(self, input: ContinueAsNewInput) -> NoReturn:
        _ran(CONTINUED)
        super().continue_as_new(input)

    def start_activity(self, input: StartActivityInput) -> workflow.ActivityHandle[Any]:
        input.headers = _marked(input.headers)
        return super().start_activity(input)

    def start_local_activity(self, input: StartLocalActivityInput) -> workflow.ActivityHandle[Any]:
        input.headers = _marked(input.headers)
        if input.args and isinstance(given := input.args[0], Append):
            _answered(given)
        return super().start_local_activity(input)


def _loop() -> Loop | None:
    instance = workflow.instance()
    return instance if isinstance(instance, Loop) else None


def _tell(what: Ran | Decided | Waited) -> None:
    if not workflow.unsafe.is_replaying():
        workflow.extern_functions()[TOLD](what)


def _ran(status: str) -> None:
    # By its class: the type of an unknown workflow is whatever somebody typed.
    info, kind = workflow.info(), type(workflow.instance()).__name__
    _tell(Ran(kind, info.run_id, _chain(info), info.start_time, workflow.now(), status))


def _answered(wish: Append) -> None:
    loop = _loop()
    if loop is None or wish.drafts[-1].type is not EventType.VERDICT:
        return
    since = loop.journal.progress.delivered_at or loop.journal.shown_at
    if since is not None:
        _tell(Waited(loop.request.agent, str(wish.drafts[-1].body["kind"]), _seconds(since)))


def _seconds(since: datetime) -> float:
    return max(0.0, (workflow.now() - since).total_seconds())


def _chain(info: workflow.Info) -> str:
    """The run whose trace it is; owners of beliefs go on for ever, and each of their runs is a trace."""
    return info.first_execution_run_id if _loop() is not None else info.run_id


def _marked(headers: Mapping[str, Payload]) -> Mapping[str, Payload]:
    info = workflow.info()
    chain = _chain(info)
    return headers if chain == info.run_id else {**headers, CHAIN: Payload(data=chain.encode())}


def _inside(run: str | None, headers: Mapping[str, Payload]) -> Context:
    """Where an activity's span belongs."""
    if run is None:
        return Context()
    chain = headers[CHAIN].data.decode(errors="replace") if CHAIN in headers else run
    return _within(_trace_of(chain), _span_of(run))


def _within(trace: int, span: int) -> Context:
    parent = SpanContext(trace, span, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return set_span_in_context(NonRecordingSpan(parent), Context())


def _trace_of(run: str) -> int:
    """A run's id is one of 128 bits, as that of a trace."""
    try:
        return uuid.UUID(run).int
    except ValueError:
        return uuid.uuid5(uuid.NAMESPACE_OID, run).int


def _span_of(run: str) -> int:
    return _trace_of(run) & (2**64 - 1)


def _nanoseconds(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000) * 1000


def _ours(labels: Labels) -> Labels:
    return {f"countersign.{name}": value for name, value in labels.items()}
