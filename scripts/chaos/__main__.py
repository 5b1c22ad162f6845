"""`python -m scripts.chaos`: every boundary, connector, answer and kind of fall, on one stack.

`python -m scripts.chaos owner` has many deciders change one subject instead; see `scripts.chaos.owner`.

Prints one JSON summary. Exit code 0 when every promise held, 1 when one did not, 2 when nothing fits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.chaos import owner
from scripts.chaos.cases import Case, choose
from scripts.chaos.judge import judge, look
from scripts.chaos.supervisor import Chaos, Server, free_port, settings_for, stack, temporal_at


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["owner"]:
        return owner.main(given[1:])
    options = _parser().parse_args(given)
    cases = choose(options.boundaries, options.runs, options.seed)
    if not cases:
        sys.stderr.write(f"boundaries: {' '.join(options.boundaries)} fits nothing; see --list\n")
        return 2
    if options.list:
        print("\n".join(case.key for case in cases))
        return 0
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        data = Path(options.keep or folder)
        data.mkdir(parents=True, exist_ok=True)
        summary = asyncio.run(_run(cases, data, options.limit))
    print(json.dumps(summary | {"seed": options.seed}, indent=None if options.json else 2))
    return 1 if summary["wrong"] else 0


async def _run(cases: Sequence[Case], data: Path, limit: float) -> dict[str, Any]:
    settings = settings_for(temporal_at(free_port(), free_port()), data, free_port())
    server = Server(settings.temporal, data)
    await server.start()
    began = time.monotonic()
    try:
        async with stack(settings) as chaos, asyncio.timeout(limit):
            outcomes = await chaos.run_all(cases)
            wrong = await judge(settings, chaos.database, list(chaos.cases.values()), outcomes)
            return _summary(chaos, cases, outcomes, wrong) | {"seconds": round(time.monotonic() - began, 1)}
    finally:
        server.kill()


def _summary(chaos: Chaos, cases: Sequence[Case], outcomes: Any, wrong: list[str]) -> dict[str, Any]:
    found = look(chaos.settings)
    return {
        "cases": len(cases),
        "runs": len(outcomes),
        "boundaries": len({case.boundary for case in cases}),
        "fell": dict(Counter(hit.how.value for hit in chaos.arms.hits())),
        "worker_processes_ended": chaos.workers.ended if chaos.workers else 0,
        "woken_after_others_finished": len(chaos.woken),
        "outcomes": dict(Counter(outcome.status.value for outcome in outcomes.values())),
        "effects": found.effects.total(),
        "taken_back": found.undone.total(),
        "never_reached": [case.key for case in chaos.missed()],
        "wrong": wrong,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, help="at most so many cases, chosen by the seed")
    parser.add_argument(
        "--boundaries",
        nargs="+",
        default=["*"],
        help="patterns of connector/how/boundary, for instance 'site/kill/apply.*'",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds until it gives up")
    parser.add_argument("--keep", help="use this folder and leave it, instead of a temporary one")
    parser.add_argument("--list", action="store_true", help="only name the cases")
    parser.add_argument("--json", action="store_true", help="the summary on one line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
