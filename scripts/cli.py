"""The `countersign` command."""

from __future__ import annotations

import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from scripts.commands.agents import agents
from scripts.commands.answer import approve, delegate, reject, revise
from scripts.commands.demo import demo
from scripts.commands.doctor import doctor
from scripts.commands.ledger import ledger
from scripts.commands.pending import pending
from scripts.commands.schedules import schedules
from scripts.commands.show import show
from scripts.commands.start import start
from scripts.commands.up import up
from scripts.commands.worker import worker
from scripts.exits import EXPLAINED, code_of, text_of


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


for command in (up, demo, doctor, worker, start, pending, show, approve, reject, revise, delegate, agents):
    app.command(epilog=EXPLAINED)(command)
app.add_typer(schedules, name="schedules", epilog=EXPLAINED)
app.add_typer(ledger, name="ledger", epilog=EXPLAINED)


def main() -> None:
    """Run the command line."""
    app()
