"""`flatcal sync RUN...` sends runs that were recorded offline to the W&B server.

A run has a log for each of its starts. `wandb sync` sends the logs in their order into one W&B run.
If W&B was killed or failed, the missing records are first written from metrics.jsonl.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flatcal_dist.files import read_bytes
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.tracking.wandb_files import history, segments
from flatcal_dist.tracking.wandb_process import Lines, lines_sent
from flatcal_dist.tracking.wandb_sink import WandbSink

SECONDS = 600.0  # the longest time to write a log


def sync(directories: Sequence[Path], dry_run: bool = False, minutes: float = 30.0) -> None:
    """Complete the logs of each run, and send them.

    Args:
        directories: The run directories.
        dry_run: Whether to say only what would be sent.
        minutes: How long sending one run may take.

    Raises:
        ValueError: A directory is no run directory, or is in use.
        RuntimeError: Some runs were not sent; the message names them.
    """
    for directory in directories:
        if not (directory / "config.yaml").exists():
            raise ValueError(f"{directory} is no run directory: it has no config.yaml")
        if holder := RunDirectory(directory).in_use():
            raise ValueError(f"{directory} is in use ({holder}); sync it when that has ended")
    failed = []
    for directory in directories:
        try:
            sent = _sync(directory, dry_run, minutes)
        except (OSError, ValueError, RuntimeError) as error:  # the others are sent all the same
            print(f"{directory}: {error}", file=sys.stderr)
            sent = False
        if not sent:
            failed.append(str(directory))
    if failed:
        raise RuntimeError(
            f"W&B did not take {', '.join(failed)}; see above. The logs are kept, the same command "
            "tries again"
        )


def _sync(directory: Path, dry_run: bool, minutes: float) -> bool:
    """Send one run. Return whether all of it is sent, or would be."""
    if lost := lines_lost(directory):
        print(
            f"{directory}: {lost} records before the last one sent stand in no log that can be "
            f"read. If W&B lacks them, move {directory / 'wandb'} aside and sync again: all is "
            "then written again from metrics.jsonl",
            file=sys.stderr,
        )
    missing = lines_wanted(directory) - lines_sent(directory)
    if dry_run:
        there = "".join(f"\n  {file}" for file in segments(directory))
        print(f"{directory}: {max(missing, 0)} records to write into a new log first{there}")
        return True
    if missing > 0:
        complete(directory)
        print(f"{directory}: wrote a log of {missing} records that W&B had missed")
    logs = [str(file.parent) for file in segments(directory)]
    if not logs:
        print(f"{directory}: nothing to send")
        return True
    command = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online", *logs]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        print(f"{directory}: not sent within {minutes:g} minutes (--minutes)", file=sys.stderr)
        return False
    return done.returncode == 0


def lines_wanted(directory: Path) -> int:
    """Return how many records there are for W&B. The report of a finished run counts as one."""
    metrics = directory / "metrics.jsonl"
    lines = read_bytes(metrics, limit=None).count(b"\n") if metrics.exists() else 0
    return lines + (
        _phase(directory) == "finished" and (directory / "report/metrics.json").exists()
    )


def lines_lost(directory: Path) -> int:
    """Return how many records are missing between those in the logs: a log is damaged or removed.

    They cannot be added, because W&B takes no row that lies before its last one.
    """
    held = {row.get("_step", -1) for log in segments(directory) for row in history(log)}
    lines = Lines(directory / "metrics.jsonl").new()
    return sum(number not in held for number, _ in lines if number < max(held, default=-1))


def complete(directory: Path) -> None:
    """Write an offline log of the records that no log holds. Raises RuntimeError if W&B fails."""
    code = 0 if _phase(directory) == "finished" else 1
    said = WandbSink(directory, "offline", SECONDS).finish(code)
    if said or lines_sent(directory) < lines_wanted(directory):
        raise RuntimeError(f"{directory}: W&B's log is not complete: {' '.join(said)}")


def _phase(directory: Path) -> str | None:
    state = RunDirectory(directory).state()
    return None if state is None else state.phase
