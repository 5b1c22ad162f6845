"""What there is to run: agents found by scanning `workflows/agents`, and the tasks they put to models."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable

import workflows.agents
from models.agent import AgentSpec
from models.calendar import calendar_task
from models.drafting import content_tasks
from models.errors import InvalidInput
from models.inference import Task
from models.settings import Settings
from workflows.loop import Loop
from workflows.upkeep import UPKEEP


def agents() -> tuple[type[Loop], ...]:
    """Every agent's workflow class, by name.

    Raises:
        InvalidInput: a file holds no agent, an agent has no SPEC, or two share a name.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(workflows.agents.__path__))
    found = [agent for name in names for agent in _agents_of(name)]
    return _distinct(found)


def scheduled() -> frozenset[str]:
    """What a schedule may name: every agent, and upkeep."""
    return frozenset({agent.SPEC.name for agent in agents()} | {UPKEEP})


def tasks(settings: Settings) -> dict[str, Task]:
    """What models can be asked, by name."""
    return {task.name: task for task in (*content_tasks(settings.content), calendar_task())}


def _agents_of(name: str) -> list[type[Loop]]:
    module = importlib.import_module(f"workflows.agents.{name}")
    classes = [item for _, item in inspect.getmembers(module, inspect.isclass)]
    own = [
        item
        for item in classes
        if issubclass(item, Loop) and item is not Loop and item.__module__ == module.__name__
    ]
    if not own:
        raise InvalidInput.field(
            "agent", f"workflows/agents/{name}.py", "define a class that derives from Loop"
        )
    for item in own:
        if not isinstance(getattr(item, "SPEC", None), AgentSpec):
            raise InvalidInput.field(
                "SPEC", f"workflows/agents/{name}.py", f"give {item.__name__} an AgentSpec"
            )
    return own


def _distinct(found: Iterable[type[Loop]]) -> tuple[type[Loop], ...]:
    by_name: dict[str, type[Loop]] = {}
    for item in found:
        if item.SPEC.name in by_name:
            raise InvalidInput.field("SPEC.name", item.SPEC.name, "two agents have it; rename one")
        by_name[item.SPEC.name] = item
    return tuple(by_name.values())
