"""Numbers are written into metrics.jsonl. The console and W&B show what stands there.

The file has one JSON object for each logged step or epoch, with flat keys. A resumed run appends to
it. If it takes a step again, the last record of that step counts.
"""

import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flatcal_dist.files import WriteError, open_to_append, read_bytes
from flatcal_dist.tracking.wandb_sink import WandbSink

if TYPE_CHECKING:
    from flatcal_dist.config import Config


class Tracker:
    """Writes and shows what is logged. Rank 0 has an active tracker; that of others does nothing.

    Args:
        config: The configuration.
        path: The run directory.
        total_steps: The number of steps of the run.
        start: How many of them are done.
        active: Whether this is rank 0.
    """

    def __init__(
        self, config: "Config", path: Path, total_steps: int, start: int, active: bool
    ) -> None:
        self.active = active
        if not active:
            return
        self.path = path / "metrics.jsonl"
        self.file = open_to_append(self.path)
        _end_torn_line(path / "metrics.jsonl")
        self.total_steps = total_steps
        self.console = Console(file=sys.stdout)
        self.bar = self._progress_bar(start) if self.console.is_terminal else None
        self.wandb = self._start_wandb(config, path)

    def log(self, step: int, values: dict[str, float | int | None]) -> None:
        """Write one record, such as {"train/loss": 0.7}. Values that are not finite become null."""
        if not self.active:
            return
        record = {"step": step} | {key: _finite_or_none(value) for key, value in values.items()}
        try:
            self._reopen_if_removed(step)
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise error if isinstance(error, WriteError) else WriteError(self.path, error) from None
        self._watch_wandb()

    def _reopen_if_removed(self, step: int) -> None:
        """Open a new file if the old one was removed: what is written into that one is lost."""
        removed = os.fstat(self.file.fileno()).st_nlink == 0
        if removed and self.path.parent.is_dir():  # else the run directory says that it is gone
            self.file.close()
            self.file = open_to_append(self.path)
            self.say(f"{self.path} was removed: a new one begins with step {step}")

    def sync(self) -> None:
        """Make what was logged durable, so that it survives a crash of the machine."""
        if self.active:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                raise WriteError(self.path, error) from None

    def say(self, text: str) -> None:
        """Print a line for the person who watches."""
        if self.active:
            self._print(text)

    def show(self, step: int, text: str, images_per_second: float, seconds_left: float) -> None:
        """Show the progress: a bar on a terminal, else a line with the time that is left.

        Args:
            step: How many steps are done.
            text: What to show of the last one.
            images_per_second: The speed.
            seconds_left: How long the rest takes at this speed.
        """
        if not self.active:
            return
        if self.bar is not None:
            with suppress(OSError):
                self.bar.update(self.task, completed=step, text=text)
        else:
            self.say(
                f"step {step}/{self.total_steps}  {text}  {images_per_second:,.0f} images/s  "
                f"{_duration(seconds_left)} left"
            )

    def close(self, exit_code: int = 0) -> None:
        """Close the file, and end the W&B run with this exit code."""
        if not self.active:
            return
        self.active = False
        with suppress(OSError):  # what could not be written was said before
            self.file.close()
        if self.bar is not None:
            with suppress(OSError):
                self.bar.stop()
        if self.wandb is not None:
            for text in self.wandb.finish(exit_code):
                self._print(text)

    def _progress_bar(self, start: int) -> Progress:
        bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = bar.add_task("", total=self.total_steps, completed=start, text="")
        bar.start()
        return bar

    def _print(self, text: str) -> None:
        with suppress(OSError):  # the terminal was closed, which must not end the run
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _start_wandb(self, config: "Config", path: Path) -> WandbSink | None:
        mode = config.wandb.mode
        if mode == "disabled":
            return None
        try:
            return WandbSink(path, mode, config.wandb.finish_seconds)
        except OSError as error:  # W&B must not end the run
            self._print(f"W&B did not start, the run goes on without it: {error}")
            return None

    def _watch_wandb(self) -> None:
        """Show what the process of W&B says, until it has ended."""
        if self.wandb is not None:
            for text in self.wandb.messages():
                self._print(text)
            if self.wandb.ended:
                self.wandb = None


def read_metrics(path: Path) -> list[dict]:
    """Return the records of a metrics.jsonl in their order. Torn lines are left out.

    Without such a file there are none. Raises OSError, and ValueError for a device or a pipe.
    """
    if not path.exists():
        return []
    lines = read_bytes(path, limit=None).split(b"\n")
    return [record for line in lines if (record := parse_record(line)) is not None]


def parse_record(line: bytes) -> dict | None:
    """Return the record of one line of metrics.jsonl, or None for a line that is no record.

    A machine that crashed may leave anything. Values are numbers or None, `step` is a number.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {k: v for k, v in record.items() if v is None or _is_number(v)}


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < math.inf


def _end_torn_line(path: Path) -> None:
    """End a last line that was cut off by a kill, so that the next line is whole."""
    with path.open("rb+") as file:
        if file.seek(0, 2) == 0:
            return
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
