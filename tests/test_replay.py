from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer

from temporal.plugin import CountersignPlugin
from tests.variants import AGENTS
from workers import registry
from workflows.beliefs import BeliefOwner
from workflows.unknown import Unknown
from workflows.upkeep import Upkeep

FOLDER = Path(__file__).parent / "histories"
HISTORIES = sorted(FOLDER.glob("*.json"))
MACHINE = re.compile(r"\d+@[a-z]|/(home|root|tmp|work|usr|var/folders|Users)/|\.py\b|[A-Z]:\\\\")


def read(path: Path) -> WorkflowHistory:
    history = json.loads(path.read_text())
    started = history["events"][0]["workflowExecutionStartedEventAttributes"]
    return WorkflowHistory.from_json(started["workflowId"], history)


def kind(path: Path) -> str:
    started = json.loads(path.read_text())["events"][0]["workflowExecutionStartedEventAttributes"]
    return str(started["workflowType"]["name"])


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
async def test_every_recorded_history_replays_on_todays_code(path: Path) -> None:
    replayer = Replayer(
        workflows=[*registry.agents(), *AGENTS, BeliefOwner, Upkeep, Unknown], plugins=[CountersignPlugin()]
    )
    result = await replayer.replay_workflow(read(path), raise_on_replay_failure=False)
    assert result.replay_failure is None


def test_every_workflow_type_has_a_recorded_history() -> None:
    recorded = {kind(path) for path in HISTORIES}
    ours = {agent.SPEC.name for agent in registry.agents()} | {"belief", "upkeep"}
    assert ours <= recorded
    assert recorded - ours - {agent.SPEC.name for agent in AGENTS} == {"nobody"}


async def test_a_history_of_other_decisions_does_not_replay() -> None:
    path = FOLDER / "external_approved.json"
    text = path.read_text().replace('"activityType":{"name":"plan"}', '"activityType":{"name":"settle"}')
    history = json.loads(text)
    started = history["events"][0]["workflowExecutionStartedEventAttributes"]
    replayer = Replayer(workflows=[*registry.agents()], plugins=[CountersignPlugin()])
    result = await replayer.replay_workflow(
        WorkflowHistory.from_json(started["workflowId"], history), raise_on_replay_failure=False
    )
    assert "settle" in str(result.replay_failure)


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_a_recorded_history_says_nothing_of_the_machine_it_was_recorded_on(path: Path) -> None:
    found = [text for text in texts(json.loads(path.read_text())) if MACHINE.search(text)]
    assert found == []


def texts(value: Any) -> Iterator[str]:
    """Every text in a history, payloads read."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value
        with suppress(binascii.Error, UnicodeDecodeError):
            yield base64.b64decode(value, validate=True).decode()
