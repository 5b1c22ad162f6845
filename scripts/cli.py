"""The `countersign` command. Each subcommand is loaded when it is asked for, so that none pays for all."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from scripts.exits import EXPLAINED, Exit, code_of, text_of
from workers.ending import leave

PLACES = {
    "up": "up",
    "demo": "demo",
    "doctor": "doctor",
    "worker": "worker",
    "start": "start",
    "pending": "pending",
    "show": "show",
    "approve": "answer",
    "reject": "answer",
    "revise": "answer",
    "delegate": "answer",
    "cancel": "cancel",
    "agents": "agents",
    "autonomy": "autonomy",
    "policy": "policy",
    "people": "directory",
    "tenants": "directory",
    "tiers": "tiers",
    "schedules": "schedules",
    "ledger": "ledger",
    "codec": "codec",
    "witness": "witness",
    "vault": "vault",
    "route": "route",
    "memory": "memory",
    "beliefs": "beliefs",
    "story": "story",
}
"""Command to its module in `scripts/commands`, in the order of the help."""


class Commands(TyperGroup):
    """Ends every error with its exit code and a text for people, never with a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse what no database, log or server could keep; a file may be called so."""
        for one in args:
            if not _is_text(one) and not os.path.lexists(one):
                raise typer.BadParameter(f"{one[:80]!r} is not accepted; write it in UTF-8")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # The command line's own errors know their code and how to show themselves.
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                raise
            if ctx.params.get("debug"):
                traceback.print_exception(error)
            raise typer.Exit(_told(error)) from None

    def list_commands(self, ctx: Any) -> list[str]:
        """Every command."""
        return list(PLACES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Load one command."""
        if cmd_name not in PLACES:
            return None
        found = getattr(importlib.import_module(f"scripts.commands.{PLACES[cmd_name]}"), cmd_name)
        if isinstance(found, typer.Typer):
            command: Any = typer.main.get_group(found)
        else:
            holder = typer.Typer(add_completion=False)
            holder.command(cmd_name, epilog=EXPLAINED)(found)
            command = typer.main.get_command(holder)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EXPLAINED,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def countersign(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Agents propose, people countersign, Temporal carries it out exactly once."""


def main() -> None:
    """Run the command line; what it wrote has reached its reader, or that is said."""
    code: Any = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    except OSError as error:  # Help is written before there is a command that could tell.
        code = _told(error)
    code = _written(code)
    leave(code if isinstance(code, int) else int(code is not None))


def _written(code: Any) -> Any:
    try:
        if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison]
            sys.stdout.flush()
    except OSError as error:
        # The interpreter would try again when it ends, and end with a code of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return code or _told(error)
    return code


def _told(error: Exception) -> int:
    """Say what went wrong, unless whoever read has gone; the exit code."""
    if isinstance(error, BrokenPipeError):
        return Exit.UNEXPECTED
    with suppress(OSError):
        typer.echo(text_of(error), err=True)
    return code_of(error)


def _is_text(argument: str) -> bool:
    """Whether the bytes that were typed are UTF-8; others come as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


if __name__ == "__main__":
    main()
