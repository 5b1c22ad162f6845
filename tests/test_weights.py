import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from activities.services import weights
from activities.tiers.embeddings import Embeddings
from activities.tiers.wire import CHAT_PATH, http_client
from models.errors import InvalidInput, MemoryUnavailable
from models.memory import EmbeddingSettings
from tests.model_servers import model_server
from workers import model_server as server

ROOT = Path(__file__).parent.parent
CAT = "The cat sits on the mat."
FELINE = "A feline is resting on a rug."


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def address(data):
    with model_server("embed", data) as address:
        yield address


@pytest.fixture
async def embeddings(address):
    settings = EmbeddingSettings(url=address, managed=False)
    embeddings = Embeddings(settings, http_client(settings))
    yield embeddings
    await embeddings.aclose()


def cosine(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


async def test_converted_embedding_model_finds_a_cat_in_a_feline(embeddings):
    cat, feline, invoice = await embeddings.embed([CAT, FELINE, "Invoices are due in thirty days."])
    assert cosine(cat, feline) == pytest.approx(0.573, abs=0.02)
    assert abs(cosine(cat, invoice)) < 0.2
    assert cosine(cat, cat) == pytest.approx(1.0, abs=1e-6)


async def test_vectors_keep_the_order_of_their_texts_across_batches(embeddings):
    texts = [f"Sentence number {number} about kettles." for number in range(40)]
    together = await embeddings.embed(texts)
    alone = await embeddings.embed([texts[37]])
    assert len(together) == 40
    assert cosine(together[37], alone[0]) > 0.999


async def test_a_text_longer_than_the_model_still_gets_a_unit_vector(embeddings):
    long = "The kettle boils water for tea in ninety seconds. " * 120
    vector, neighbour = await embeddings.embed([long, "The kettle boils water for tea."])
    assert cosine(vector, vector) == pytest.approx(1.0, abs=1e-6)
    assert cosine(vector, neighbour) > 0.5


async def test_no_texts_need_no_server():
    settings = EmbeddingSettings(url="http://127.0.0.1:9")
    embeddings = Embeddings(settings, http_client(settings))
    assert await embeddings.embed([]) == []
    await embeddings.aclose()


def answering(body, status=200):
    settings = EmbeddingSettings(model="m", dimensions=2)
    transport = httpx.MockTransport(lambda _: httpx.Response(status, json=body))
    return Embeddings(settings, http_client(settings, transport))


def row(*values, index=0):
    return {"index": index, "embedding": list(values)}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"model": "other", "data": [row(1.0, 0.0)]}, "'other' instead of 'm'"),
        ({"model": "m", "data": []}, "0 vectors for 1 texts"),
        ({"model": "m", "data": [row(1.0)]}, "1 dimensions instead of 2"),
        ({"model": "m", "data": [row(1.0, None)]}, "no finite number"),
        ({"model": "m", "data": [row(0.0, 0.0)]}, "without direction"),
        ({"model": "m", "data": [row(1.0, 0.0, index=3)]}, "which text they belong to"),
        (["no", "object"], "no JSON object"),
    ],
)
async def test_an_unusable_embedding_answer_is_named(body, named):
    with pytest.raises(MemoryUnavailable, match=named):
        await answering(body).embed(["a"])


async def test_not_a_number_in_a_vector_is_refused():
    settings = EmbeddingSettings(model="m", dimensions=2)
    raw = b'{"model":"m","data":[{"index":0,"embedding":[NaN,1.0]}]}'
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=raw))
    with pytest.raises(MemoryUnavailable, match="no finite number"):
        await Embeddings(settings, http_client(settings, transport)).embed(["a"])


async def test_embedding_server_that_is_away_is_memory_unavailable():
    settings = EmbeddingSettings(url=f"http://127.0.0.1:{free_port()}")
    embeddings = Embeddings(settings, http_client(settings))
    with pytest.raises(MemoryUnavailable, match="no answer"):
        await embeddings.embed(["a"])
    assert not await embeddings.ready()
    await embeddings.aclose()


async def test_embedding_server_error_is_memory_unavailable():
    with pytest.raises(MemoryUnavailable, match="503"):
        await answering({"error": {"message": "Loading model", "type": "unavailable_error"}}, 503).embed(
            ["a"]
        )


async def test_a_server_that_refuses_every_length_is_invalid_input():
    refusal = {"error": {"message": "input is too large to process", "type": "server_error"}}
    with pytest.raises(InvalidInput, match="raise its context"):
        await answering(refusal, 500).embed(["word " * 100])


def test_conversion_happens_once_however_many_ask(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: weights.embedding_weights(tmp_path), range(3)))
    assert len(set(found)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [found[0].path.name, "weights.lock"]


def test_settings_expect_the_identity_the_bundled_weights_have():
    assert EmbeddingSettings().model == weights.EMBEDDING_NAME


def test_weights_with_another_digest_are_refused(tmp_path):
    forged = tmp_path / "model.safetensors"
    forged.write_bytes(b"something else")
    with pytest.raises(InvalidInput, match="install it again"):
        weights.checked(forged, weights.EMBEDDING_SHA256)


def test_tensor_and_word_names_follow_llama_cpp():
    assert (
        weights.gguf_name("encoder.layer.3.attention.output.LayerNorm.bias") == "blk.3.attn_output_norm.bias"
    )
    assert weights.gguf_name("encoder.layer.0.output.dense.weight") == "blk.0.ffn_down.weight"
    assert weights.gguf_name("embeddings.position_ids") is None
    assert weights.gguf_name("pooler.dense.weight") is None
    assert [weights.gguf_word(word) for word in ("[CLS]", "##ing", "cat", "[")] == [
        "[CLS]",
        "ing",
        "▁cat",
        "▁[",
    ]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_taken_port_ends_the_model_server_with_its_own_code(tmp_path, caplog):
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    with socket.socket() as taken, caplog.at_level(logging.ERROR):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert server.main(["chat", "--port", str(port), "--data", str(tmp_path)]) == server.PORT_TAKEN
    for name, handler in before.items():
        signal.signal(name, handler)
    assert f"port {port}" in caplog.text


def test_model_server_ends_when_its_parent_is_gone(data):
    starter = (
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-m', 'workers.model_server', 'embed', '--port', '0', '--data']\n"
        "command += [sys.argv[1], '--parent-pid', str(os.getpid())]\n"
        "child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)\n"
        "print(child.stderr.readline(), flush=True)\n"
        "os._exit(0)\n"
    )
    reader, writer = os.pipe()
    # The child inherits the write end, so that reading ends when the last holder of it is gone.
    command = [sys.executable, "-c", starter, str(data)]
    result = subprocess.run(command, pass_fds=(writer,), capture_output=True, text=True, cwd=ROOT, timeout=60)
    os.close(writer)
    assert "listening on" in result.stdout
    address = result.stdout.split()[-1]
    with os.fdopen(reader) as held:
        assert held.read() == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health", trust_env=False)


def test_model_server_stops_although_it_is_answering(data):
    server = contextlib.ExitStack()
    address = server.enter_context(model_server("chat", data))
    asked = {"messages": [{"role": "user", "content": "Tell a very long story."}], "stream": True}
    asked |= {"max_tokens": 100_000, "ignore_eos": True}
    with server, httpx.stream("POST", f"{address}{CHAT_PATH}", json=asked, trust_env=False) as answer:
        assert next(answer.iter_lines()).startswith("data:")
        # Leaving it waits for the process to end with code 0 while the answer is still being written.
        server.close()
