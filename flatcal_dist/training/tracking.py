"""Where numbers go: metrics.jsonl is the truth; the console and W&B show what stands in it.

One JSON object per logged step or epoch, with flat keys. A resumed run appends; where it writes a
step again, the last record of the step counts.
"""

import json
import math
import secrets
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flatcal_dist.config import Config


class Tracker:
    """Opened by rank 0 of a run; any other rank has one that does nothing (`active` False)."""

    def __init__(
        self, config: Config, path: Path, total_steps: int, start: int, active: bool
    ) -> None:
        self.active = active
        if not active:
            return
        self.file = (path / "metrics.jsonl").open("a+", encoding="utf-8")
        _end_torn_line(path / "metrics.jsonl")
        self.total_steps = total_steps
        self.console = Console(file=sys.stdout)
        self.bar = self._progress_bar(start) if self.console.is_terminal else None
        self.wandb = _start_wandb(config, path) if config.wandb.mode != "disabled" else None

    def log(self, step: int, values: dict[str, float | int | None]) -> None:
        """Write one record, such as {"train/loss": 0.7}; what is not finite becomes null."""
        if not self.active:
            return
        record = {"step": step} | {key: _finite_or_none(value) for key, value in values.items()}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self._to_wandb(record)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.active:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, step: int, text: str, images_per_second: float, seconds_left: float) -> None:
        """Progress: the bar on a terminal, else a line with the time left."""
        if not self.active:
            return
        if self.bar is not None:
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
        self.file.close()
        if self.bar is not None:
            self.bar.stop()
        if self.wandb is not None:
            try:
                self.wandb.finish(exit_code=exit_code)
            except Exception as error:  # a sink can never fail a run
                self.console.print(f"W&B did not finish: {error}", markup=False)

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

    def _to_wandb(self, record: dict[str, Any]) -> None:
        try:
            self.wandb.log({key: value for key, value in record.items() if value is not None})
        except Exception as error:  # a sink can never fail a run
            self.say(f"W&B failed and is left out from here on: {error}")
            self.wandb = None


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, in the order written; a torn last line is left out.

    Empty where there is no such file.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _start_wandb(config: Config, path: Path) -> Any:
    """The one W&B run of this directory: its id is kept beside it. None when W&B does not start."""
    try:
        import wandb

        id_file = path / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        mode = config.wandb.mode
        if mode == "online" and not wandb.login(prompt=False):  # would ask, and wait
            print("W&B has no key (wandb login): this run is recorded offline", file=sys.stderr)
            mode = "offline"
        run = wandb.init(
            project=config.wandb.project,
            name=config.wandb.name or path.name,
            group=config.wandb.group,
            tags=config.wandb.tags,
            id=id_file.read_text().strip(),
            resume="allow",
            mode=mode,
            dir=str(path),
            config=config.model_dump(),
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run
    except Exception as error:
        print(f"W&B did not start, the run goes on without it: {error}", file=sys.stderr)
        return None


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
