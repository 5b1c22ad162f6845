from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from models.people import Key, Person
from models.settings import Settings
from scripts.commands.directory import people_of, tenants_in
from tests.conftest import Stack, a_key, note
from tests.test_cli import command, offline, run
from tests.test_people import public
from tests.test_signatures import make_key

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def named(tmp_path: Path) -> Settings:
    states = ({}, {"revoked": True}, {"valid_before": NOW - timedelta(days=1)})
    keys = tuple(
        Key(public=public(make_key(tmp_path, f"ann{number}")), **state) for number, state in enumerate(states)
    )
    people = (Person(name="bob"), Person(name="ann", roles=("editor", "legal"), keys=keys))
    return offline(tmp_path / "data", people=people)


def test_people_are_listed_with_their_roles_and_what_is_wrong_with_their_keys(named: Settings) -> None:
    ann, bob = people_of(named, NOW)
    assert (ann["person"], ann["roles"]) == ("ann", ["editor", "legal"])
    assert [key["state"] for key in ann["keys"]] == [
        "counts",
        "its key was revoked",
        "its key is not valid any more",
    ]
    assert all(key["fingerprint"].startswith("SHA256:") for key in ann["keys"])
    assert (bob["roles"], bob["keys"]) == ([], [])


def test_the_command_lists_people_for_readers_and_programs(named: Settings) -> None:
    shown = run(named, "people")
    assert shown.exit_code == 0
    assert "editor, legal" in shown.output
    assert [one["person"] for one in json.loads(run(named, "people", "--json").output)] == ["ann", "bob"]


def test_with_nobody_named_the_command_says_that_any_name_counts(tmp_path: Path) -> None:
    settings = offline(tmp_path)
    assert "any name counts" in run(settings, "people").output
    assert json.loads(run(settings, "people", "--json").output) == []


def test_tenants_say_what_is_unknown_without_a_database_and_make_none(tmp_path: Path) -> None:
    settings = offline(tmp_path / "data")
    [one] = json.loads(run(settings, "tenants", "--json").output)
    assert (one["tenant"], one["configured"], one["events"]) == ("default", True, None)
    assert "?" in run(settings, "tenants").output
    assert not (tmp_path / "data" / "countersign.db").exists()


def test_other_tenants_with_records_are_listed_after_ours(named: Settings) -> None:
    rows = tenants_in(named, {"acme": 3, "default": 5})
    assert [(row["tenant"], row["events"], row["people"]) for row in rows] == [
        ("default", 5, 2),
        ("acme", 3, None),
    ]


async def test_a_tenant_is_listed_with_its_events_and_agents(stack: Stack) -> None:
    started = await stack.propose(a_key(), note())
    await stack.digest(started)
    [one] = json.loads((await command(stack, "tenants", "--json")).output)
    assert one["events"] >= 4
    assert "external" in one["agents"]
