from __future__ import annotations

import html
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from models.content import parse_brief
from models.ledger import Event, EventType
from models.loop import Request, Status
from models.settings import Settings, TemporalSettings
from models.visibility import Role
from temporal.client import Started, submit
from tests.conftest import ROLES, Stack, a_key, free_port, stack_of
from tests.tgi_stub import CHAT, TgiStub, as_json, overloaded
from workers import config

FILE = Path(__file__).parent / "tgi.toml"
BRIEF = (Path(__file__).parents[1] / "examples" / "briefs" / "bakery-winter-hours.md").read_bytes()
FACTS = parse_brief(BRIEF).key_facts


@dataclass
class Office:
    stack: Stack
    edge: TgiStub
    large: TgiStub

    async def draft(self) -> Started:
        body = await self.stack.content.put("default", BRIEF, "text/markdown; charset=utf-8")
        request = Request(agent="content", key=a_key(), body=body)
        return await submit(self.stack.client, request, self.stack.settings.temporal)

    async def page(self, address: str) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.get(address)

    async def logged(self, run: Started, kind: EventType) -> list[Event]:
        return [event for event in await self.stack.events(run) if event.type is kind]


def settings(temporal: TemporalSettings, data: Path, edge: str, large: str) -> Settings:
    """As any process of ours reads them: the shipped defaults, `tgi.toml`, and where this machine differs."""
    here = {
        "COUNTERSIGN_CONFIG": str(FILE),
        "COUNTERSIGN_DATA": str(data),
        "COUNTERSIGN_EMBEDDINGS": "null",
        "COUNTERSIGN_PROBE": "false",
        "COUNTERSIGN_TEMPORAL__ADDRESS": temporal.address,
        "COUNTERSIGN_TEMPORAL__MANAGED": "false",
        "COUNTERSIGN_SITES__DEMO__ADDRESS": f"http://127.0.0.1:{free_port()}",
        "COUNTERSIGN_SITES__DEMO__ENGINE": "plain",
        "COUNTERSIGN_TIERS__EDGE__URL": edge,
        "COUNTERSIGN_TIERS__LARGE__URL": large,
    }
    return config.load(here, data)


@pytest.fixture
async def office(temporal: TemporalSettings, tmp_path: Path) -> AsyncIterator[Office]:
    async with (
        TgiStub(max_total_tokens=4096) as edge,
        TgiStub(max_total_tokens=8192) as large,
        stack_of(settings(temporal, tmp_path, edge.url, large.url), roles=(*ROLES, Role.DESK)) as stack,
    ):
        yield Office(stack, edge, large)


def violations(stub: TgiStub) -> list[str]:
    """What in the chat requests breaks TGI's own API description."""
    return [error.message for body in stub.chats for error in CHAT.iter_errors(body)]


def test_only_the_tiers_differ_from_the_shipped_settings(tmp_path: Path) -> None:
    shipped, own = config.load({}, tmp_path), config.load({"COUNTERSIGN_CONFIG": str(FILE)}, tmp_path)
    differing = {name for name in type(own).model_fields if getattr(own, name) != getattr(shipped, name)}
    assert differing == {"tiers"}
    assert {tier.kind for tier in own.tiers} == {"tgi"}
    assert {tier.kind for tier in shipped.tiers} == {"llama_cpp"}


async def test_the_whole_content_loop_runs_on_tgi_alone(office: Office) -> None:
    run = await office.draft()
    digest = await office.stack.digest(run)
    address = f"{office.stack.settings.sites[0].address}/posts/"
    assert (await office.page(address)).status_code == 404

    await office.stack.approve(run)
    outcome = await run.handle.result()
    assert outcome.status is Status.EXECUTED
    assert outcome.digest == digest
    [link] = outcome.receipts[0].links
    page = await office.page(link)
    assert page.status_code == 200
    assert [fact for fact in FACTS if fact not in html.unescape(page.text)] == []

    assert len(office.large.chats) >= 4
    assert violations(office.large) + violations(office.edge) == []
    assert all(body["model"] == "tgi" for body in office.large.chats)
    schemas = [body["response_format"]["value"] for body in office.large.chats if body.get("response_format")]
    assert len(schemas) >= 2
    routes = await office.logged(run, EventType.ROUTE)
    assert len(routes) >= 4
    chosen = {event.body["route"]["purpose"]: event.body["route"]["tiers"] for event in routes}
    assert chosen["content.outline"] == chosen["content.section"] == ["large", "edge"]
    assert await office.logged(run, EventType.FALLBACK) == []
    assert outcome.cost.currency == "USD"


async def test_a_tgi_server_that_is_full_is_replaced_and_the_ledger_says_so(office: Office) -> None:
    office.large.canned.extend([as_json(503, {"error": "down", "error_type": "healthcheck"}), overloaded()])
    run = await office.draft()
    await office.stack.approve(run)
    outcome = await run.handle.result()
    assert outcome.status is Status.EXECUTED
    [fell] = await office.logged(run, EventType.FALLBACK)
    assert (fell.body["task"], fell.body["tier"], fell.body["to"]) == ("content.outline", "large", "edge")
    assert fell.body["reason"]
    assert office.edge.chats
    assert violations(office.large) + violations(office.edge) == []
    page = await office.page(outcome.receipts[0].links[0])
    assert [fact for fact in FACTS if fact not in html.unescape(page.text)] == []
