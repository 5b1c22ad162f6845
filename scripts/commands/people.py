"""Who answers in a demo: the person at the terminal; without one, an approver that is played, and says so."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console

from activities.services.runs import Card
from models.errors import Unavailable
from models.gate import Kind, Refusal, read_message
from scripts.commands.show import print_card

PLAYED = "demo@localhost"
LETTERS = {"a": Kind.APPROVE, "r": Kind.REJECT, "v": Kind.REVISE}
Line = Callable[[], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to send."""

    kind: Kind
    message: dict[str, Any]


class Person(Protocol):
    """Somebody who reads a card and answers."""

    @property
    def name(self) -> str:
        """Who answers."""
        ...

    async def answer(self, run: str, card: Card) -> Reply:
        """Read the card and answer it."""
        ...


class Played:
    """Nobody is there: approves whatever is put forward, and says that it does."""

    name = PLAYED

    def __init__(self, out: Console) -> None:
        """Say in plain words what is going to happen."""
        self._out = out
        out.print(
            "No terminal here, so there is nobody to ask. This demo plays the approver: it reads nothing and "
            f"approves everything as {PLAYED}, by the very Signal `approve` that a person's answer would be."
        )

    async def answer(self, run: str, card: Card) -> Reply:
        """Show the card and approve it."""
        print_card(self._out, card.full)
        self._out.print(f"Playing the approver: Signal approve to {run} as {PLAYED}, for {card.digest}")
        return Reply(Kind.APPROVE, {"digest": card.digest, "approver": PLAYED})


class AtTerminal:
    """The person at the terminal."""

    def __init__(self, out: Console, name: str, line: Line) -> None:
        """Answers are recorded under `name`; `line` gives what the person types."""
        self.name = name
        self._out = out
        self._line = line

    async def answer(self, run: str, card: Card) -> Reply:
        """Show the card and ask until there is an answer."""
        print_card(self._out, card.full)
        self._out.print(f"run      {run}\ndigest   {card.digest}")
        while True:
            kind = LETTERS.get((await self._ask("(a)pprove, (r)eject or re(v)ise?")).lower()[:1])
            if kind is None:
                continue
            message = {"digest": card.digest, "approver": self.name}
            if kind is not Kind.APPROVE:
                message["comment"] = await self._ask("your comment:")
            read = read_message(kind, [message])
            if not isinstance(read, Refusal):
                return Reply(kind, message)
            self._out.print(f"{read.field}: {read.remedy}")

    async def _ask(self, question: str) -> str:
        self._out.print(question, end=" ")
        return (await self._line()).strip()


async def typed_line() -> str:
    """A line from the terminal, without holding up the loop or its signals.

    Raises:
        Unavailable: the terminal was closed.
    """
    loop, there = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), there.set)
    try:
        await there.wait()
        line = sys.stdin.readline()
    finally:
        loop.remove_reader(sys.stdin.fileno())
    if not line:
        raise Unavailable("the terminal was closed before everything was answered; run it again to go on")
    return line
