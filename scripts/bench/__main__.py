"""`python -m scripts.bench NAME ARGS` runs `scripts/bench/NAME.py`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence

import scripts.bench


def main(argv: Sequence[str]) -> int:
    """Hand the arguments to the benchmark of that name."""
    names = sorted(
        found.name for found in pkgutil.iter_modules(scripts.bench.__path__) if not found.name.startswith("_")
    )
    if not argv or argv[0] not in names:
        print(
            f"usage: python -m scripts.bench NAME ARGS; NAME is one of: {', '.join(names)}", file=sys.stderr
        )
        return 2
    return int(importlib.import_module(f"scripts.bench.{argv[0]}").main(list(argv[1:])) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
