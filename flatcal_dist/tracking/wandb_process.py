"""A separate process sends metrics.jsonl to W&B. `wandb_sink.WandbSink` starts it.

    python -m flatcal_dist.tracking.wandb_process RUN offline|online [EXIT_CODE]

The file is the queue: training writes a line and needs nothing more, whatever happens here. Line n
of the file is `_step` n of W&B, which therefore grows over all starts of a run. W&B drops records
whose `_step` goes back, so it drops nothing when a resumed run takes a step again. Charts are drawn
over our `step` (define_metric). A later start, or `flatcal sync`, sends what an earlier one missed.
"""

import os
import secrets
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flatcal_dist import config as configuration
from flatcal_dist.config import Config
from flatcal_dist.files import read_json, write_text
from flatcal_dist.printing import never_fail
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.tracking.tracker import parse_record
from flatcal_dist.tracking.wandb_files import history, segments
from flatcal_dist.tracking.wandb_sink import Mode
from flatcal_dist.urls import hide, public

BEST = {"val/accuracy": max, "val/nll": min, "val/refined_nll": min}
TABLES = {
    "calibration/reliability": lambda metrics: metrics,
    "calibration/reliability_after_temperature": lambda metrics: metrics["after_temperature"],
}
MESSAGES = 2  # descriptor of `say`
COLUMNS = ("low", "high", "count", "mean_confidence", "accuracy")


class Lines:
    """The numbered records of a growing metrics.jsonl. A torn line has a number but no record."""

    def __init__(self, file: Path) -> None:
        self.file, self.offset, self.number = file, 0, 0

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self.file.is_file():
            return
        with self.file.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                number, self.number = self.number, self.number + 1
                if (record := parse_record(line)) is not None:
                    yield number, {k: value for k, value in record.items() if value is not None}


class Follower:
    """One W&B run with its rows and summary, and at its end with tables, figures and artifacts."""

    def __init__(self, directory: Path, config: Config, mode: Mode) -> None:
        self.directory, self.config = directory, config
        self.lines = Lines(directory / "metrics.jsonl")
        self.best: dict[str, float] = {}
        self.saved: set[str] = set()
        sent = lines_sent(directory)  # before this start adds another log
        self.run = start(directory, config, mode)
        if mode == "online":  # what the server has, not what was written for it
            sent = self.run.starting_step if self.run.resumed else 0
        self.begin_at = sent

    def send(self) -> None:
        """Send every record that is new."""
        before: dict[str, Any] = {}
        for number, record in self.lines.new():
            self._remember(record)
            if number < self.begin_at:
                before |= record
                continue
            if before:  # an offline log knows nothing of those before it
                self.run.summary.update(before)
                before = {}
            self.run.log(record, step=number, commit=True)
        if before:
            self.run.summary.update(before)
        if self.config.wandb.log_checkpoints:
            self._checkpoints()

    def finish(self, exit_code: int) -> None:
        """Send everything that is left, then end the W&B run."""
        self.send()
        self.run.summary.update(self.best)
        phase = _json(self.directory / "state.json").get("phase")
        has_report = (self.directory / "report/metrics.json").exists()
        if phase == "finished" and has_report and self.begin_at <= self.lines.number:
            self._report()
        if phase == "preempted":
            self.run.mark_preempting()
            exit_code = exit_code or 1
        self.run.finish(exit_code=exit_code)

    def _remember(self, record: dict[str, Any]) -> None:
        for key, better in BEST.items():
            if key in record:
                name = f"best/{key.removeprefix('val/')}"
                if name not in self.best or better(record[key], self.best[name]) != self.best[name]:
                    self.best |= {name: record[key], f"{name}_step": record["step"]}

    def _report(self) -> None:
        import wandb

        metrics = _json(self.directory / "report/metrics.json")
        row: dict[str, Any] = {
            key: wandb.Table(
                columns=list(COLUMNS),
                data=[[bin_[name] for name in COLUMNS] for bin_ in side(metrics)["bins"]],
            )
            for key, side in TABLES.items()
        }
        for figure in sorted((self.directory / "report/figures").glob("*.png")):
            row[f"report/{figure.stem}"] = wandb.Image(str(figure))
        step = {"step": _json(self.directory / "state.json")["step"]}
        self.run.log(row | step, step=self.lines.number, commit=True)
        self._artifact("report", self.directory / "report", ["latest"])

    def _checkpoints(self) -> None:
        for path in sorted((self.directory / "checkpoints").glob("step_*")):
            if path.name not in self.saved and path.is_dir():
                self.saved.add(path.name)
                try:
                    self._artifact("checkpoint", path, [path.name, "latest"])
                except (OSError, ValueError) as error:  # a newer one has taken its place meanwhile
                    say(f"W&B did not get {path.name}: {error}")

    def _artifact(self, kind: str, path: Path, aliases: list[str]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self.run.id}", type=kind)
        artifact.add_dir(str(path))
        self.run.log_artifact(artifact, aliases=aliases)


def start(directory: Path, config: Config, mode: Mode) -> Any:
    """Return the one W&B run of a run directory, which keeps its id. Raises what W&B raises.

    Args:
        directory: The run directory.
        config: The configuration of the run.
        mode: The mode of W&B.
    """
    # Artifacts are staged beside the run, whose disk is meant for such things, not under HOME.
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(name, str((directory / "wandb/data").resolve()))
    import wandb

    run_directory = RunDirectory(directory)
    if (run_id := run_directory.wandb_id()) is None:
        write_text(run_directory.wandb_id_file, run_id := secrets.token_hex(4))
    settings = config.wandb
    run = wandb.init(
        project=settings.project,
        name=settings.name or directory.resolve().name,
        group=settings.group,
        job_type="train",
        tags=settings.tags,
        id=run_id,
        resume="allow",
        mode=mode,
        dir=str(directory),
        config={
            **public(config.model_dump()),
            "method": configuration.method_of(config),
            "setting": configuration.setting_of(config),
            "environment": _json(directory / "environment.json"),
        },
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=30,
            finish_timeout=settings.finish_seconds,
            finish_timeout_raises=True,
        ),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def follow(directory: Path, mode: Mode, code: int | None) -> None:
    """Send every record until the training process ends, or orders the end.

    Args:
        directory: The run directory.
        mode: The mode of W&B.
        code: The exit code of training, if training has ended already.
    """
    config = configuration.load(directory / "config.yaml", recorded=True)
    order = Order(config.wandb.finish_seconds, code)
    try:
        follower = Follower(directory, config, mode)
    except Exception as error:
        if mode == "offline":
            raise
        say(f"W&B cannot be reached, this run is recorded offline: {_first_line(error)}")
        order.again(directory, "offline")
    while not order.came.wait(1.0):
        follower.send()
    follower.finish(1 if order.exit_code is None else order.exit_code)


class Order:
    """The order to end, on standard input: `finish CODE`, or the end of the stream."""

    def __init__(self, seconds: float, code: int | None) -> None:
        self.came, self.exit_code, self.seconds = threading.Event(), code, seconds
        self.stdin = os.dup(0)  # not for what W&B starts
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        if self.exit_code is None:
            words = os.read(self.stdin, 100).split()  # one short line, or nothing
            self.exit_code = int(words[1]) if len(words) == 2 else 1
        self.came.set()
        threading.Event().wait(self.seconds + 3)
        say(f"W&B did not finish within {self.seconds:g} s")
        os.killpg(os.getpid(), signal.SIGKILL)  # this process leads a group, with W&B's service

    def again(self, directory: Path, mode: str) -> None:
        """Start this process again, because the service of W&B does not take a run twice."""
        code = [str(self.exit_code)] if self.came.is_set() else []
        os.dup2(self.stdin, 0)
        os.dup2(MESSAGES, 1)
        words = ["-m", "flatcal_dist.tracking.wandb_process", str(directory), mode, *code]
        os.execv(sys.executable, [sys.executable, *words])


def say(text: str) -> None:
    """Send a line to the training process, which shows it."""
    try:
        os.write(MESSAGES, (hide(text).replace("\n", " ") + "\n").encode())
    except OSError:  # it has ended
        print(text, file=sys.stderr)


def lines_sent(directory: Path) -> int:
    """Return how many lines of metrics.jsonl the logs of W&B hold. A report counts as one more."""
    steps = [row.get("_step", -1) for file in segments(directory) for row in history(file)]
    return max(steps, default=-1) + 1


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    # Signals to a whole job mean the training process, which tells us when it is over.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    MESSAGES = os.dup(1)  # whatever else is printed goes to the log
    os.dup2(2, 1)
    never_fail()
    try:
        mode: Mode = "online" if sys.argv[2] == "online" else "offline"
        follow(Path(sys.argv[1]), mode, int(sys.argv[3]) if sys.argv[3:] else None)
    except BaseException as error:
        say(f"W&B failed: {_first_line(error)}")
        print(hide(traceback.format_exc()), file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # handlers of W&B may wait for processes that have ended
