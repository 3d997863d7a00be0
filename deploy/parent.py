"""Dying with the parent, so that nothing is left running when a supervisor is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

from protocol.errors import SlipstreamError

_PR_SET_PDEATHSIG = 1


def die_with_parent(expected_parent: int | None = None) -> None:
    """Ask the kernel for SIGKILL when the parent process ends (Linux; elsewhere the supervisor's own clean-up has to do).

    `expected_parent` is the parent's process id as the parent knew it: if it ended before this call, this process ends now.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if expected_parent is not None and os.getppid() != expected_parent:
        os._exit(1)


def end_now(error: SlipstreamError) -> NoReturn:
    """Say why and end this process, without waiting for threads that may never return."""
    sys.stderr.write(f"error: {error}\n")
    sys.stderr.flush()
    os._exit(error.exit_code)
