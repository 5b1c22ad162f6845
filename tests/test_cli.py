from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from activities.services.runs import Card
from models.content import parse_brief
from models.errors import InvalidInput, Unavailable
from models.gate import Kind
from models.ledger import EventType
from models.loop import Status
from models.settings import Settings, SiteSettings, TemporalSettings, TierSettings
from scripts.cli import app
from scripts.commands.answer import identity
from scripts.commands.demo import BRIEFS, Demo, edition
from scripts.commands.pages import file_of, read_page, visible_text
from scripts.commands.people import AtTerminal, Person, Played, Reply
from scripts.commands.ports import free_port, with_free_ports
from scripts.commands.session import Session
from scripts.exits import Exit, code_of
from tests.conftest import Stack, a_key, note, settings_for, stack_of
from tests.test_agents_content import BRIEF as WINTER
from tests.test_agents_content import site
from workers import config

__all__ = ["site"]

ANN = ("--as", "ann@example.test")
SITE = SiteSettings(
    name="demo", repository=Path("demo.git"), build=Path("demo"), address="http://127.0.0.1:9"
)
BRIEF = (BRIEFS / "bicycle-workshop.md").read_text()


def run(settings: Settings, *arguments: str, stdin: bytes = b"") -> Result:
    kept = settings.data / "settings.json"
    config.snapshot(settings, kept)
    return CliRunner().invoke(app, list(arguments), env={config.SNAPSHOT: str(kept)}, input=stdin)


async def command(stack: Stack, *arguments: str, stdin: bytes = b"") -> Result:
    return await asyncio.to_thread(run, stack.settings, *arguments, stdin=stdin)


def offline(data: Path, **changes: Any) -> Settings:
    """Nothing answers at these addresses."""
    temporal = TemporalSettings(address=f"127.0.0.1:{free_port()}")
    return settings_for(temporal, data, sites=(SITE,), **changes)


def proposal(text: str = "hello") -> bytes:
    return json.dumps({"title": f"Do {text}", "actions": [note(text)]}).encode()


@pytest.mark.parametrize(
    ("brief", "said"),
    [
        (BRIEF.replace("tone:", "tune:"), "'tune' is not accepted; did you mean tone?"),
        (BRIEF.replace("audience: people who cycle to work\n", ""), "audience: None is not accepted"),
        ("", "it is empty"),
        (" \n\t\n", "it is empty"),
        ("x" * 5_000_000, "FILE: 'more than 4194304 bytes'"),
        (b"---\ntitle: \xff\xfe\n---\n", "save the file as UTF-8"),
        (
            BRIEF.replace("slug: spring-bicycle-workshop", "slug: ../../etc/passwd"),
            "slug: '../../etc/passwd' is not accepted",
        ),
        ("---\n- a\n- b\n---\n", "write a mapping"),
        ("no front matter", "front matter: 'no front matter'"),
        (BRIEF.replace("target: demo", "target: elsewhere"), "known: demo"),
    ],
    ids=["key", "missing", "empty", "blank", "huge", "bytes", "slug", "list", "front", "site"],
)
def test_a_bad_brief_is_refused_before_anything_is_kept(
    tmp_path: Path, brief: str | bytes, said: str
) -> None:
    data = brief if isinstance(brief, bytes) else brief.encode()
    result = run(offline(tmp_path), "start", "content", "-", stdin=data)
    assert result.exit_code == Exit.REFUSED, result.output
    assert said in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "countersign.db").exists()


def test_an_unknown_agent_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    result = run(offline(tmp_path), "start", "contend", "-", stdin=b"x")
    assert result.exit_code == Exit.REFUSED
    assert "agent: 'contend' is not known; known agents: " in result.stderr
    assert "content" in result.stderr


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = run(offline(tmp_path), "start", "content", str(tmp_path / "gone.md"))
    assert result.exit_code == Exit.REFUSED
    assert "gone.md' is not accepted" in result.stderr


def test_a_proposal_that_does_not_fit_is_refused_by_its_field(tmp_path: Path) -> None:
    result = run(offline(tmp_path), "start", "external", "-", stdin=b'{"title": "x", "actions": []}')
    assert result.exit_code == Exit.REFUSED
    assert result.stderr.startswith("actions: ")


@pytest.mark.parametrize(
    "arguments", [("pending",), ("show", "x"), ("ledger", "tail"), ("approve", "x", *ANN)], ids=" ".join
)
def test_without_a_database_a_command_says_what_to_start(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = run(offline(tmp_path), *arguments)
    assert result.exit_code == Exit.NOT_READY
    assert "start `countersign up`" in result.stderr
    assert not (tmp_path / "countersign.db").exists()


def test_without_temporal_a_command_says_what_to_start(tmp_path: Path) -> None:
    result = run(offline(tmp_path), "schedules", "list")
    assert result.exit_code == Exit.NOT_READY
    assert "temporal.address" in result.stderr


def test_a_wrong_setting_is_refused_by_every_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["agents"], env={config.CONFIG: str(tmp_path / "gone.toml")})
    assert result.exit_code == Exit.REFUSED
    assert config.CONFIG in result.stderr


def test_an_error_nobody_expected_ends_in_one_line_and_code_1(tmp_path: Path) -> None:
    result = run(offline(tmp_path, database="nonsense://x"), "ledger", "tail")
    assert result.exit_code == Exit.UNEXPECTED
    assert result.stderr.startswith("unexpected NoSuchModuleError")
    assert len(result.stderr.splitlines()) == 1
    assert code_of(ValueError("x")) is Exit.UNEXPECTED


def test_help_documents_the_exit_codes() -> None:
    for arguments in ([], ["start"], ["approve"], ["ledger", "tail"]):
        said = " ".join(CliRunner().invoke(app, [*arguments, "--help"]).output.split())
        assert "4 refused by the gate" in said


def test_agents_are_listed_with_what_policy_lets_them_do(tmp_path: Path) -> None:
    found = {one["agent"]: one for one in json.loads(run(offline(tmp_path), "agents", "--json").stdout)}
    assert set(found) >= {"content", "external"}
    assert found["content"]["policy"]["connectors"] == ["null", "site"]
    assert found["stub"]["summary"].startswith("There is no such agent")


async def test_the_same_file_finds_the_run_and_later_its_outcome(stack: Stack) -> None:
    key = a_key()
    first = json.loads((await command(stack, *start(key), stdin=proposal())).stdout)
    assert first["was"] == "started"
    again = json.loads((await command(stack, *start(key), stdin=proposal())).stdout)
    assert again == first | {"was": "found"}

    other = await command(stack, *start(key), stdin=proposal("other"))
    assert other.exit_code == Exit.REFUSED
    assert "use a new key" in other.stderr

    handle = stack.client.get_workflow_handle(first["workflow_id"])
    digest = await waiting(stack, first["workflow_id"])
    assert (await command(stack, "approve", first["workflow_id"], "--digest", digest, *ANN)).exit_code == 0
    await handle.result()
    ended = json.loads((await command(stack, *start(key), stdin=proposal())).stdout)
    assert ended["was"] == "ended earlier"
    assert ended["outcome"]["status"] == "executed"
    other = await command(stack, *start(key), stdin=proposal("other"))
    assert other.exit_code == Exit.REFUSED


async def test_without_a_key_the_content_names_the_request(stack: Stack) -> None:
    text = a_key()
    first = json.loads(
        (await command(stack, "start", "external", "-", "--json", stdin=proposal(text))).stdout
    )
    again = await command(stack, "start", "external", "-", stdin=proposal(text))
    assert first["workflow_id"] in again.stdout
    assert "started before" in again.stdout


async def test_waiting_for_a_rejected_run_ends_with_code_4(stack: Stack) -> None:
    key = a_key()
    begun = json.loads((await command(stack, *start(key), stdin=proposal())).stdout)
    waits = asyncio.create_task(command(stack, *start(key), "--wait", stdin=proposal()))
    handle = stack.client.get_workflow_handle(begun["workflow_id"])
    digest = await waiting(stack, begun["workflow_id"])
    await handle.signal("reject", {"digest": digest, "approver": "ann"})
    result = await waits
    assert result.exit_code == Exit.GATE
    assert json.loads(result.stdout)["outcome"]["status"] == "rejected"
    assert "the run ended rejected" in result.stderr


async def test_pending_lists_what_waits_with_title_and_digest(stack: Stack) -> None:
    run_ = await stack.propose(a_key(), note())
    digest = await stack.digest(run_)

    async def row() -> dict[str, Any]:
        # Visibility follows a moment later.
        while True:
            listed = json.loads((await command(stack, "pending", "--json")).stdout)
            found = [one for one in listed if one["workflow_id"] == run_.workflow_id]
            if found:
                return found[0]

    found = await asyncio.wait_for(row(), 30)
    assert found["digest"] == digest
    assert found["agent"] == "external"
    assert found["risk"] == "reversible"
    assert found["title"].startswith("Do ")
    assert found["waiting_since"]
    assert run_.workflow_id in (await command(stack, "pending")).stdout


async def test_an_answer_counts_only_with_its_digest_and_a_name(stack: Stack) -> None:
    run_ = await stack.propose(a_key(), note())
    digest = await stack.digest(run_)
    nameless = await command(stack, "approve", run_.workflow_id, "--digest", digest)
    assert nameless.exit_code == Exit.REFUSED
    assert "--as: None is not accepted" in nameless.stderr
    unread = await command(stack, "approve", run_.workflow_id, *ANN)
    assert unread.exit_code == Exit.REFUSED
    assert "--digest: None is not accepted" in unread.stderr
    short = await command(stack, "approve", run_.workflow_id, "--digest", digest[:12], *ANN)
    assert short.exit_code == Exit.REFUSED
    wrong = await command(stack, "approve", run_.workflow_id, "--digest", "0" * 64, *ANN)
    assert wrong.exit_code == Exit.GATE
    assert digest in wrong.stderr
    assert "refusal" in await stack.types(run_)
    good = await command(stack, "approve", run_.workflow_id, "--digest", digest, "--json", *ANN)
    assert good.exit_code == Exit.DONE, good.stderr
    assert json.loads(good.stdout) | {"field": "", "remedy": ""} == json.loads(good.stdout)
    assert (await run_.handle.result()).status is Status.EXECUTED


async def test_feedback_and_delegation_reach_the_run(stack: Stack) -> None:
    run_ = await stack.propose(a_key(), note())
    first = await stack.digest(run_)
    revised = await command(
        stack, "revise", run_.workflow_id, "--digest", first, "--comment", "shorter", *ANN
    )
    assert revised.exit_code == Exit.DONE, revised.stderr
    second = await stack.digest(run_, 2)
    handed = await command(stack, "delegate", run_.workflow_id, "--digest", second, "--to", "bob", *ANN)
    assert handed.exit_code == Exit.DONE, handed.stderr
    refused = await command(stack, "approve", run_.workflow_id, "--digest", second, *ANN)
    assert refused.exit_code == Exit.GATE
    assert "delegated to bob" in refused.stderr
    rejected = await command(stack, "reject", run_.workflow_id, "--digest", second, "--as", "bob")
    assert rejected.exit_code == Exit.DONE
    assert (await run_.handle.result()).status is Status.REJECTED


async def test_an_answer_to_a_closed_run_is_refused_and_stands_in_the_ledger(stack: Stack) -> None:
    run_ = await stack.propose(a_key(), note())
    digest = await stack.digest(run_)
    await stack.approve(run_)
    await run_.handle.result()
    for _ in range(2):
        late = await command(stack, "reject", run_.workflow_id, "--digest", digest, *ANN)
        assert late.exit_code == Exit.GATE
        assert "has ended as executed" in late.stderr
    assert (await stack.types(run_))[-1] == "refusal"
    assert (await stack.types(run_)).count("refusal") == 1


async def test_a_run_that_was_terminated_is_called_that_and_not_ended(stack: Stack) -> None:
    run_ = await stack.propose(a_key(), note())
    digest = await stack.digest(run_)
    await run_.handle.terminate()
    shown = await command(stack, "show", run_.workflow_id)
    assert "stopped  Temporal has no open run of it; start the request again" in shown.stdout
    assert "countersign approve" not in shown.stdout
    late = await command(stack, "approve", run_.workflow_id, "--digest", digest, *ANN)
    assert late.exit_code == Exit.GATE
    assert "start the request again" in late.stderr


async def test_an_answer_to_an_unknown_run_is_refused(stack: Stack) -> None:
    result = await command(stack, "approve", "content-nothing", "--digest", "0" * 64, *ANN)
    assert result.exit_code == Exit.REFUSED
    assert "no such run is recorded" in result.stderr


async def test_a_card_is_shown_without_a_worker_and_after_the_end(
    temporal: TemporalSettings, tmp_path: Path
) -> None:
    settings = settings_for(temporal, tmp_path)
    async with stack_of(settings) as stack:
        run_ = await stack.propose(a_key(), note("the whole text"))
        digest = await stack.digest(run_)
    await asyncio.to_thread(shows_waiting, settings, run_.workflow_id, digest)
    async with stack_of(settings) as stack:
        await stack.approve(run_)
        await run_.handle.result()
    ended = await asyncio.to_thread(run, settings, "show", run_.workflow_id)
    assert "outcome  executed" in ended.stdout
    assert "verdict  approve by ann@example.test" in ended.stdout


def shows_waiting(settings: Settings, run_id: str, digest: str) -> None:
    shown = json.loads(run(settings, "show", run_id, "--json").stdout)
    assert shown["state"] == "waiting"
    assert shown["waiting"] == digest
    assert "the whole text" in shown["card"]
    full = run(settings, "show", run_id, "--full").stdout
    assert "What is proposed" in full
    assert f"countersign approve {run_id} --digest {digest}" in full


async def test_the_ledger_is_printed_as_json_lines(stack: Stack) -> None:
    run_ = await stack.propose(a_key(), note())
    await stack.approve(run_)
    await run_.handle.result()
    printed = await command(stack, "ledger", "tail", "--json", "--run", run_.workflow_id)
    events = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [event["type"] for event in events] == await stack.types(run_)
    assert [event["seq"] for event in events] == sorted(event["seq"] for event in events)
    two = await command(stack, "ledger", "tail", "--limit", "2")
    assert len(two.stdout.splitlines()) == 2
    assert "executed" in two.stdout


def test_nobody_is_guessed_from_the_login() -> None:
    assert identity(Settings(), "bob") == "bob"
    assert identity(Settings(approver="ann"), None) == "ann"
    with pytest.raises(InvalidInput, match="never|say who answers"):
        identity(Settings(), None)


def test_a_later_edition_of_a_brief_differs_only_in_its_address() -> None:
    data = BRIEF.encode()
    assert edition(data, 1) == data
    second = parse_brief(edition(data, 2))
    assert second.target.slug == "spring-bicycle-workshop-2"
    assert second.key_facts == parse_brief(data).key_facts


def test_a_taken_port_is_replaced_wherever_it_stands() -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        url = f"http://127.0.0.1:{squatter.getsockname()[1]}"
        tiers = tuple(
            TierSettings(name=n, kind="llama_cpp", url=url, managed=True) for n in ("edge", "large")
        )
        temporal = TemporalSettings(address=f"127.0.0.1:{free_port()}", ui_port=free_port())
        settings = Settings(temporal=temporal, tiers=tiers, embeddings=None)
        said: list[str] = []
        other = with_free_ports(settings, said.append)
    assert len(said) == 1
    assert other.tiers[0].url == other.tiers[1].url != url
    assert other.temporal == temporal


async def test_a_page_without_a_fact_is_found_out(tmp_path: Path) -> None:
    page = "<html><head><title>Facts &amp; more</title></head><p>Open\n at <b>7:00</b> &amp; later</p></html>"
    assert visible_text(page) == "Open at 7:00 & later"
    settings = Settings(data=tmp_path, sites=(SITE,))
    address = f"{SITE.address}/posts/hours/"
    file = file_of(settings, address)
    file.parent.mkdir(parents=True)
    file.write_text(page)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=page))
    async with httpx.AsyncClient(transport=transport) as client:
        read = await read_page(settings, client, address, ("Open at 7:00 & later", "Closed"))
    assert read.missing == ("Closed",)
    assert not read.complete


def at_terminal(lines: Iterable[str]) -> tuple[AtTerminal, StringIO]:
    out, given = StringIO(), iter(lines)

    async def line() -> str:
        try:
            return next(given)
        except StopIteration:
            raise Unavailable("closed") from None

    return AtTerminal(Console(file=out), "ann", line), out


async def test_the_person_at_the_terminal_is_asked_until_the_answer_is_one(stack: Stack) -> None:
    run_ = await stack.propose(a_key(), note())
    digest = await stack.digest(run_)
    session = Session(stack.settings, stack.database)
    card = (await session.runs.read(run_.workflow_id)).card
    assert card is not None and card.digest == digest
    person, out = at_terminal(["what?\n", "v\n", "\n", "v\n", "shorter\n"])
    reply = await person.answer(run_.workflow_id, card)
    assert reply == Reply(Kind.REVISE, {"digest": digest, "approver": "ann", "comment": "shorter"})
    assert "say what to change" in out.getvalue()


class Reviser(Played):
    """Wants one revision, then approves."""

    def __init__(self, out: Console) -> None:
        super().__init__(out)
        self.asked = 0

    async def answer(self, run: str, card: Card) -> Reply:
        self.asked += 1
        if self.asked == 1:
            return Reply(Kind.REVISE, {"digest": card.digest, "approver": "ann", "comment": "shorter"})
        if self.asked == 2:
            return Reply(Kind.APPROVE, {"digest": "0" * 64, "approver": "ann"})
        return await super().answer(run, card)


async def test_the_demo_carries_every_brief_to_a_complete_page(site: Stack, tmp_path: Path) -> None:
    brief = tmp_path / "brief.md"
    brief.write_text(WINTER)
    out = StringIO()
    person: Person = Reviser(Console(file=out))
    show = Demo(Session(site.settings, site.database), site.client, person, Console(file=out, width=300))
    pieces = await show.submit([brief])
    await show.follow(pieces)
    await show.look(pieces)
    [piece] = pieces
    assert piece.outcome is not None and piece.outcome.status is Status.EXECUTED
    assert piece.page is not None and piece.page.complete
    assert "an answer did not count" in out.getvalue()
    assert "there is nobody to ask" in out.getvalue()
    verdicts = [event.body for event in await site.events(piece.started) if event.type is EventType.VERDICT]
    assert [verdict["kind"] for verdict in verdicts] == ["revise", "approve"]
    again = await show.submit([brief])
    assert again[0].brief.target.slug == "winter-hours-2"
    again[0].result.cancel()


def start(key: str) -> tuple[str, ...]:
    return ("start", "external", "-", "--key", key, "--json")


async def waiting(stack: Stack, run_id: str) -> str:
    handle = stack.client.get_workflow_handle(run_id)
    while True:
        status = await handle.query("status")
        if status["state"] == "waiting" and status["intent"]:
            return str(status["intent"])
        await asyncio.sleep(0.01)
