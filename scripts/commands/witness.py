"""`countersign witness serve|key`: a co-signer of other people's ledgers, with a key and a state of its own.

It reads no settings and no database: run it where those who run the ledger cannot reach it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from activities.services.cosigner import Cosigner
from activities.services.cosigner_server import CosignerServer
from activities.services.notes import NoteKey
from activities.services.witness_state import State, key_of
from models.errors import InvalidInput
from scripts.exits import EXPLAINED

PORT = 8235
witness = typer.Typer(
    no_args_is_help=True, epilog=EXPLAINED, help="Cosign ledgers' checkpoints, as C2SP tlog-witness says."
)
Name = Annotated[
    str, typer.Option(help="What it is called, as witness.example.com/w1; the same for as long as it lives.")
]
Folder = Annotated[
    Path, typer.Option("--state", help="Its folder, with its key and what it has seen; made on first use.")
]
Logs = Annotated[
    list[str],
    typer.Option("--log", help="A log to cosign: what `ledger key` prints there; again for each key."),
]


@witness.command(epilog=EXPLAINED)
def serve(
    name: Name,
    state: Folder,
    log: Logs,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = PORT,
    host: Annotated[str, typer.Option(help="The address to listen on; default: this machine only.")] = (
        "127.0.0.1"
    ),
) -> None:
    """Serve `POST /add-checkpoint` until Ctrl-C or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logs = [NoteKey.parse(one) for one in log]
    with _held(state, name) as held:
        asyncio.run(_serve(Cosigner(held, logs, _now), port, host))


@witness.command(epilog=EXPLAINED)
def key(state: Folder) -> None:
    """Print the key that verifies its cosignatures; give it to those who are to trust them."""
    typer.echo(str(key_of(state)))


async def _serve(cosigner: Cosigner, port: int, host: str) -> None:
    server = CosignerServer(cosigner, port, host)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await server.start()
    except OSError as error:
        raise InvalidInput.field(
            "--port", port, f"it cannot be listened on ({error}); take another"
        ) from None
    typer.echo(f"cosigning at http://{host}:{server.port} as {cosigner.key}")
    try:
        await stop.wait()
    finally:
        await server.close()


@contextmanager
def _held(folder: Path, name: str) -> Generator[State]:
    state = State(folder, name)
    try:
        yield state
    finally:
        state.close()


def _now() -> datetime:
    return datetime.now(UTC)
