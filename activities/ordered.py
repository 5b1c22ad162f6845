"""Who ordered a step: what is written down of a run comes from that run.

The `temporal` CLI starts any activity by its name, with any input; only what a run orders is the run's word.
"""

from __future__ import annotations

from temporalio import activity

from models.errors import PolicyDenied


def of_this_run(workflow_id: str) -> None:
    """Let nobody else write in a run's name.

    Raises:
        PolicyDenied: it was started by hand, or by another run.
    """
    info = activity.info()
    if info.workflow_id != workflow_id:
        by = "nobody's run" if info.workflow_id is None else f"run {info.workflow_id}"
        raise PolicyDenied(f"{info.activity_type} of {workflow_id} was ordered by {by}; only it may do so")
