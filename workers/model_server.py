"""One llama.cpp server with bundled weights in a process of its own, on 127.0.0.1.

Apart from the workers on purpose: a model that computes must never take a worker's thread or its memory.
It serves until SIGTERM, or until the process that started it is gone.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, cast

from activities.services.weights import EMBEDDING_TOKENS, Weights, chat_weights, embedding_weights

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
PORT_TAKEN = 3
NOT_STARTED = 4
PARENT_POLL_SECONDS = 2.0
PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; 0 after a clean stop, 3 when the port is taken, 4 when loading fails."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    stop = _stop_on_signals()
    if options.parent_pid:
        _die_with_parent()
    if not port_free(options.port):
        log.error(
            "port %d on %s is taken; stop what listens there or choose another --port", options.port, HOST
        )
        return PORT_TAKEN
    return _serve(options, stop)


def port_free(port: int) -> bool:
    """Whether a server could listen on that port of 127.0.0.1; port 0 always can."""
    with socket.socket() as probe:
        # As the server does: a port that only waits out old connections is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _serve(options: argparse.Namespace, stop: threading.Event) -> int:
    weights = _weights(options.role, options.data)
    try:
        server = _start(options, weights)
    except RuntimeError as error:
        log.error("%s server did not start from %s: %s", options.role, weights.path.name, error)
        return NOT_STARTED
    log.info("%s listening on %s", options.role, server.listening_address)
    _wait(stop, options.parent_pid)
    log.info("%s stopped", options.role)
    # `server` must outlive this line: its destructor waits for ever for a request that is being answered.
    _leave()


def _leave() -> NoReturn:
    # Nothing here needs to be put away, and a caller whose connection breaks asks again.
    logging.shutdown()
    os._exit(0)


def _weights(role: Literal["chat", "embed"], data: Path) -> Weights:
    return chat_weights() if role == "chat" else embedding_weights(data / "models")


def _start(options: argparse.Namespace, weights: Weights) -> Any:
    # Read by the OpenMP runtime when it loads. With the default, threads that wait for work burn the cores
    # of everybody else.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    import xllamacpp

    library = cast(Any, xllamacpp)
    params = library.CommonParams()
    params.model.path = str(weights.path)
    params.model_alias = {weights.name}
    params.port = options.port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.n_parallel = options.parallel
    _limits(params, options)
    if options.role == "embed":
        params.embedding = True
        params.pooling_type = library.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return library.Server(params)


def _limits(params: Any, options: argparse.Namespace) -> None:
    context = options.context if options.role == "chat" else min(options.context, EMBEDDING_TOKENS)
    # llama.cpp divides its context among the slots; `--context` is what one request gets.
    params.n_ctx = context * options.parallel
    params.endpoint_metrics = True
    # Slots show what others ask, and prompts would stand in the log.
    params.endpoint_slots = False
    params.verbosity = 0
    params.ui = False
    # Its default keeps up to 8 GiB of earlier prompts.
    params.cache_ram_mib = 0


def _wait(stop: threading.Event, parent: int | None) -> None:
    if parent is None:
        stop.wait()
        return
    first = os.getppid()
    while not stop.wait(PARENT_POLL_SECONDS):
        if os.getppid() != first or not _alive(parent):
            log.warning("parent %d is gone", parent)
            return


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.set()

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, handle)
    return stop


def _die_with_parent() -> None:
    # Faster than the poll, but only Linux has it, and it misses a parent that died before this line.
    if sys.platform != "linux":
        return
    prctl = cast(Callable[..., int], ctypes.CDLL(None, use_errno=True).prctl)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workers.model_server", description=__doc__)
    parser.add_argument("role", choices=("chat", "embed"))
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one and logs it")
    parser.add_argument("--data", type=Path, required=True, help="folder for converted weights")
    parser.add_argument("--threads", type=_positive, default=1)
    parser.add_argument("--parallel", type=_positive, default=1, help="requests answered at once")
    parser.add_argument("--context", type=_positive, default=4096, help="tokens one request may use")
    parser.add_argument("--parent-pid", type=_positive, help="stop when this process is gone")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not accepted; give a whole number from 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
