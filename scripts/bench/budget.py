"""One budget, many calls at once, and workers that die: `python -m scripts.bench budget --calls 1000`.

Worker processes route calls (which holds the money) and have them answered (which settles), against one
database. The model server is a file with one line per call that it bills. Workers kill themselves at chosen
moments; whoever starts them again repeats what was not reported done, as Temporal would. In the end every
lease is over, and the books are held against the server's bill. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select

from activities.services.budget import CALL, RESERVATION, Books, State
from activities.services.content import ContentStore
from activities.services.database import Database
from activities.services.ledger_store import EVENT, LedgerStore
from activities.services.migrations import migrate
from activities.services.router import Answerer
from activities.services.routes import Routes
from activities.services.till import Till
from models.budget import Account, Budget, accounts_of, amount_of, micros
from models.canonical import derived_id
from models.errors import BudgetExceeded
from models.inference import Call, Completion, Inputs, Message, Params, Prompt, Task
from models.orders import RouteOrder
from models.settings import TierSettings

TASK = "bench.paid"
TIER = TierSettings(
    name="paid",
    kind="llama_cpp",
    url="http://127.0.0.1:1",
    concurrency=64,
    price_per_million_input=Decimal(3),
    price_per_million_output=Decimal(15),
    currency="EUR",
)
PROMPT_TOKENS, ANSWER_TOKENS = 20, 30
STEPS = ("routed", "billed", "answered")
"""Where a worker may die: money held, the server has worked, the answer is kept but nobody was told."""


def bill() -> int:
    """What the server bills for one call, in millionths."""
    return micros(Decimal(3 * PROMPT_TOKENS + 15 * ANSWER_TOKENS) / 1_000_000)


def paid_task() -> Task:
    """One short answer."""

    def build(inputs: Inputs, params: Params) -> Prompt:
        return Prompt(messages=(Message(role="user", content=f"Call {params['number']}."),), max_tokens=32)

    def check(text: str, inputs: Inputs, params: Params) -> tuple[str, ...]:
        return ()

    return Task(TASK, "small", False, build, check)


class Death:
    """Kills this process when a step has been taken so many times."""

    def __init__(self, step: str, times: int) -> None:
        """`times` 0 is never."""
        self._step = step
        self._left = times

    def at(self, step: str) -> None:
        """Take a step."""
        if step == self._step and self._left:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


class Server:
    """A model server that is a file: a line is appended for what it bills, then it answers."""

    name = "paid"

    def __init__(self, folder: Path, death: Death) -> None:
        """The file is shared by all workers."""
        self._file = os.open(folder / "bill", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._death = death

    async def complete(self, prompt: Prompt) -> Completion:
        """Bill, and answer."""
        os.write(self._file, f"{prompt.messages[0].content}\n".encode())
        self._death.at("billed")
        await asyncio.sleep(0)
        return Completion(
            text="yes",
            finish="stop",
            prompt_tokens=PROMPT_TOKENS,
            completion_tokens=ANSWER_TOKENS,
            model="paid-1",
            milliseconds=1,
        )

    async def ready(self) -> bool:
        """Always."""
        return True

    async def aclose(self) -> None:
        """Nothing to give back."""


class Worker:
    """One process's share of the calls."""

    def __init__(self, folder: Path, cap: str, death: Death) -> None:
        """Everything stands in the folder."""
        database = self.database = Database(url(folder))
        content, tasks = ContentStore(database), {TASK: paid_task()}
        budgets = (Budget(amount=cap, currency="EUR"),)
        ledger = LedgerStore(database, now)
        self._routes = Routes([TIER], tasks, content, ledger, database=database, clock=now, budgets=budgets)
        till = Till(database, now)
        self._answerer = Answerer([TIER], {"paid": Server(folder, death)}, tasks, content, till=till)
        self._done = os.open(folder / "done", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._starts = os.open(folder / "starts", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._started = Counter((folder / "starts").read_text().split())
        self._death = death

    async def call(self, number: int) -> None:
        """One call, as a workflow makes it."""
        workflow, call = f"run-{number}", Call(task=TASK, params={"number": number})
        event = derived_id("event", workflow)
        order = RouteOrder(tenant="acme", workflow_id=workflow, event_id=event, agent="bench", call=call)
        try:
            routed = await self._routes.route(order)
            self._death.at("routed")
            os.write(self._starts, f"{number}\n".encode())
            await self._answerer.answer("acme", call, "paid", routed.grant, self._started[str(number)] + 1)
            said = "answered"
        except BudgetExceeded:
            said = "refused"
        self._death.at("answered")
        os.write(self._done, f"{number} {said}\n".encode())

    async def run(self, numbers: Sequence[int]) -> None:
        """All at once."""
        await asyncio.gather(*(self.call(number) for number in numbers))
        self.database.close()


def now() -> datetime:
    """The time."""
    return datetime.now(UTC)


def url(folder: Path) -> str:
    """The database of a folder."""
    return f"sqlite:///{folder / 'books.db'}"


def work(folder: Path, share: int, shares: int, calls: int, cap: str, death: Death) -> None:
    """Do what is not done of a share."""
    done = set(read_done(folder))
    numbers = [number for number in range(share, calls, shares) if number not in done]
    asyncio.run(Worker(folder, cap, death).run(numbers))


def read_done(folder: Path) -> dict[int, str]:
    """What was reported, by call."""
    file = folder / "done"
    lines = file.read_text().splitlines() if file.exists() else []
    return {int(number): said for number, said in (line.split() for line in lines)}


def trial(folder: Path, calls: int, shares: int, deaths: int, cap: str) -> dict[str, Any]:
    """Run all shares, each dying `deaths` times at different steps, and hold the books against the bill."""
    migrate(url(folder))
    began = datetime.now(UTC)
    kills = 0
    for attempt in range(1, deaths + 2):
        running: list[subprocess.Popen[bytes]] = []
        for share in range(shares):
            times = 0 if attempt > deaths else 1 + (share * 7 + attempt * 3) % max(1, calls // shares // 4)
            step = STEPS[(share + attempt) % len(STEPS)]
            argv = ["--folder", str(folder), "--share", str(share), "--shares", str(shares)]
            argv += ["--calls", str(calls), "--cap", cap, "--die", f"{step}:{times}"]
            running.append(subprocess.Popen([sys.executable, "-m", "scripts.bench.budget", *argv]))
        codes = [process.wait() for process in running]
        kills += sum(code == -signal.SIGKILL for code in codes)
        if any(code not in (0, -signal.SIGKILL) for code in codes):
            raise RuntimeError(f"a worker failed: {codes}")
    seconds = (datetime.now(UTC) - began).total_seconds()
    return {"calls": calls, "workers": shares, "kills": kills, "seconds": round(seconds, 1)} | asyncio.run(
        audit(folder, cap)
    )


async def audit(folder: Path, cap: str) -> dict[str, Any]:
    """End every lease and compare."""
    database = Database(url(folder))
    later = now() + timedelta(hours=1)
    while await Books(database, lambda: later).expire():
        pass
    budget = accounts_of([Budget(amount=cap, currency="EUR")], "acme", "bench", now())
    (account,) = await Books(database, now).accounts(budget)
    report = await database.read(lambda link: _compared(link, folder, account))
    database.close()
    return report


def _compared(link: Connection, folder: Path, account: Account) -> dict[str, Any]:
    rows = link.execute(select(RESERVATION)).all()
    noted: dict[str, int] = dict(
        link.execute(select(CALL.c.reservation, func.sum(CALL.c.micros)).group_by(CALL.c.reservation)).all()
    )
    billed = Counter(line.strip("Cal .") for line in (folder / "bill").read_text().splitlines())
    said = read_done(folder)
    kept = [row for row in rows if row.state == State.SETTLED]
    counted = {row.id: row.spent if row.state == State.SETTLED else row.worst for row in rows}
    due = {row.id: billed[row.workflow_id.removeprefix("run-")] * bill() for row in rows}
    routes = link.execute(select(func.count()).where(EVENT.c.type == "route")).scalar_one()
    return {
        "answered": sum(value == "answered" for value in said.values()),
        "refused": sum(value == "refused" for value in said.values()),
        "route_events": routes,
        "cap": amount_of(account.cap),
        "spent": amount_of(account.spent),
        "overspent": max(0, account.spent + account.held - account.cap),
        "still_held": account.held,
        "reservations": dict(Counter(row.state for row in rows)),
        "unsettled": sum(row.state == State.HELD for row in rows),
        "spent_is_sum_of_reservations": account.spent == sum(counted.values()),
        "settled_is_sum_of_calls": all(row.spent == noted.get(row.id, 0) for row in kept),
        "billed": amount_of(sum(billed.values()) * bill()),
        "billed_without_money_held": sum(billed.values()) * bill() - sum(due.values()),
        "reservations_below_bill": sum(counted[name] < due[name] for name in due),
        "exact": sum(counted[name] == due[name] for name in due),
    }


def sound(report: dict[str, Any]) -> bool:
    """Whether nothing was overspent, lost or left open."""
    zeros = ("overspent", "still_held", "unsettled", "billed_without_money_held", "reservations_below_bill")
    return (
        not any(report[name] for name in zeros)
        and report["spent_is_sum_of_reservations"]
        and report["settled_is_sum_of_calls"]
        and report["answered"] + report["refused"] == report["calls"]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the trial, or one worker of it."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench budget", description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--shares", type=int, default=4)
    parser.add_argument("--deaths", type=int, default=3, help="how often each worker is killed")
    parser.add_argument("--cap", default="0.60")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--die", default=":0", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.share is not None:
        step, _, times = given.die.partition(":")
        death = Death(step, int(times))
        work(given.folder, given.share, given.shares, given.calls, given.cap, death)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = trial(Path(folder), given.calls, given.shares, given.deaths, given.cap)
    print(json.dumps(report | {"sound": sound(report)}, indent=2))
    return 0 if sound(report) else 1


if __name__ == "__main__":
    sys.exit(main())
