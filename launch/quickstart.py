"""Digits, SGD against SAM against CSAM, from shards to a comparison. Called by quickstart.sh.

Each part is a command that a user would type; it is printed, run unless its result is there, and
timed. DIR gets data/, runs/METHOD-seedN/, comparison/ and seconds.json.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this code, wherever another copy is installed

from flatcal_dist.config.files import as_override  # noqa: E402
from flatcal_dist.printing import never_fail  # noqa: E402

METHODS = {"sgd": "SGD", "sam": "SAM", "csam": "CSAM"}
COLUMNS = ("accuracy", "nll", "ece", "signed_gap", "aurc", "seconds")


def main() -> None:
    never_fail()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT / "quickstart")
    parser.add_argument("--seeds", type=int, default=1, help="networks per method")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--installation-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    seconds = Seconds(directory / "seconds.json")
    if arguments.installation_seconds > 1:
        seconds.record("installation", arguments.installation_seconds)

    data = directory / "data/digits"
    if not data.exists():
        seconds.run("shards", ["flatcal", "shard", "digits", str(data)])
    runs = {}
    for seed in range(arguments.seeds):
        for method in METHODS:
            run = runs[method, seed] = directory / f"runs/{method}-seed{seed}"
            if not is_finished(run):
                command = training_command(method, seed, run, data, arguments.processes)
                seconds.run(f"{method}-seed{seed}", command)
    comparison = directory / "comparison"
    if not is_newer(comparison / "index.html", runs.values()):
        names = [str(run) for run in runs.values()]
        seconds.run("comparison", ["flatcal", "compare", *names, "--output", str(comparison)])
    print_table(runs)
    print(f"\nreports:    {directory}/runs/*/report/index.html")
    print(f"comparison: {comparison}/index.html")


class Seconds:
    """Seconds of each part, kept in a small JSON; a part that runs again replaces its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts = json.loads(path.read_text()) if path.exists() else {}

    def run(self, part: str, command: Sequence[str]) -> None:
        print(f"\n$ {shlex.join(command)}", flush=True)
        started = time.monotonic()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if done.returncode:
            sys.exit(f"error: the part '{part}' ended with exit code {done.returncode}; see above")
        self.record(part, time.monotonic() - started)

    def record(self, part: str, seconds: float) -> None:
        self.parts[part] = round(seconds, 1)
        self.path.write_text(json.dumps(self.parts, indent=1) + "\n")


def training_command(method: str, seed: int, run: Path, data: Path, processes: int) -> list[str]:
    return [
        "accelerate", "launch", "--config_file", "configs/accelerate/cpu_ddp.yaml",
        "--num_processes", str(processes), f"recipes/imagenet_{method}.py",
        "--config", f"configs/digits/{method}.yaml", as_override("run.dir", str(run)),
        f"run.seed={seed}", f"run.world_size={processes}", as_override("data.train", str(data)),
        as_override("data.validation", str(data)),
        "train.log_every_steps=180",
    ]  # fmt: skip


def is_finished(run: Path) -> bool:
    state = run / "state.json"
    return state.exists() and json.loads(state.read_text())["phase"] == "finished"


def is_newer(page: Path, runs: Sequence[Path]) -> bool:
    """Whether the page was written after the last of these reports, and of just these runs."""
    listed = page.parent / "comparison.csv"
    if not page.exists() or not listed.exists():
        return False
    written = page.stat().st_mtime
    known = len(listed.read_text().splitlines()) - 1
    reports = [run / "report/metrics.json" for run in runs]
    return known == len(reports) and all(file.stat().st_mtime < written for file in reports)


def print_table(runs: dict[tuple[str, int], Path]) -> None:
    rows: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for (method, _), run in runs.items():
        metrics = json.loads((run / "report/metrics.json").read_text())
        metrics["seconds"] = metrics["about"]["training_seconds"]
        rows[method].append([metrics[column] for column in COLUMNS])
    print("\nmethod   accuracy      NLL       ECE       signed gap    AURC      seconds")
    for method, values in rows.items():
        cells = [_cell(column) for column in zip(*values, strict=True)]
        print(f"{METHODS[method]:<8} " + " ".join(f"{cell:<13}" for cell in cells))
    if len(rows["sgd"]) > 1:
        print(f"(mean and standard deviation over {len(rows['sgd'])} seeds)")


def _cell(values: Sequence[float]) -> str:
    digits = 1 if max(values) > 10 else 4
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text}±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


if __name__ == "__main__":
    main()
