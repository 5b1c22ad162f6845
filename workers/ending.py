"""How a process ends that may have talked to Temporal."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn

BRIDGE = "temporalio.bridge.temporal_sdk_bridge"
"""What has threads of its own in here, once it is loaded."""


def leave(code: int) -> NoReturn:
    """End this process, when all is written and closed; threads of Temporal's client know no end.

    Where they meet the interpreter's own end they abort it: one command in thirty, and one worker in twenty,
    had done its work and ended as if it had crashed.
    """
    if BRIDGE not in sys.modules:
        sys.exit(code)
    logging.shutdown()
    with suppress(OSError, AttributeError):  # There is none where it was closed.
        sys.stderr.flush()
    os._exit(code)
