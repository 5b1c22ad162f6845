import asyncio
import json

import pytest
from typer.testing import CliRunner

from activities.services.probe import Probes, keep_probed, probe
from activities.tiers.kinds import chat_endpoint
from activities.tiers.llama_cpp import LlamaCpp
from activities.tiers.tgi import TgiGenerate
from activities.tiers.wire import http_client
from models.inference import Needs, Probed
from models.routing import Snapshot, Telemetry, Wish, decide
from models.settings import TierSettings
from scripts.cli import app
from tests import tgi_stub
from tests.model_servers import model_server
from tests.tgi_stub import TgiStub

LONG = 60.0


@pytest.fixture
async def stub():
    async with TgiStub() as stub:
        yield stub


@pytest.fixture
async def tgi(stub):
    settings = TierSettings(name="large", kind="tgi", url=stub.url)
    async with http_client(settings) as client:
        yield chat_endpoint(settings, client)


async def test_a_probe_finds_what_the_server_is_and_does(stub, tgi):
    stub.hold, stub.hold_above = asyncio.Event(), 100
    found = await probe(tgi)
    assert stub.gone.is_set()
    assert found == Probed(
        tier="large",
        reachable=True,
        model=tgi_stub.MODEL,
        context_tokens=8192,
        slots=8,
        tokenizer=True,
        structured=True,
        logprobs=True,
        usage=True,
        cancel=True,
    )


async def test_a_server_without_grammar_is_found_out(stub, tgi):
    stub.grammar = False
    found = await probe(tgi)
    assert found.structured is False
    assert any("set structured = false" in line for line in found.false)


async def test_a_server_that_drops_schemas_with_a_200_is_found_out(stub, tgi):
    stub.drops_schemas = True
    assert (await probe(tgi)).structured is False


async def test_declared_abilities_that_are_not_kept_are_named(stub):
    stub.max_total_tokens = 2000
    settings = TierSettings(name="large", kind="tgi", url=stub.url, context_tokens=8192, concurrency=20)
    async with http_client(settings) as client:
        found = await probe(chat_endpoint(settings, client))
    assert "context_tokens is 8192, but it takes 2000" in found.false
    assert "concurrency is 20, but it takes 8 at once" in found.false


async def test_missing_usage_is_said_and_counted(stub, tgi):
    stub.usage = False
    assert (await probe(tgi)).usage is False


async def test_another_model_is_found_and_never_asked(stub):
    settings = TierSettings(name="large", kind="tgi", url=stub.url, model="the-accepted-one")
    async with http_client(settings) as client:
        found = await probe(chat_endpoint(settings, client))
    assert (found.reachable, found.held, found.model) == (True, True, tgi_stub.MODEL)
    assert "held until the settings accept it" in found.false[0]
    assert not stub.chats


async def test_a_server_that_is_away_is_a_finding(unused_tcp_port):
    settings = TierSettings(name="large", kind="tgi", url=f"http://127.0.0.1:{unused_tcp_port}")
    async with http_client(settings) as client:
        assert await probe(chat_endpoint(settings, client)) == Probed(tier="large", reachable=False)


async def test_a_probe_that_takes_too_long_keeps_what_it_knows(stub, tgi):
    stub.hold = asyncio.Event()
    found = await probe(tgi, seconds=1)
    assert found.reachable
    assert (found.structured, found.cancel) == (None, None)


async def test_the_native_route_asks_the_same_question(stub):
    settings = TierSettings(name="large", kind="tgi", route="generate", url=stub.url)
    async with http_client(settings) as client:
        tier = chat_endpoint(settings, client)
        assert isinstance(tier, TgiGenerate)
        found = await probe(tier)
    assert (found.structured, found.logprobs, found.usage, found.false) == (True, True, True, ())


async def test_servers_are_probed_once_they_are_there_and_stopping_stops_it(stub, tgi, unused_tcp_port):
    settings = TierSettings(name="away", kind="tgi", url=f"http://127.0.0.1:{unused_tcp_port}")
    found, stop = asyncio.Queue(), asyncio.Event()
    async with http_client(settings) as client:
        servers = [tgi, chat_endpoint(settings, client)]
        task = asyncio.create_task(keep_probed(servers, found.put_nowait, stop, again=0.01))
        assert (await asyncio.wait_for(found.get(), LONG)).tier == "large"
        stop.set()
        await asyncio.wait_for(task, LONG)
    assert found.empty()


class Known:
    """Telemetry as told."""

    def __init__(self):
        self.fallen = []

    async def of(self, task):
        return {"edge": Telemetry(model="recorded")}

    def fell(self, tier, kind):
        self.fallen.append((tier, kind))


def fits(known, **needs):
    tier = TierSettings(name="edge", kind="tgi", url="http://x")
    wish = Wish(task="title", prefer="small", needs=Needs(context_tokens=500, **needs))
    return decide(wish, (tier,), Snapshot(tiers=dict(known))).refused_as is None


async def test_routing_knows_before_the_first_request_what_a_server_cannot_do():
    probes = Probes(Known())
    assert fits(await probes.of("title"), structured=True)
    probes.found(Probed(tier="edge", reachable=True, model="probed", structured=False, context_tokens=600))
    known = await probes.of("title")
    assert known["edge"].model == "recorded"
    assert fits(known)
    assert not fits(known, structured=True)
    probes.found(Probed(tier="edge", reachable=True, context_tokens=400))
    assert not fits(await probes.of("title"))


async def test_a_tier_whose_model_changed_gets_no_more_calls():
    sensing = Known()
    probes = Probes(sensing)
    probes.fell("edge", "TierUnavailable")
    assert fits(await probes.of("title"))
    probes.fell("edge", "IdentityChanged")
    assert not fits(await probes.of("title"))
    assert len(sensing.fallen) == 2
    held = Probes(Known())
    held.found(Probed(tier="edge", reachable=True, held=True))
    assert not fits(await held.of("title"))


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with model_server("chat", tmp_path_factory.mktemp("chat"), "--context", "1024") as address:
        yield address


async def test_live_llama_cpp_keeps_what_it_promises(address):
    settings = TierSettings(name="edge", kind="llama_cpp", url=address, context_tokens=1024)
    async with http_client(settings) as client:
        found = await probe(LlamaCpp(settings, client))
    assert found == Probed(
        tier="edge",
        reachable=True,
        model="HuggingFaceTB/SmolLM2-135M-Instruct:Q4_1",
        context_tokens=1024,
        slots=1,
        tokenizer=True,
        structured=True,
        logprobs=True,
        usage=True,
        cancel=True,
    )


def test_the_command_prints_the_table_and_what_is_declared_and_false(address, tmp_path):
    (tmp_path / "countersign.toml").write_text(
        f'[[tiers]]\nname = "edge"\nkind = "llama_cpp"\nurl = "{address}"\ncontext_tokens = 4096\n'
        '[[tiers]]\nname = "away"\nkind = "tgi"\nurl = "http://127.0.0.1:1"\n'
    )
    settings = {"COUNTERSIGN_CONFIG": str(tmp_path / "countersign.toml")}
    shown = CliRunner().invoke(app, ["tiers"], env=settings)
    assert shown.exit_code == 3
    assert "edge: context_tokens is 4096, but it takes 1024" in shown.output
    assert "away: http://127.0.0.1:1 does not answer" in shown.output
    data = json.loads(CliRunner().invoke(app, ["tiers", "--json"], env=settings).output)
    assert [each["reachable"] for each in data] == [True, False]
    assert data[0]["structured"] is True
