"""Requests to end a run, which all ranks follow together between two steps.

A signal, a file STOP in the run directory, or a deadline makes such a request.
"""

import contextlib
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from flatcal_dist.config import TrainConfig
from flatcal_dist.ranks.signals import SIGNALS

LOOK_EVERY = 1.0  # seconds between two looks for the file STOP; shared file systems are slow


class StopRequest:
    """A context in which signals only set `reason`, so that training ends after a whole step.

    Worker processes of the loader get the signals, too, and ignore them.

    Args:
        stop_file: A file that asks to stop. Rank 0 alone looks for it; other ranks pass None.
        deadline: When to stop, in seconds since 1970.
    """

    def __init__(self, stop_file: Path | None = None, deadline: float | None = None) -> None:
        self.stop_file, self.deadline = stop_file, deadline
        self.reason: str | None = None
        self.looked = -LOOK_EVERY
        self.process = os.getpid()
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self.process = os.getpid()
        self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.process:
            self.reason = self.reason or signal.Signals(number).name

    @property
    def asked(self) -> bool:
        """Whether this rank knows of a reason to stop."""
        now = time.monotonic()
        if self.reason is None and self.deadline is not None and time.time() >= self.deadline:
            self.reason = "deadline"
        if self.reason is None and self.stop_file is not None and now - self.looked >= LOOK_EVERY:
            self.looked = now
            if self.stop_file.exists():
                self.reason = self._by_file()
        return self.reason is not None

    def _by_file(self) -> str:
        return f"the file {self.stop_file}"

    def heeded(self) -> None:
        """Remove the file that asked for the stop, now that the run has stopped.

        If a signal came first the file stays for the next start, because a job may requeue itself.
        """
        if self.stop_file is not None and self.reason == self._by_file():
            with contextlib.suppress(OSError):
                is_link = self.stop_file.is_symlink()
                is_directory = self.stop_file.is_dir() and not is_link  # by mkdir STOP
                self.stop_file.rmdir() if is_directory else self.stop_file.unlink(missing_ok=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def deadline(config: TrainConfig, started: float) -> tuple[float | None, str | None]:
    """Return when the run stops by itself, in seconds since 1970 or None, and a remark or None.

    That is train.stop_after_minutes after `started`, or train.stop_margin_minutes before the end of
    the SLURM job. A time that cannot be the end of this job is left out, with a remark.
    """
    ends, remark = [], None
    if config.stop_after_minutes is not None:
        ends.append(started + 60 * config.stop_after_minutes)
    if text := os.environ.get("SLURM_JOB_END_TIME"):
        end = _seconds(text)
        if end is not None and end > started:
            ends.append(end - 60 * config.stop_margin_minutes)
        else:
            remark = (
                f"SLURM_JOB_END_TIME={text[:40]} in the environment is no time after the start of "
                "this process, so it is ignored: the run does not stop before the job's end"
            )
    return min(ends, default=None), remark


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text) if text.isascii() else math.nan
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None
