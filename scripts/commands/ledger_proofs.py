"""`countersign ledger verify|prove|export|checkpoint|key`: what the ledger can prove, and to whom."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection

from activities.services.checkpoints import (
    CHECKPOINT,
    KEY_FILE,
    Checkpoints,
    HandoverLate,
    Written,
    last_note,
    load_key,
    next_key,
    proof_of,
    rotating,
    take_over,
)
from activities.services.cosignatures import WitnessKey, with_lines
from activities.services.cosigning import RemoteCosigner, cosignatures
from activities.services.key_files import is_used
from activities.services.key_life import handed_over, log_rotation, relatives
from activities.services.ledger_export import Item, of_database, of_lines, to_lines
from activities.services.ledger_formats import to_ocsf, to_prov
from activities.services.notes import NoteKey, read_checkpoint
from activities.services.signers import LARGEST, Signers, read_signers
from activities.services.verifier import Report, Verifier, check_database
from activities.services.witnesses import witnesses
from models.card import visible
from models.errors import InvalidInput
from models.settings import Settings
from scripts.commands.session import Json, Session, opened, said
from workers import config
from workers.compose import utc_now

SHOWN = 20


class Form(StrEnum):
    """How a log is written."""

    JSONL = "jsonl"
    OCSF = "ocsf"
    PROV = "prov"


FORMS: dict[Form, Callable[[Iterable[Item]], Iterator[str]]] = {
    Form.JSONL: to_lines,
    Form.OCSF: to_ocsf,
    Form.PROV: to_prov,
}
Keys = Annotated[
    list[str] | None,
    typer.Option("--key", help="A key that may have signed, as `ledger key` prints it; again for each."),
]
Notes = Annotated[
    list[Path] | None,
    typer.Option("--checkpoint", help="A file with a checkpoint kept outside; the log must continue it."),
]

WitnessKeys = Annotated[
    list[str] | None,
    typer.Option("--witness-key", help="A co-signer's key, as `witness key` prints it; again for each."),
]
Needed = Annotated[
    int | None,
    typer.Option("--witnesses", min=1, help="How many of them must have cosigned; default: all."),
]
AllowedSigners = Annotated[
    Path | None,
    typer.Option(help="Whose keys may have signed answers, as `people --signers` prints them."),
]


def verify(
    export: Annotated[Path | None, typer.Option(help="Check this export instead of the database.")] = None,
    checkpoint: Notes = None,
    key: Keys = None,
    witness_key: WitnessKeys = None,
    witnesses: Needed = None,
    signers: AllowedSigners = None,
    as_json: Json = False,
) -> None:
    """Check every hash, root, signature and gate. Exit 0 sound, 1 tampered, 2 something is missing."""
    settings = config.load()
    keys = [NoteKey.parse(one) for one in key or ()]
    old = [_text(path) for path in checkpoint or ()]
    others = [WitnessKey.parse(one) for one in witness_key or ()]
    if witnesses is not None and not others and (export is not None or not settings.ledger.cosigners):
        raise InvalidInput.field("--witnesses", witnesses, "give their keys with --witness-key")
    allowed = _signers(signers) if signers is not None else None
    if export is not None:
        report = Verifier(keys, old, others, witnesses, allowed).check(_read(export))
    else:
        report = asyncio.run(_verify(settings, keys, old, others, witnesses, allowed))
    if as_json:
        said(report.model_dump(mode="json"))
    else:
        typer.echo("\n".join(_told(report, settings)))
    raise typer.Exit(report.exit_code)


def prove(event: Annotated[str, typer.Argument(metavar="EVENT_ID", help="The event's id.")]) -> None:
    """Print a proof that an event stands in the signed log; `scripts/verify_ledger.py proof` checks it."""
    asyncio.run(_prove(config.load(), event))


def export(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A file; else standard output.")] = None,
    form: Annotated[
        Form, typer.Option("--format", help="jsonl can be checked; ocsf and prov are views for other tools.")
    ] = Form.JSONL,
) -> None:
    """Write the whole log, one JSON object a line; `scripts/verify_ledger.py export` checks it."""
    asyncio.run(_export(config.load(), out, form))


def checkpoint(as_json: Json = False) -> None:
    """Sign the log as it stands now, hand the note to every witness, and have it cosigned."""
    asyncio.run(_checkpoint(config.load(), as_json))


def key() -> None:
    """Print the key that verifies this installation's checkpoints; give it to those who will check."""
    settings = config.load()
    typer.echo(str(_key(settings)))


def rotate(
    as_: Annotated[str | None, typer.Option("--as", help="Who asks for it.")] = None,
    as_json: Json = False,
) -> None:
    """Sign with a new key from now on; the old one signs that it follows, and its file is kept.

    Restart the workers afterwards: those that run sign with the old key until then, which stays valid.
    """
    settings = config.load()
    who = as_ or settings.approver
    if not who:
        raise InvalidInput.field("--as", "nothing", "say who you are, or set approver in countersign.toml")
    old, new = asyncio.run(_rotate(settings, who))
    if as_json:
        said({"old": str(old), "new": str(new)})
    else:
        typer.echo(
            f"{new}\nthe key until now: {old}\nrestart the workers; give the new key to those who check"
        )


async def _rotate(settings: Settings, who: str) -> tuple[NoteKey, NoteKey]:
    async with opened(settings) as session:
        _private(settings)  # With it comes the folder.
        with rotating(settings.data):
            await _signer(session).write(session.tenant)
            old, new = _private(settings), next_key(settings.data)
            origin = settings.ledger.origin

            def log(link: Connection, tenant: str) -> None:
                body = handed_over(old, new, f"{origin}/{tenant}")
                log_rotation(link, tenant, who, utc_now(), body, name=body["new"])

            for tenant in await _signer(session).tenants():
                await session.database.write(lambda link, tenant=tenant: log(link, tenant))
            before = _key(settings)
            take_over(settings.data)
            await _signer(session).write(session.tenant)
            return before, _key(settings)


async def _verify(
    settings: Settings,
    keys: list[NoteKey],
    old: list[str],
    others: list[WitnessKey],
    needed: int | None,
    signers: Signers | None,
) -> Report:
    ledger = settings.ledger
    if not others:
        others = [WitnessKey.parse(one.key) for one in ledger.cosigners]
        needed = needed or ledger.cosigners_needed or None
    async with opened(settings) as session:
        signer = _signer(session)
        now = signer.key(session.tenant)
        before = await session.database.read(lambda link: relatives(link, session.tenant, now))
        keys = keys or [now, *before]
        old = old or list(await signer.newest_witnessed(session.tenant))
        tenant, origin = session.tenant, _key(settings).name
        return await session.database.read(
            lambda link: check_database(link, tenant, origin, keys, old, others, needed, signers)
        )


async def _prove(settings: Settings, event: str) -> None:
    async with opened(settings) as session:
        tenant, public = session.tenant, _key(settings)
        note = await session.database.read(lambda link: last_note(link, tenant))
        if note is None:
            raise InvalidInput.field(
                "event", event, "nothing is signed yet; run `countersign ledger checkpoint`"
            )
        size = read_checkpoint(note).size
        lines = await session.database.read(lambda link: cosignatures(link, tenant, size))
        note = with_lines(note, lines.get(size, ()))
        said(await session.database.read(lambda link: proof_of(link, tenant, event, note, public)))


async def _export(settings: Settings, out: Path | None, form: Form) -> None:
    async with opened(settings) as session:
        with _opened(out) as file, session.database.engine.connect() as link:
            for line in FORMS[form](of_database(link, session.tenant, _key(settings).name)):
                file.write(f"{line}\n")


async def _checkpoint(settings: Settings, as_json: bool) -> None:
    async with opened(settings) as session:
        written = await _signer(session).write(session.tenant)
        if written is None:
            typer.echo("the log is empty; there is nothing to sign", err=True)
        if as_json:
            said(None if written is None else _made(written))
        elif written is not None:
            typer.echo(written.note, nl=False)
            by = (*written.kept_by, *written.cosigned_by)
            typer.echo(f"kept by: {', '.join(by) or 'no witness'}", err=True)
        if written is not None and (written.missed_by or written.alerts):
            for alert in (*(f"not kept by: {name}" for name in written.missed_by), *written.alerts):
                typer.echo(str(alert), err=True)
            raise typer.Exit(3)


def _made(written: Written) -> dict[str, Any]:
    alerts = [{"kind": one.kind, "witness": one.witness, "text": one.text} for one in written.alerts]
    names = ("note", "size", "kept_by", "missed_by", "cosigned_by")
    return {name: getattr(written, name) for name in names} | {"alerts": alerts}


def _signer(session: Session) -> Checkpoints:
    ledger, data = session.settings.ledger, session.settings.data
    kept_by = witnesses(ledger.witnesses, data, utc_now)
    asked = [RemoteCosigner(one, utc_now) for one in ledger.cosigners]
    key, needed = _private(session.settings), ledger.cosigners_needed
    late = HandoverLate(data, key, utc_now)
    return Checkpoints(session.database, key, ledger.origin, kept_by, asked, needed, late)


def _private(settings: Settings) -> Ed25519PrivateKey:
    """The signing key; none is made beside notes that another one signed, which it could not follow."""
    path = settings.data / KEY_FILE
    if not path.exists() and is_used(settings.database_url, CHECKPOINT) and not path.exists():
        remedy = "it is gone, and checkpoints are signed by it; restore it from its backup"
        raise InvalidInput.field("key", str(path), remedy)
    return load_key(settings.data)


def _key(settings: Settings) -> NoteKey:
    public = _private(settings).public_key().public_bytes_raw()
    return NoteKey(f"{settings.ledger.origin}/{settings.tenant}", public)


def _told(report: Report, settings: Settings) -> Iterator[str]:
    yield f"{report.status}: {report.size} events, root {report.root}"
    yield f"signed up to {report.signed}, witnessed outside up to {report.witnessed}"
    if report.cosigned or settings.ledger.cosigners:
        yield f"cosigned up to {report.cosigned}"
    if later := report.size - max(report.signed, report.witnessed):
        every = settings.ledger.checkpoint_seconds
        yield f"{later} later events are not covered yet; a checkpoint is written every {every} s"
    if report.signatures:
        yield f"{report.signatures} answers that call themselves signed were held against the signers given"
    if report.unchecked:
        yield f"{report.unchecked} answers call themselves signed; --signers FILE looks at their signatures"
    # What a made-up event says may hold what a terminal would obey.
    yield from (visible(f"event {one.seq}: {one.what}") for one in report.findings[:SHOWN])
    yield from (visible(f"not checked: {gap}") for gap in report.gaps[:SHOWN])


def _read(path: Path) -> Iterator[Item]:
    # A file that is not there says nothing of the log: it is missing, and nobody tampered with anything.
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            yield from of_lines(file)
    except OSError as error:
        raise InvalidInput.field("--export", str(path), f"name a file that can be read ({error})") from None


def _signers(path: Path) -> Signers:
    try:
        with path.open("rb") as file:
            return read_signers(file.read(LARGEST + 1))
    except OSError:
        raise InvalidInput.field("--signers", str(path), "name a file that can be read") from None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        raise InvalidInput.field("checkpoint", str(path), "name a file that can be read") from None


@contextmanager
def _opened(out: Path | None) -> Generator[TextIO]:
    if out is None:
        yield sys.stdout
    else:
        try:
            with out.open("w", encoding="utf-8", newline="\n") as file:
                yield file
        except OSError as error:
            raise InvalidInput.field(
                "--out", str(out), f"name a file that can be written ({error})"
            ) from None
