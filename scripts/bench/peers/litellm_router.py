"""LiteLLM's Router as a peer: `.venv-peers/bin/python scripts/bench/peers/litellm_router.py URL`.

Reads a line of JSON per turn (`{"requests": 1000, "concurrency": 50}`) and answers with a line of what it
took, so that its turns alternate with those of others. It is set up to be fast: one deployment, the aiohttp
transport, no retries, no cooldowns, no callbacks, no price list from the network. Imports nothing of the
product.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.metadata
import json
import logging
import os
import sys
import time
from typing import Any

QUESTION = "Say something about bicycles, in a sentence or two, for people who live nearby."


def router(url: str) -> Any:
    """A Router in front of the server."""
    # Read once, when it is imported.
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ["LITELLM_LOG"] = "ERROR"
    os.environ["USE_AIOHTTP_TRANSPORT"] = "True"
    os.environ.pop("DISABLE_AIOHTTP_TRANSPORT", None)
    litellm: Any = importlib.import_module("litellm")
    logging.disable(logging.WARNING)
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    litellm.disable_aiohttp_transport = False
    for name in ("callbacks", "success_callback", "failure_callback", "input_callback"):
        setattr(litellm, name, [])
    parameters = {"model": "openai/instant-1", "api_base": f"{url}/v1", "api_key": "none"}
    return litellm.Router(
        model_list=[{"model_name": "instant", "litellm_params": parameters}],
        num_retries=0,
        max_fallbacks=0,
        disable_cooldowns=True,
        enable_pre_call_checks=False,
        set_verbose=False,
    )


async def turn(asked: Any, requests: int, concurrency: int) -> dict[str, Any]:
    """Ask so many times, so many at once."""
    milliseconds: list[float] = []
    left = iter(range(requests))
    messages = [{"role": "user", "content": QUESTION}]

    async def run() -> None:
        for _ in left:
            began = time.perf_counter()
            await asked.acompletion(model="instant", messages=messages, max_tokens=32)
            milliseconds.append((time.perf_counter() - began) * 1000)

    began, busy = time.perf_counter(), time.process_time()
    await asyncio.gather(*(run() for _ in range(concurrency)))
    return {
        "milliseconds": milliseconds,
        "per_second": requests / (time.perf_counter() - began),
        "cpu_milliseconds": (time.process_time() - busy) * 1000 / requests,
    }


async def serve(url: str) -> None:
    """Say the version, then do as told until the input ends."""
    asked = router(url)
    print(json.dumps({"litellm": importlib.metadata.version("litellm")}), flush=True)
    loop = asyncio.get_running_loop()
    frozen = False
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        said = await turn(asked, **json.loads(line))
        if not frozen:
            # After the first turn, which only warms up, as in the other contestants' process.
            gc.collect()
            gc.freeze()
            frozen = True
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
