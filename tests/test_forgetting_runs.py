"""A run about somebody: started, sent back, approved and carried out; then that somebody is forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from activities.services.checkpoints import Checkpoints, load_key
from activities.services.erasure import Erasure
from activities.services.ledger_export import of_database, to_lines
from activities.services.verifier import check_database
from models.gate import Kind
from models.loop import Request, Status
from models.settings import EncryptionSettings, TemporalSettings
from scripts import verify_ledger
from temporal.client import Started, submit
from tests.conftest import Stack, a_key, settings_for, stack_of, utc_now
from tests.ledgers import TENANT
from tests.test_forgetting import ANN, MARK, hits
from tests.test_glass import AGENTS, Room, command, room_settings
from tests.test_signatures import make_key
from workers.compose import Parts, stores


async def started(stack: Stack) -> Started:
    """A proposal whose every text holds the mark; titles do not, as they are part of what is decided on."""
    action = {
        **{"connector": "null", "operation": "note", "title": "Write the note"},
        "arguments": {"text": f"dear {MARK}"},
    }
    body = {"title": "Write to a customer", "actions": [action], "reasons": f"because {MARK} asked"}
    data = json.dumps(body).encode()
    ref = await stack.content.put(TENANT, data, "application/json", subject=ANN, plainly=True)
    request = Request(agent="external", key=a_key(), body=ref, subject=ANN)
    return await submit(stack.client, request, stack.settings.temporal)


def files(folder: Path) -> dict[str, bytes]:
    """What is ours in the data folder; the notes are the target."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "notes" not in path.parts]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize("sealed", [False, True], ids=["clear", "sealed"])
async def test_a_run_about_somebody_leaves_nothing_of_them_and_a_ledger_that_holds(
    temporal: TemporalSettings, tmp_path: Path, sealed: bool
) -> None:
    settings = settings_for(temporal, tmp_path).model_copy(
        update={"encryption": EncryptionSettings(enabled=sealed)}
    )
    async with stack_of(settings) as stack:
        run = await started(stack)
        first = await stack.digest(run)
        await stack.answer(run, Kind.REVISE, first, comment=f"greet {MARK} first")
        second = await stack.digest(run, 2)
        await stack.answer(run, Kind.APPROVE, second, comment=f"as {MARK} likes it")
        assert (await run.handle.result()).status is Status.EXECUTED
        history = (await run.handle.fetch_history()).to_json().encode()
    assert not sealed or hits(MARK, history) == 0
    await forgotten(settings, sealed)


@pytest.mark.parametrize("sealed", [False, True], ids=["clear", "sealed"])
async def test_a_review_does_not_go_with_what_was_erased_of_its_run(
    temporal: TemporalSettings, tmp_path: Path, sealed: bool
) -> None:
    keys = {name: make_key(tmp_path, name) for name in ("ann", "bob", "ines")}
    settings = room_settings(temporal, tmp_path, keys)
    settings = settings.model_copy(update={"encryption": EncryptionSettings(enabled=sealed)})
    async with stack_of(settings, Parts(agents=AGENTS)) as stack:
        room = Room(stack, keys)
        request = room.request().model_copy(update={"subject": ANN})
        data = str(request.body).encode()
        ref = await stack.content.put(TENANT, data, "application/json", subject=ANN, plainly=True)
        request = request.model_copy(update={"body": ref})
        run = await submit(stack.client, request, settings.temporal)
        digest = await stack.digest(run)
        await room.breaks(run, digest)
        await room.state(run, "reviewing")
        await Erasure(stack.database, utc_now).forget(TENANT, ANN, by="dpo")
        shown = await command(stack, "show", run.workflow_id)
        assert "What this was about was erased" in shown.stdout and digest in shown.stdout
        await run.handle.terminate()
        again = await submit(stack.client, request, settings.temporal)
        await room.state(again, "reviewing")
        signing = ("--as", "bob", "--sign", str(keys["bob"]))
        given = await command(stack, "approve", run.workflow_id, "--review", "--digest", digest, *signing)
        assert given.exit_code == 0, given.stderr
        assert (await again.handle.result()).status is Status.EXECUTED


async def forgotten(settings: Any, sealed: bool) -> None:
    assert hits(MARK, *files(settings.data).values()) > 0 or sealed
    with stores(settings) as database:
        receipt = await Erasure(database, utc_now).forget(TENANT, ANN, by="dpo")
        assert receipt.removed["texts"] >= 8 and set(receipt.left.values()) == {0}
        assert {
            name: hits(MARK, data) for name, data in files(settings.data).items() if hits(MARK, data)
        } == {}
        await verified(settings, database)


async def verified(settings: Any, database: Any) -> None:
    checkpoints = Checkpoints(database, load_key(settings.data), settings.ledger.origin)
    await checkpoints.write(TENANT)
    key = checkpoints.key(TENANT)
    report = await database.read(lambda link: check_database(link, TENANT, key.name, [key], []))
    assert (report.status, report.findings, report.gaps) == ("sound", (), ())
    lines = await database.read(lambda link: list(to_lines(of_database(link, TENANT, key.name))))
    export = settings.data / "export"
    export.write_text("".join(f"{line}\n" for line in lines), "utf-8", newline="\n")
    code, said = verify_ledger.check_export(str(export), [verify_ledger.Key(str(key))], [])
    assert code == 0, said
    assert hits(MARK, export.read_bytes()) == 0
