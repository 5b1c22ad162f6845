"""The `countersign` command. Each subcommand is loaded when it is asked for, so that none pays for all."""

from __future__ import annotations

import importlib
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from scripts.exits import EXPLAINED, code_of, text_of

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
            typer.echo(text_of(error), err=True)
            raise typer.Exit(code_of(error)) from None

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
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
