"""Where numbers go: metrics.jsonl is the truth; the console and W&B show what stands in it.

One JSON object per logged step or epoch, with flat keys. A resumed run appends; where it writes a
step again, the last record of the step counts.
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
    """Opened by rank 0 of a run; any other rank has one that does nothing (`active` False)."""

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
        self.wandb = self._start_wandb(config, path) if config.wandb.mode != "disabled" else None

    def log(self, step: int, values: dict[str, float | int | None]) -> None:
        """Write one record, such as {"train/loss": 0.7}; what is not finite becomes null."""
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
        """A file that was removed takes all that is written into it along."""
        removed = os.fstat(self.file.fileno()).st_nlink == 0
        if removed and self.path.parent.is_dir():  # else the run directory says that it is gone
            self.file.close()
            self.file = open_to_append(self.path)
            self.say(f"{self.path} was removed: a new one begins with step {step}")

    def sync(self) -> None:
        """Make what was logged durable: it outlives the machine."""
        if self.active:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                raise WriteError(self.path, error) from None

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.active:
            self._print(text)

    def show(self, step: int, text: str, images_per_second: float, seconds_left: float) -> None:
        """Progress: the bar on a terminal, else a line with the time left."""
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
        with suppress(OSError):  # the terminal was closed: the run is not about it
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _start_wandb(self, config: "Config", path: Path) -> WandbSink | None:
        try:
            return WandbSink(path, config.wandb.mode, config.wandb.finish_seconds)
        except OSError as error:  # a sink can never fail a run
            self._print(f"W&B did not start, the run goes on without it: {error}")
            return None

    def _watch_wandb(self) -> None:
        """Show what W&B's process says; once it has ended there is nothing more to come."""
        if self.wandb is not None:
            for text in self.wandb.messages():
                self._print(text)
            if self.wandb.ended:
                self.wandb = None


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, in the order written; lines that are torn are left out.

    Empty where there is no such file. Raises OSError, and ValueError for what is no regular file.
    """
    if not path.exists():
        return []
    lines = read_bytes(path, limit=None).split(b"\n")
    return [record for line in lines if (record := parse_record(line)) is not None]


def parse_record(line: bytes) -> dict | None:
    """One line of metrics.jsonl; None for what is no record.

    A machine that went down may leave anything. Values are numbers or None, `step` is a number.
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
    """End a last line that was cut off when the run was killed, so that the next one is whole."""
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
