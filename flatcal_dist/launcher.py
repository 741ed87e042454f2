"""What a rank does first, before imports that take seconds. Needs nothing but Python."""

import contextlib
import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_the_launcher() -> None:
    """Be told by SIGTERM when the process that launched this rank ends. Linux only."""
    if "RANK" not in os.environ:
        return  # from a shell, which may well go away
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
