"""`countersign approve|reject|revise|delegate ID`: an answer to exactly the digest that was read."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from activities.services.identities import statement_of
from activities.services.runs import Reading, unknown
from models.card import visible
from models.errors import InvalidInput
from models.gate import Answer, Judged, Kind, Refusal, read_message
from models.people import NAMESPACE, SECURITY_KEYS
from models.settings import Settings
from scripts.commands.session import Json, Run, console, on_terminal, opened, reach, said
from scripts.commands.show import print_card
from scripts.exits import Refused
from workers import config

SIGNED_FOR = timedelta(minutes=10)
"""How long a signed answer counts before it reaches the run."""

Digest = Annotated[
    str | None,
    typer.Option(help="The digest you answer, as `countersign show` prints it. Asked on a terminal."),
]
As = Annotated[
    str | None,
    typer.Option("--as", help="Who you are; default: approver in countersign.toml. Never guessed."),
]
Role = Annotated[str | None, typer.Option(help="The role you answer in, where the gate asks for roles.")]
Sign = Annotated[
    Path | None, typer.Option(help="SSH private key to sign the answer with, or that of a security key.")
]
Review = Annotated[bool, typer.Option("--review", help="It is about what was done by breaking the glass.")]
Comment = Annotated[str, typer.Option(help="Your words; they stand in the ledger.")]


def approve(
    run: Run,
    digest: Digest = None,
    as_: As = None,
    comment: Comment = "",
    role: Role = None,
    sign: Sign = None,
    break_glass: Annotated[
        bool,
        typer.Option("--break-glass", help="Go ahead alone; others review it. Needs --sign and --reason."),
    ] = False,
    reason: Annotated[str, typer.Option(help="With --break-glass: why it cannot wait.")] = "",
    review: Review = False,
    as_json: Json = False,
) -> None:
    """Approve the waiting intent, or what was done by breaking the glass."""
    if reason and comment:
        raise InvalidInput.field("--reason", reason, "it is the comment of --break-glass; give one of them")
    words, broken = reason or comment, break_glass
    given = {"digest": digest, "comment": words, "role": role, "break_glass": broken, "review": review}
    _give(Kind.APPROVE, run, as_, as_json, sign=sign, **given)


def reject(
    run: Run,
    digest: Digest = None,
    as_: As = None,
    comment: Comment = "",
    role: Role = None,
    sign: Sign = None,
    review: Review = False,
    as_json: Json = False,
) -> None:
    """End the run without an effect, or say that breaking the glass was wrong."""
    given = {"digest": digest, "comment": comment, "role": role, "review": review}
    _give(Kind.REJECT, run, as_, as_json, sign=sign, **given)


def revise(
    run: Run,
    comment: Annotated[str, typer.Option(help="What the agent should change.")],
    digest: Digest = None,
    as_: As = None,
    role: Role = None,
    sign: Sign = None,
    as_json: Json = False,
) -> None:
    """Send the proposal back with feedback."""
    _give(Kind.REVISE, run, as_, as_json, digest=digest, comment=comment, role=role, sign=sign)


def delegate(
    run: Run,
    to: Annotated[str, typer.Option(help="Who should answer instead.")],
    until: Annotated[
        str | None, typer.Option(help="When that ends, as 2026-12-24T18:00:00+01:00; default: never.")
    ] = None,
    digest: Digest = None,
    as_: As = None,
    comment: Comment = "",
    role: Role = None,
    sign: Sign = None,
    as_json: Json = False,
) -> None:
    """Hand the question on to somebody else."""
    _give(
        Kind.DELEGATE,
        run,
        as_,
        as_json,
        digest=digest,
        comment=comment,
        role=role,
        to=to,
        until=until,
        sign=sign,
    )


def identity(settings: Settings, named: str | None) -> str:
    """Who answers; said by the person or the settings, and never guessed from the login.

    Raises:
        InvalidInput: neither says it.
    """
    who = named or settings.approver
    if not who:
        raise InvalidInput.field(
            "--as", who, "say who answers, or set approver in countersign.toml (or COUNTERSIGN_APPROVER)"
        )
    return who


async def signed(tenant: str, kind: Kind, message: dict[str, Any], key: Path) -> dict[str, Any]:
    """The answer with a signature by `ssh-keygen`, which asks for the key's passphrase itself.

    Raises:
        InvalidInput: ssh-keygen cannot sign with that key.
    """
    now = datetime.now(UTC)
    times = {"issued_at": now.isoformat(), "expires_at": (now + SIGNED_FOR).isoformat()}
    message = message | times | {"nonce": secrets.token_hex(16)}
    statement = statement_of(tenant, kind, Answer.model_validate(message))
    if statement is None:
        raise InvalidInput.field("--sign", str(key), "the answer cannot be signed; check --as and --digest")
    if _on_device(key):
        typer.echo("touch the security key to sign", err=True)  # ssh-keygen would say so where nobody reads.
    command = ["ssh-keygen", "-q", "-Y", "sign", "-n", NAMESPACE, "-f", str(key)]
    try:
        made = await asyncio.to_thread(
            subprocess.run, command, input=statement.bytes(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise InvalidInput.field("--sign", str(key), "install OpenSSH; ssh-keygen signs") from None
    if made.returncode != 0:
        raise InvalidInput.field("--sign", str(key), made.stderr.decode(errors="replace").strip()[:200])
    return message | {"signature": made.stdout.decode()}


def _on_device(key: Path) -> bool:
    """Whether the public half that lies beside a key is that of a security key."""
    public = key if key.suffix == ".pub" else Path(f"{key}.pub")
    with suppress(OSError, UnicodeDecodeError):
        return public.read_text("utf-8").startswith(SECURITY_KEYS)
    return False


def _give(
    kind: Kind, run: str, as_: str | None, as_json: bool, sign: Path | None, **given: str | bool | None
) -> None:
    settings = config.load()
    message: dict[str, Any] = {name: value for name, value in given.items() if value}
    message["approver"] = identity(settings, as_)
    judged = asyncio.run(_answer(settings, kind, run, message, as_json, sign))
    if as_json:
        said(judged.model_dump(mode="json"))
    elif judged.counted:
        console().print(
            f"counted: {kind} of {judged.digest} by {visible(message['approver'])}; {judged.state}"
        )
    if not judged.counted:
        raise Refused(f"not counted: {judged.field}: {judged.remedy}")


async def _answer(
    settings: Settings,
    kind: Kind,
    run: str,
    message: dict[str, Any],
    quiet: bool,
    sign: Path | None,
) -> Judged:
    async with opened(settings) as session:
        reading = await session.runs.read(run) if await session.runs.events(run) else None
        message = message | {"digest": _digest(reading, kind, run, message.get("digest"), quiet)}
        _refuse_shape(kind, message)
        if sign is not None:
            message = await signed(settings.tenant, kind, message, sign)
        return await session.answering(await reach(settings)).give(run, kind, message)


def _digest(reading: Reading | None, kind: Kind, run: str, given: str | None, quiet: bool) -> str:
    """The digest that is answered: as given, or the waiting one once a person has read its card."""
    if given is not None:
        return given
    if reading is None:
        raise unknown(run)
    card = reading.card
    if quiet or not on_terminal():
        raise InvalidInput.field(
            "--digest", None, f"give the digest of the card you read; `countersign show {run}` prints it"
        )
    if card is None or (reading.waiting is None and not reading.reviewing):
        raise Refused(f"{run} is {reading.state}; nothing waits for an answer")
    out = console()
    print_card(out, card.full)
    out.print(f"digest   {card.digest}")
    typer.confirm(f"{kind.value} this?", abort=True)
    return card.digest


def _refuse_shape(kind: Kind, message: dict[str, Any]) -> None:
    read = read_message(kind, [message])
    if isinstance(read, Refusal):
        option = {"approver": "--as"}.get(read.field, f"--{read.field}")
        raise InvalidInput.field(option, message.get(read.field), read.remedy)
