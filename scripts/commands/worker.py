"""`countersign worker ROLE`: this process becomes one worker."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from models.visibility import Role


def worker(role: Annotated[Role, typer.Argument(help="The worker's job.")]) -> None:
    """Run one role in this process until SIGTERM or Ctrl-C."""
    os.execv(sys.executable, (sys.executable, "-m", "workers", role.value))
