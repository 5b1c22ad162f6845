"""Become another program that dies when the launcher dies.

Run as `python -I -S leash.py PARENT_PID [NAME=VALUE …] -- PROGRAM ARGUMENTS…`. The death signal survives
exec, so it works for programs that are not ours. It is SIGKILL: when the launcher was killed, the engine
under the workers is going too and there is nothing to drain into, and a program that ignores or outlasts
SIGTERM would stay behind with its port and its database. Every part is built for being killed at any step.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
NOT_LEASHED = 71


def main(arguments: list[str]) -> int:
    """Tie this process to its parent and exec; returns only when the parent is gone already."""
    cut = arguments.index("--")
    parent, variables, command = int(arguments[0]), arguments[1:cut], arguments[cut + 1 :]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        return NOT_LEASHED
    # The parent may have died before the call above, and then no signal will ever come.
    if os.getppid() != parent:
        return NOT_LEASHED
    for variable in variables:
        os.putenv(*variable.split("=", 1))
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
