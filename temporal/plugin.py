"""Converter, sandbox and failure types as one object, for clients, workers, replay and tests alike."""

from __future__ import annotations

from collections.abc import Sequence

from temporalio.converter import PayloadCodec
from temporalio.plugin import SimplePlugin
from temporalio.worker import Interceptor
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from temporal.converter import data_converter

PASSED_THROUGH = (
    "models",
    "activities",
    # The loop itself is loaded once; loading it anew for each run cost a fifth of the worker's time. Agents
    # stay inside, where a clock or a random number is refused.
    "workflows.loop",
    "workflows.journal",
    "workflows.approval",
    "workflows.saga",
    "workflows.messages",
    "workflows.policies",
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_inspection",
    "rfc8785",
    "yaml",
    "markdown_it",
    "mdurl",
    "jsonschema",
    "jsonschema_specifications",
    "referencing",
    "rpds",
    "attrs",
    "attr",
)
"""Modules a workflow may share with its worker: data, pure rules, and the names of activities."""


class CountersignPlugin(SimplePlugin):
    """Give this to `Client.connect`, and to `Replayer`; workers take it from their client."""

    def __init__(self, codec: PayloadCodec | None = None, interceptors: Sequence[Interceptor] = ()) -> None:
        """Hold no state; `codec` seals payloads, see `temporal.converter.codec_of`.

        `interceptors` are for workers, see `temporal.observing`.
        """
        super().__init__(
            "countersign",
            data_converter=data_converter(codec),
            workflow_runner=sandbox(),
            interceptors=interceptors,
        )


def sandbox() -> SandboxedWorkflowRunner:
    """The sandbox every workflow runs in."""
    return SandboxedWorkflowRunner(
        restrictions=SandboxRestrictions.default.with_passthrough_modules(*PASSED_THROUGH)
    )
