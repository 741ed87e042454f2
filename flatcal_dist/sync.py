"""`flatcal sync RUN...`: bring runs that were recorded offline to the W&B server.

A run has a log for each of its starts, which `wandb sync` sends in their order into one W&B run.
What no log holds, because W&B was killed or failed, is first written from metrics.jsonl.
"""

import fcntl
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flatcal_dist.training.sink import WandbSink
from flatcal_dist.training.wandb_files import segments
from flatcal_dist.training.wandb_process import lines_sent

SECONDS = 600.0  # that writing a log may take


def sync(directories: Sequence[Path], dry_run: bool = False) -> None:
    """Complete the logs of each run and send them. Raises ValueError, RuntimeError with the run."""
    for directory in directories:
        if not (directory / "config.yaml").exists():
            raise ValueError(f"{directory} is no run directory: it has no config.yaml")
        if _in_use(directory):
            raise ValueError(f"{directory} is in use by a job; sync it when that has ended")
    failed = []
    for directory in directories:
        if complete(directory):
            print(f"{directory}: a log was written of what W&B had missed")
        logs = [str(file.parent) for file in segments(directory)]
        if not logs:
            print(f"{directory}: nothing to send")
            continue
        words = ["--include-online", *(["--dry-run"] if dry_run else ["--yes"]), *logs]
        command = [sys.executable, "-m", "wandb", "sync", *words]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            failed.append(str(directory))
    if failed:
        raise RuntimeError(
            f"W&B did not take {', '.join(failed)}; see above. The logs are kept, the same command "
            "tries again"
        )


def complete(directory: Path) -> bool:
    """Write an offline log of the records that no log holds; whether there were any."""
    metrics, state = directory / "metrics.jsonl", directory / "state.json"
    phase = json.loads(state.read_text())["phase"] if state.exists() else None
    wanted = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    wanted += phase == "finished" and (directory / "report/metrics.json").exists()
    if lines_sent(directory) >= wanted:
        return False
    said = WandbSink(directory, "offline", SECONDS).finish(0 if phase == "finished" else 1)
    if said or lines_sent(directory) < wanted:
        raise RuntimeError(f"{directory}: {' '.join(said)}")
    return True


def _in_use(directory: Path) -> bool:
    try:
        with (directory / ".lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a file system without locks
        return False
    return False
