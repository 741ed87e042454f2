"""`flatcal status RUN ...`: what runs do, from what they write and from the queue of SLURM."""

import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from pydantic import ValidationError
from rich.cells import cell_len
from rich.console import Console

from flatcal_dist.config.checking.older import translate_older
from flatcal_dist.config.files import read_layers
from flatcal_dist.config.sections import TrainConfig
from flatcal_dist.runs.directory import RunDirectory, RunError, in_words
from flatcal_dist.tracking.tracker import read_metrics


@dataclass(frozen=True)
class Status:
    """The status of one run.

    Attributes:
        run: The run directory.
        phase: The phase of the run, or: submitted; not begun; dead, if it was killed before it
            could record that; unreadable, for a directory that is damaged or of no run.
        step: How many steps are done.
        total_steps: The number of steps of the run, if it is known.
        restarts: How often it was started again.
        where: The nodes or the host.
        job: The number of the job in SLURM.
        queue: What SLURM says about the job; None if it is not queued.
        seconds_left: The time left at the speed of the run so far, with pauses between steps.
        quiet_seconds: The time since the run last wrote.
        loss: The last training loss.
        val: The last value of each val/ metric.
        cause: Why the run failed or stopped, or cannot be read.
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
    """Return the status of each run, also of one that is submitted and has not begun."""
    queue = _queue()
    return [_readable(RunDirectory(run), queue) for run in runs]


def _readable(directory: RunDirectory, queue: dict[str, tuple[str, str]]) -> Status:
    """Return the status of one run. A run that cannot be read does not hide the others."""
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
    """Whether it is known that nobody uses the directory. Locks may not reach other hosts."""
    here = directory.holder().startswith(f"host {socket.gethostname()},")
    return queued is None and here and directory.in_use() is None


def _total_steps(directory: RunDirectory, last: dict[str, float]) -> int | None:
    """Return the number of steps of the whole run, or None if it is not known yet.

    The number of steps in an epoch follows from the last record, which names both. Only the section
    `train` is validated: the others need torch, whose import takes seconds.
    """
    layers = read_layers([directory.config_file], (), recorded=True)
    translate_older(layers.values)
    try:
        train = TrainConfig.model_validate(layers.values.get("train", {}))
    except ValidationError as error:
        raise RunError(f"{directory.config_file}: the section train: {in_words(error)}") from None
    if train.max_steps:
        return train.max_steps
    epoch, step = last.get("epoch"), last.get("step")
    return round(train.epochs * step / epoch) if epoch and step else None


def _queue() -> dict[str, tuple[str, str]]:
    """Return state and nodes of queued jobs by number. Without SLURM there are none."""
    if shutil.which("squeue") is None:
        return {}
    words = ["squeue", "--noheader", "--array", "--format=%i|%T|%N|%r"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return {}
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        if line.count("|") < 3:  # some sites print a greeting
            continue
        number, state, nodes, reason = line.strip().split("|", 3)
        waiting = f" ({reason})" if state == "PENDING" and reason != "None" else ""
        found[number] = (state.lower() + waiting, nodes)
    return found


ALWAYS = ("run", "phase", "step")
IMPORTANCE = ("job", "left", "loss", "wrote", "restarts", "where", "val")  # shown if there is room
BETWEEN = 2  # blanks


def print_status(found: Sequence[Status], console: Console) -> None:
    """Print one line for each run, with the columns that have room. No value is cut or split."""
    rows = [_row(one) for one in found]
    told = [name for name in IMPORTANCE if any(row[name] for row in rows)]
    chosen = list(ALWAYS)
    for name in told:
        widths = _widths(rows, [*chosen, name])
        if sum(widths.values()) + BETWEEN * len(chosen) <= console.width:
            chosen.append(name)
    columns = [name for name in rows[0] if name in chosen]
    left_out = [name for name in told if name not in chosen]
    widths = _widths(rows, columns)
    # If even these have no room, the terminal breaks the line, which can still be copied.
    for row in ({name: name for name in columns}, *rows):
        cells = (row[name] + " " * (widths[name] - cell_len(row[name])) for name in columns)
        line = (" " * BETWEEN).join(cells).rstrip()
        style = "bold" if row not in rows else ""
        console.print(line, markup=False, highlight=False, soft_wrap=True, style=style)
    if left_out:
        console.print(f"(no room for: {', '.join(left_out)}; --json shows all)", soft_wrap=True)
    for one in found:
        if one.cause:
            text = "\n".join(map(_plain, f"{one.run}: {one.cause}".splitlines()))
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Return a text without what would move the cursor of a terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _row(one: Status) -> dict[str, str]:
    shown = ("val/accuracy", "val/nll", "val/ece")
    val = [f"{key[4:]} {one.val[key]:.4f}" for key in shown if one.val and key in one.val]
    row = {
        "run": one.run,
        "phase": one.phase,
        "job": f"{one.job} {one.queue or 'not queued'}" if one.job else "",
        "where": one.where,
        "step": f"{one.step}/{one.total_steps or '?'}",
        "left": "" if one.seconds_left is None else _time(one.seconds_left),
        "wrote": f"{_time(one.quiet_seconds)} ago" if one.phase == "running" else "",
        "restarts": str(one.restarts or ""),
        "loss": "" if one.loss is None else f"{one.loss:.4f}",
        "val": ", ".join(val),
    }
    return {name: _plain(text) for name, text in row.items()}


def _widths(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> dict[str, int]:
    """Return the width of each column in cells of the terminal."""
    return {
        name: max(cell_len(text) for text in (name, *(row[name] for row in rows)))
        for name in columns
    }


def _time(seconds: float) -> str:
    try:
        return str(timedelta(seconds=round(seconds)))
    except OverflowError:
        return "for ever"
