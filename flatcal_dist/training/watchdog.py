"""Nothing hangs: a thread ends this rank when no step comes, or when its launcher is gone."""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from flatcal_dist.ranks.launcher import launch_of

TICK = 0.5  # seconds
ORPHAN_SECONDS = 40.0  # time to end with a checkpoint once the launcher is gone
WAITING_SECONDS = 3.0  # ranks that wait for another let it speak first


class Watchdog:
    """Watches the process that creates it, from then on.

    Args:
        end: It is called in the watching thread with the cause. It says it and exits.
        minutes: How long the process may live without a call of `beat`. None: only the launcher is
            watched.
    """

    def __init__(self, end: Callable[[str], NoReturn], minutes: float | None = None) -> None:
        self.end = end
        self.limit = None if minutes is None else 60 * minutes
        self.silent = 0.0  # seconds without a beat
        self.launcher = os.getppid() if launch_of(os.environ).watched else None
        self.main = threading.main_thread().ident
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        """Say that this rank is alive."""
        self.silent = 0.0

    def rest(self) -> None:
        """Watch only the launcher from here on."""
        self.limit = None

    def _watch(self) -> None:
        orphan, before = 0.0, time.monotonic()
        while True:
            time.sleep(TICK)
            now = time.monotonic()
            passed, before = min(now - before, 4 * TICK), now  # a suspended job does not hang
            self.silent += passed
            if self.launcher is not None and os.getppid() != self.launcher:
                orphan += passed
            if orphan > ORPHAN_SECONDS:
                self.end("the launcher of this rank is gone, and the run did not end by itself")
            if self.limit is not None and self.silent > self.limit:
                self._hangs()

    def _hangs(self) -> None:
        frame = None if self.main is None else sys._current_frames().get(self.main)
        where, waiting = _place(frame)
        sys.stderr.write(f"no step for {self.limit:.0f} s; all threads of this rank:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        if waiting:
            time.sleep(WAITING_SECONDS)
        what = "waits for other ranks" if waiting else "hangs"
        said = f"no step for {self.limit:.0f} s (train.hang_minutes)"
        self.end(f"{said}: this rank {what} in {where}")


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Return where a thread is, preferably in this package, and whether it waits in torch."""
    if frame is None:
        return "an unknown place", False
    stack = traceback.extract_stack(frame)
    inner = stack[-1]
    own = next((f for f in reversed(stack) if "flatcal_dist" in f.filename), inner)
    text = f"{inner.name} ({inner.filename}:{inner.lineno})"
    if own is not inner:
        text += f", called by {own.name} ({own.filename}:{own.lineno})"
    return text, f"{os.sep}torch{os.sep}" in inner.filename
