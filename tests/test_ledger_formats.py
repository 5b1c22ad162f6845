"""The log as OCSF and as PROV-JSON: what each of them requires is there, and it says what the log says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from activities.services.database import Database
from activities.services.ledger_export import Header, Leaf, of_database
from activities.services.ledger_formats import ACTIVITIES, to_ocsf, to_prov
from activities.services.ledger_store import add_in
from models.errors import LedgerBroken
from models.ledger import Draft, EventType
from models.loop import Outcome, Status
from models.settings import Settings
from scripts.cli import app
from tests.databases import migrated
from tests.ledgers import NOW, TENANT, fill
from workers import config

TEXT, WHOLE = {"type": "string", "minLength": 1}, {"type": "integer"}
OCSF = {
    "type": "object",
    "required": [
        *("activity_id", "category_uid", "class_uid", "type_uid", "severity_id", "time", "metadata"),
        *("actor", "api", "src_endpoint"),
    ],
    "properties": {
        "activity_id": {"enum": [0, 1, 2, 3, 4, 99]},
        "activity_name": TEXT,
        "category_uid": {"const": 6},
        "class_uid": {"const": 6003},
        "type_uid": WHOLE,
        "severity_id": {"enum": [0, 1, 2, 3, 4, 5, 6, 99]},
        "status_id": {"enum": [0, 1, 2, 99]},
        "time": WHOLE,
        "metadata": {
            "required": ["product", "version"],
            "properties": {
                "product": {"anyOf": [{"required": ["name"]}, {"required": ["vendor_name"]}]},
                "version": {"pattern": r"^\d+\.\d+\.\d+$"},
                "uid": TEXT,
                "sequence": WHOLE,
            },
        },
        "actor": {"anyOf": [{"required": ["user"]}, {"required": ["app_name"]}]},
        "api": {
            "required": ["operation"],
            "properties": {"request": {"required": ["uid"]}, "service": {"required": ["name"]}},
        },
        "src_endpoint": {"anyOf": [{"required": ["ip"]}, {"required": ["name"]}, {"required": ["hostname"]}]},
        "resources": {"items": {"required": ["uid"]}},
    },
}
"""What API Activity (6003) of OCSF 1.6.0 requires, with the constraints of its objects."""
QUALIFIED = r"^(cs|prov|_):[A-Za-z0-9_.%@~-]+$"
RELATIONS = {
    "wasGeneratedBy": {"prov:entity": "entity", "prov:activity": "activity"},
    "wasAssociatedWith": {"prov:activity": "activity", "prov:agent": "agent"},
    "used": {"prov:activity": "activity", "prov:entity": "entity"},
}
THINGS = ("entity", "activity", "agent")
SPOKEN = ("status", "digest", "key", "body", "proposal", "kind", "reason")
"""What the mappings look for in a body."""
SHAPES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters())
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from((*SPOKEN, "size")) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
BODIES = st.dictionaries(st.sampled_from(SPOKEN) | st.text(max_size=3), SHAPES, max_size=5)


def _things() -> dict[str, Any]:
    named = {"type": "object", "propertyNames": {"pattern": QUALIFIED}}
    return {name: named for name in (*THINGS, *RELATIONS)}


PROV = {
    "type": "object",
    "additionalProperties": False,
    "required": ["prefix", *THINGS, *RELATIONS],
    "properties": {
        "prefix": {"propertyNames": {"pattern": r"^[a-zA-Z0-9_\-]+$"}, "additionalProperties": TEXT},
        **_things(),
    },
}
"""The frame of W3C's schema for PROV-JSON, as far as it is used."""


@pytest.fixture
async def database(tmp_path: Path) -> Iterator[Database]:
    url = Settings(data=tmp_path).database_url
    migrated(url)
    made = Database(url)
    await fill(made, 2)
    refused = Outcome(status=Status.REJECTED, workflow_id="run 3").model_dump(mode="json")
    for kind, body, who in (
        (EventType.REQUEST, {"agent": "x", "body": {"digest": "a" * 64, "size": 1, "media_type": "x"}}, ""),
        (EventType.REQUEST, {"agent": "x", "body": {"digest": "a" * 64, "size": 1, "media_type": "x"}}, "a"),
        (EventType.VERDICT, {"digest": "b" * 64, "kind": "reject"}, "müller, (ann)"),
        (EventType.REFUSAL, {"reason": "late"}, "bob"),
        (EventType.OUTCOME, refused, "x"),
        (EventType.KEY_ROTATED, {"purpose": "ledger"}, "ops"),
        (EventType.ERASURE, {"order": "o"}, "dpo"),
    ):
        draft = Draft(
            event_id=f"{kind}-{who}",
            stream="run 3",
            type=kind,
            actor_kind="person" if who else "system",
            actor_ref=who,
            correlation_id="run 3",
            body=body,
        )
        await made.write(lambda link, draft=draft: add_in(link, TENANT, draft, NOW))
    yield made
    made.close()


def items(database: Database) -> list[Any]:
    with database.engine.connect() as link:
        return list(of_database(link, TENANT, "countersign/default"))


def test_every_event_is_an_api_activity_with_all_that_ocsf_requires(database: Database) -> None:
    events = [json.loads(line) for line in to_ocsf(items(database))]
    assert len(events) == 21
    for number, event in enumerate(events, 1):
        jsonschema.validate(event, OCSF)
        assert event["type_uid"] == 600300 + event["activity_id"]
        assert event["metadata"]["sequence"] == number
    assert events[3]["actor"] == {"app_name": "external", "app_uid": "agent:external"}
    assert events[0]["time"] == int(NOW.timestamp() * 1000)
    verdict = next(
        one for one in events if one["metadata"]["event_code"] == "verdict" and "user" in one["actor"]
    )
    assert verdict["actor"]["user"]["name"] == "müller, (ann)"
    by_code = {one["metadata"]["event_code"]: one for one in events}
    assert (by_code["refusal"]["status"], by_code["refusal"]["severity"]) == ("Failure", "Low")
    assert by_code["outcome"]["status"] == "Failure" and events[6]["status"] == "Success"
    assert by_code["delivery"]["activity_name"] == "delivery" and by_code["delivery"]["activity_id"] == 99
    assert by_code["erasure"]["activity_id"] == 4
    assert all(one["unmapped"]["leaf_hash"] for one in events)


def test_every_type_of_event_has_a_place_in_ocsf() -> None:
    assert set(ACTIVITIES) <= set(EventType)


def test_provenance_names_nothing_that_it_does_not_describe(database: Database) -> None:
    (text,) = to_prov(items(database))
    document = json.loads(text)
    jsonschema.validate(document, PROV)
    assert document["prefix"] == {"cs": "urn:countersign:countersign%2Fdefault:"}
    for relation, ends in RELATIONS.items():
        for one in document[relation].values():
            assert all(one[end] in document[thing] for end, thing in ends.items()), one
    generated = [one["prov:entity"] for one in document["wasGeneratedBy"].values()]
    assert len(generated) == len(set(generated)) == len(document["activity"]) == 21


def test_an_effect_leads_back_to_the_verdict_and_to_who_gave_it(database: Database) -> None:
    (text,) = to_prov(items(database))
    document = json.loads(text)
    kinds = {name: one["prov:type"]["$"] for name, one in document["activity"].items()}
    attempt = next(name for name, kind in kinds.items() if kind == "cs:apply")
    used = [one["prov:entity"] for one in document["used"].values() if one["prov:activity"] == attempt]
    assert sorted(name.split(".")[0] for name in used) == ["cs:intent", "cs:verdict"]
    verdict = next(name for name in used if name.startswith("cs:verdict"))
    (given,) = [
        one["prov:activity"] for one in document["wasGeneratedBy"].values() if one["prov:entity"] == verdict
    ]
    assert kinds[given] == "cs:verdict"
    assert given in {one["prov:activity"] for one in document["wasAssociatedWith"].values()}


def test_an_event_that_cannot_be_read_is_no_part_of_a_view() -> None:
    broken = [Header("o", "default", 1, b""), Leaf(1, b"{}", {})]
    for view in (to_ocsf, to_prov):
        with pytest.raises(LedgerBroken, match="event 1 cannot be read"):
            list(view(broken))


def leaf(seq: int, kind: EventType, body: str, who: str = "ann") -> Leaf:
    envelope = {
        "event_id": f"e{seq}",
        "stream": "run",
        "type": kind,
        "actor_kind": "person",
        "actor_ref": who,
        "correlation_id": "run",
        "log_id": TENANT,
        "seq": seq,
        "version": seq,
        "recorded_at": NOW.isoformat(),
    }
    return Leaf(seq, f'{json.dumps(envelope)[:-1]}, "body": {body}}}'.encode(), {})


def written(*leaves: Leaf) -> tuple[list[Any], Any]:
    """A log in both forms; what is read is JSON to the letter, which knows no NaN."""
    log = [Header("countersign/default", TENANT, len(leaves), b""), *leaves]
    strict = json.JSONDecoder(parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (prov,) = to_prov(log)
    return [strict.decode(line) for line in to_ocsf(log)], strict.decode(prov)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EventType), BODIES), min_size=1, max_size=6))
def test_a_body_of_any_shape_has_a_place_in_both_views(events: list[tuple[EventType, Any]]) -> None:
    leaves = [leaf(number, kind, json.dumps(body)) for number, (kind, body) in enumerate(events, 1)]
    ocsf, prov = written(*leaves)
    assert len(ocsf) == len(prov["activity"]) == len(prov["wasGeneratedBy"]) == len(events)
    for one, (_, body) in zip(ocsf, events, strict=True):
        jsonschema.validate(one, OCSF)
        assert one["unmapped"]["body"] == body
    jsonschema.validate(prov, PROV)
    for relation, ends in RELATIONS.items():
        for one in prov[relation].values():
            assert all(one[end] in prov[thing] for end, thing in ends.items()), one


@pytest.mark.parametrize("status", ["{}", "[]", "null", "1", "true"])
def test_an_outcome_that_says_no_status_did_nothing(status: str) -> None:
    ocsf, _ = written(leaf(1, EventType.OUTCOME, f'{{"status": {status}}}'))
    assert (ocsf[0]["status_id"], ocsf[0]["status"]) == (2, "Failure")


def test_events_that_name_no_intent_and_no_key_are_not_taken_for_those_of_one_another() -> None:
    kinds = (EventType.INTENT, EventType.VERDICT, EventType.RECEIPT, EventType.RECEIPT)
    _, prov = written(*(leaf(number, kind, "{}") for number, kind in enumerate(kinds, 1)))
    assert not prov["used"]
    assert set(prov["entity"]) == {"cs:record.e1", "cs:verdict.e2", "cs:record.e3", "cs:record.e4"}


def test_half_a_character_has_a_name_too() -> None:
    body = r'{"digest": "\ud800", "key": "\udfff"}'
    ocsf, prov = written(leaf(1, EventType.RECEIPT, body))
    assert ocsf[0]["resources"][1] == {"uid": "\ud800", "type": "intent"}
    assert "cs:effect.%ED%BF%BF" in prov["entity"]


@pytest.mark.parametrize(
    "body", ['{"at": 1e999}', '{"at": NaN}', '{"deep": ' + "[" * 100_000 + "]" * 100_000 + "}"]
)
def test_what_is_no_json_or_has_no_bottom_is_an_event_that_cannot_be_read(body: str) -> None:
    with pytest.raises(LedgerBroken, match="event 1 cannot be read"):
        list(to_ocsf([Header("o", TENANT, 1, b""), leaf(1, EventType.OUTCOME, body)]))


@pytest.mark.parametrize("form", ["jsonl", "ocsf", "prov"])
def test_the_command_writes_all_three(database: Database, tmp_path: Path, form: str) -> None:
    kept = tmp_path / "settings.json"
    config.snapshot(Settings(data=tmp_path, embeddings=None), kept)
    out = tmp_path / "out"
    arguments = ["ledger", "export", "--format", form, "--out", str(out)]
    ran = CliRunner().invoke(app, arguments, env={config.SNAPSHOT: str(kept)})
    assert ran.exit_code == 0, ran.output
    first = json.loads(out.read_text() if form == "prov" else out.read_text().splitlines()[0])
    assert {"jsonl": "format", "ocsf": "class_uid", "prov": "wasGeneratedBy"}[form] in first
