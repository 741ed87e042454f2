"""What runs are doing: `flatcal status RUN ...`, from what they write and from SLURM's queue."""

import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flatcal_dist import config as configuration
from flatcal_dist.run_directory import RunDirectory, RunError
from flatcal_dist.training.tracking import read_metrics


@dataclass(frozen=True)
class Status:
    """One run. `job`: its number in SLURM; `queue`: what SLURM says of it (None: not queued).

    `phase`: the run's, or: submitted, not begun; dead, if it was killed and could not say so;
    unreadable, for a directory that is no run's or is damaged (`cause` tells).
    `seconds_left` is what is left at the speed of the run so far, pauses between steps included;
    `quiet_seconds` since it last wrote. `val` holds the last value of each val/ metric.
    """

    run: str
    phase: str
    step: int = 0
    total_steps: int | None = None
    restarts: int = 0
    where: str = ""
    job: str | None = None
    queue: str | None = None
    seconds_left: float | None = None
    quiet_seconds: float = 0.0
    loss: float | None = None
    val: dict[str, float] | None = None
    cause: str | None = None


def status(runs: Sequence[Path]) -> list[Status]:
    """The status of each run, also of one that is submitted and has not begun."""
    queue = _queue()
    return [_readable(RunDirectory(run), queue) for run in runs]


def _readable(directory: RunDirectory, queue: dict[str, tuple[str, str]]) -> Status:
    """One that cannot be read does not hide the others."""
    try:
        return _status(directory, queue)
    except (RunError, OSError, ValueError, ArithmeticError, RecursionError) as error:
        text = "a file is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Status(str(directory.path), "unreadable", cause=text)


def _status(directory: RunDirectory, queue: dict[str, tuple[str, str]]) -> Status:
    path, state, job = directory.path, directory.state(), directory.job()
    if state is None and job is None:
        raise RunError(f"{path} is not a run directory: it has neither state.json nor slurm/job")
    queued, nodes = queue.get(job or "", (None, ""))
    if state is None:
        return Status(str(path), "submitted" if queued else "not begun", job=job, queue=queued)
    written = [path / "state.json"]
    last: dict[str, float] = {}
    if directory.metrics_file.exists():
        written.append(directory.metrics_file)
        for record in read_metrics(directory.metrics_file):
            last |= {key: value for key, value in record.items() if value is not None}
    total, left = _total_steps(directory, last), None
    if state.phase in ("running", "preempted") and total and state.step and state.seconds:
        left = state.seconds / state.step * (total - state.step)
    environment = directory.environment()
    slurm = environment.get("slurm")
    nodelist = slurm.get("SLURM_JOB_NODELIST") if isinstance(slurm, dict) else None
    return Status(
        str(path),
        "dead" if state.phase == "running" and _is_dead(directory, queued) else state.phase,
        state.step,
        total,
        state.restarts,
        nodes or str(nodelist or environment.get("host", "")),
        job,
        queued,
        left,
        max(time.time() - max(file.stat().st_mtime for file in written), 0.0),
        last.get("train/loss"),
        {key: value for key, value in last.items() if key.startswith("val/")},
        state.cause,
    )


def _is_dead(directory: RunDirectory, queued: str | None) -> bool:
    """Whether nobody holds the directory, and that can be told: locks may not reach other hosts."""
    here = directory.holder().startswith(f"host {socket.gethostname()},")
    return queued is None and here and directory.in_use() is None


def _total_steps(directory: RunDirectory, last: dict[str, float]) -> int | None:
    """Of the whole run; steps of an epoch follow from the last record, which knows both."""
    train = configuration.load(directory.config_file).train
    if train.max_steps:
        return train.max_steps
    epoch, step = last.get("epoch"), last.get("step")
    return round(train.epochs * step / epoch) if epoch and step else None


def _queue() -> dict[str, tuple[str, str]]:
    """State and nodes of the jobs in the queue by number; none where there is no SLURM."""
    if shutil.which("squeue") is None:
        return {}
    words = ["squeue", "--noheader", "--array", "--format=%i|%T|%N|%r"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return {}
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        if line.count("|") < 3:  # a greeting of the site
            continue
        number, state, nodes, reason = line.strip().split("|", 3)
        waiting = f" ({reason})" if state == "PENDING" and reason != "None" else ""
        found[number] = (state.lower() + waiting, nodes)
    return found


def print_status(found: Sequence[Status], console: Console) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("run", "phase", "job", "where", "step", "left", "restarts", "loss", "val"):
        table.add_column(name, overflow="fold")
    for one in found:
        quiet = f", wrote {_time(one.quiet_seconds)} ago" if one.phase == "running" else ""
        shown = ("val/accuracy", "val/nll", "val/ece")
        val = [f"{key[4:]} {one.val[key]:.4f}" for key in shown if one.val and key in one.val]
        cells = (
            one.run,
            one.phase + quiet,
            f"{one.job} {one.queue or 'not queued'}" if one.job else "",
            one.where,
            f"{one.step}/{one.total_steps or '?'}",
            "" if one.seconds_left is None else _time(one.seconds_left),
            str(one.restarts),
            "" if one.loss is None else f"{one.loss:.4f}",
            ", ".join(val),
        )
        table.add_row(*(Text(_plain(cell)) for cell in cells))
    console.print(table)
    for one in found:
        if one.cause:
            text = "\n".join(map(_plain, f"{one.run}: {one.cause}".splitlines()))
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Without what would move the cursor of a terminal, or is no text at all."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _time(seconds: float) -> str:
    try:
        return str(timedelta(seconds=round(seconds)))
    except OverflowError:
        return "for ever"
