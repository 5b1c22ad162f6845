"""What calls to models took, for OpenTelemetry, in words of settings and of code.

Nothing of a prompt or an answer is told. Names are those of its semantic conventions for generative AI, where
they have one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from opentelemetry.metrics import Meter, NoOpMeter
from opentelemetry.trace import NoOpTracer, Span, SpanKind, StatusCode, Tracer

from models.inference import Completion, attempt_of
from models.routing import price
from models.settings import TierSettings

DURATIONS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
"""Both as the conventions want them."""
Labels = dict[str, str]


class ModelCalls:
    """Tells OpenTelemetry of every call; costs next to nothing while nobody listens."""

    def __init__(self, meter: Meter | None = None, tracer: Tracer | None = None) -> None:
        """Take where to tell it."""
        meter = meter or NoOpMeter("nobody")
        self._tracer = tracer or NoOpTracer()
        self._duration = meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="Time of one call to a model, repairs apart",
            explicit_bucket_boundaries_advisory=DURATIONS,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Tokens read and written in one call to a model",
            explicit_bucket_boundaries_advisory=TOKENS,
        )
        self._cost = meter.create_counter(
            "countersign.model.cost",
            unit="{currency}",
            description="What answers of models cost, on tiers that have prices",
        )

    @contextmanager
    def made(self, tier: TierSettings, task: str) -> Generator[Callable[[Completion], None]]:
        """A call for as long as the block lasts; what it yields is to be given the answer."""
        labels = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": tier.kind,
            "countersign.tier": tier.name,
            "countersign.task": task,
        }
        if tier.model:
            labels["gen_ai.request.model"] = tier.model
        began = time.perf_counter()
        # An exception's text may quote what was asked, so that only its kind is told.
        with self._tracer.start_as_current_span(
            f"chat {tier.name}",
            kind=SpanKind.CLIENT,
            attributes=labels,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield lambda completion: self._answered(completion, tier, labels, span)
            except BaseException as error:
                labels["error.type"] = _kind(error)
                span.set_attribute("error.type", labels["error.type"])
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                self._duration.record(time.perf_counter() - began, labels)

    def _answered(self, completion: Completion, tier: TierSettings, labels: Labels, span: Span) -> None:
        asked, answered = completion.prompt_tokens, completion.completion_tokens
        self._tokens.record(asked, labels | {"gen_ai.token.type": "input"})
        self._tokens.record(answered, labels | {"gen_ai.token.type": "output"})
        span.set_attributes({"gen_ai.usage.input_tokens": asked, "gen_ai.usage.output_tokens": answered})
        amount, currency = price(tier, asked, answered)
        if amount is not None and currency is not None:
            self._cost.add(float(amount), labels | {"countersign.currency": currency})


def _kind(error: BaseException) -> str:
    attempt = attempt_of(error)
    return type(error).__name__ if attempt is None else attempt.ending.value
