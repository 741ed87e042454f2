"""Asking a run to end: noted as it comes, acted on between steps by all ranks together.

By a signal, by a file STOP in the run directory, or by a deadline.
"""

import contextlib
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

from flatcal_dist.config import TrainConfig
from flatcal_dist.ranks.signals import SIGNALS

LOOK_EVERY = 1.0  # seconds between two looks for the file STOP: a shared file system is slow


class StopRequest:
    """While entered, signals only set `reason`; the training loop ends at a whole step.

    Signals reach the loader's worker processes too; only the process that entered listens.
    stop_file: looked for by rank 0 alone (None elsewhere). deadline: on the clock of time.time.
    """

    def __init__(self, stop_file: Path | None = None, deadline: float | None = None) -> None:
        self.stop_file, self.deadline = stop_file, deadline
        self.reason: str | None = None
        self.looked = -LOOK_EVERY

    def __enter__(self) -> "StopRequest":
        self.process = os.getpid()
        self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.process:
            self.reason = self.reason or signal.Signals(number).name

    @property
    def asked(self) -> bool:
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
        """The run has stopped: a file that asked for it has had its way, and goes.

        Where a signal was first the file stays, for the next start: a job may requeue itself.
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
    """When to stop by itself, in seconds since 1970, or None; and a remark, or None.

    train.stop_after_minutes after `started`; and SLURM's end of the job less
    train.stop_margin_minutes. What cannot be the end of this job is left out, with a remark.
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
