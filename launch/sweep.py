"""Run a sweep on this machine, one run after another or several at a time, and compare the runs.

    python launch/sweep.py configs/studies/digits_sweep.yaml --processes 2 --parallel 1
    python launch/sweep.py FILE --list          # the runs, their state, their overrides
    python launch/sweep.py FILE train.epochs=5  # overrides of all runs
    python launch/sweep.py FILE --seeds 5       # seeds 0 to 4 in place of the file's

The same command again does what is missing. Finished runs are left out, and interrupted runs go on
from their checkpoints. Ctrl-C asks all running runs to stop at a whole step, and starts no other.
The output of each run is in DIRECTORY/logs; --show prints it here instead. The exit code is 1 if a
run failed.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this code, wherever another copy is installed

from flatcal_dist import config as configuration  # noqa: E402
from flatcal_dist.arguments import whole_number  # noqa: E402
from flatcal_dist.errors import ConfigError  # noqa: E402
from flatcal_dist.files import csv_text, read_json, write_text  # noqa: E402
from flatcal_dist.printing import never_fail  # noqa: E402
from flatcal_dist.runs.directory import RunDirectory, RunError  # noqa: E402
from flatcal_dist.runs.sweep import Element, Sweep, elements, load_sweep  # noqa: E402
from flatcal_dist.urls import hide  # noqa: E402

METRICS = ("accuracy", "nll", "ece", "signed_gap", "aurc", "temperature", "seconds")
SEED = "run.seed"
PATIENCE = 300.0  # seconds that a run may take to write a checkpoint and stop


class Jobs:
    """The runs that are running. A signal sets `stopping`, and is passed to each of them once."""

    def __init__(self, sweep: Sweep, arguments: argparse.Namespace) -> None:
        self.sweep, self.arguments = sweep, arguments
        self.running: dict[subprocess.Popen, Element] = {}
        self.failed: list[Element] = []
        self.stopping = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def run(self, waiting: list[Element]) -> None:
        """Run all of them, `--parallel` at a time. Returns when none is left."""
        waiting = list(waiting)
        while self.running or (waiting and not self.stopping):
            while waiting and not self.stopping and len(self.running) < self.arguments.parallel:
                element = waiting.pop(0)
                try:
                    self._start(element)
                except OSError as error:  # there may be no room for its log
                    self.failed.append(element)
                    print(f"[{element.index}] {element.name}: not started: {error}", flush=True)
            time.sleep(0.2)
            self._collect()
            if self.stopping and time.monotonic() > self.deadline:
                self._signal(signal.SIGKILL)

    def _start(self, element: Element) -> None:
        words = command(self.sweep, element, self.arguments)
        print(f"[{element.index}] {element.name}", flush=True)
        log = logs(element)
        log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            output = None if self.arguments.show else stack.enter_context(log.open("a"))
            print(f"$ {hide(shlex.join(words))}", file=output, flush=True)
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
                start_new_session=True,  # signals are passed on, once
            )
        self.running[process] = element
        if self.stopping:  # the signal came while it was being started
            self._signal(signal.SIGINT)

    def _collect(self) -> None:
        for process in [process for process in self.running if process.poll() is not None]:
            element = self.running.pop(process)
            try:
                phase = phase_of(element)
            except RunError as error:  # the others go on
                phase = f"unreadable: {error}"
            text = f"[{element.index}] {element.name}: {phase}"
            if phase != "finished" and not self.stopping:
                self.failed.append(element)
                text += f" (exit code {process.returncode})"
                text += ", see above" if self.arguments.show else f", see {logs(element)}"
            print(text, flush=True)

    def _stop(self, *_: object) -> None:
        if self.stopping:
            return
        self.stopping, self.deadline = True, time.monotonic() + PATIENCE
        with contextlib.suppress(OSError):
            os.write(1, b"stopping: running runs save a checkpoint; the same command goes on\n")
        self._signal(signal.SIGINT)

    def _signal(self, number: int) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, number)


def main() -> None:
    never_fail()
    arguments = _parser().parse_intermixed_args()
    try:
        sweep = _as_told(load_sweep(arguments.file), arguments)
        found = elements(sweep, arguments.overrides)
        phases = {element.index: phase_of(element) for element in found}
    except (ConfigError, RunError, OSError) as error:
        sys.exit(f"error: {error}")
    if arguments.list:
        for element in found:
            print(element.index, phases[element.index], hide(shlex.join(element.arguments)))
        return
    missing = [element for element in found if phases[element.index] != "finished"]
    print(f"sweep {sweep.name}: {len(found)} runs, {len(found) - len(missing)} finished already")
    jobs = Jobs(sweep, arguments)
    jobs.run(missing)
    if jobs.stopping:
        sys.exit(130)
    try:
        summarize(sweep, found)
    except (OSError, RunError) as error:
        sys.exit(f"error: {error}")
    if jobs.failed:
        sys.exit(f"error: {len(jobs.failed)} of {len(found)} runs did not finish")
    if len(found) > 1 and all(_metrics(element) for element in found):
        output = Path(sweep.directory) / "comparison"
        runs = [str(element.run) for element in found]
        words = ["-m", "flatcal_dist.cli", "compare", *runs, "--output", str(output)]
        environment = os.environ | {"PYTHONPATH": _path()}
        sys.exit(subprocess.run([sys.executable, *words], env=environment).returncode)


def _as_told(sweep: Sweep, arguments: argparse.Namespace) -> Sweep:
    """Return the sweep with the directory and the seeds of the command line."""
    changes: dict = {}
    if arguments.directory is not None:
        changes["directory"] = str(arguments.directory)
    if arguments.seeds is not None:
        changes["grid"] = {**sweep.grid, SEED: list(range(arguments.seeds))}
    return sweep.model_copy(update=changes)


def command(sweep: Sweep, element: Element, arguments: argparse.Namespace) -> list[str]:
    """Return the command that a user would type for a run.

    Args:
        sweep: The sweep.
        element: The run.
        arguments: The command line of this program.
    """
    options = ["--config", sweep.base, *element.arguments]
    if any(hide(word) != word for word in options):
        # Everybody on the machine can read the words of a command.
        configuration.write(element.config, logs(element).with_suffix(".yaml"))
        options = ["--config", str(logs(element).with_suffix(".yaml"))]
    recipe = [str(ROOT / "recipes/imagenet_csam.py"), *options]
    if arguments.processes == 1 and arguments.launcher is None:
        return [sys.executable, *recipe]
    engine = element.config.train.engine
    launcher = arguments.launcher or ROOT / f"configs/accelerate/cpu_{engine}.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(launcher)]
    # Each run needs another port, because several run at once.
    ports = ["--main_process_port", "0"]
    return [sys.executable, *launch, "--num_processes", str(arguments.processes), *ports, *recipe]


def phase_of(element: Element) -> str:
    """Return the phase in state.json, or "new". Raises RunError if that file is damaged."""
    state = RunDirectory(element.run).state()
    return state.phase if state is not None else "new"


def logs(element: Element) -> Path:
    """Return the log of a run. It lies beside the run directories, which a recipe creates."""
    return element.run.parent / "logs" / f"{element.name}.log"


def summarize(sweep: Sweep, found: list[Element]) -> None:
    """Print a table of what differs and of the results, and write it as DIRECTORY/summary.csv."""
    keys = list(found[0].point)
    rows = []
    for element in found:
        figures = _figures([_metrics(element) or {}])
        turned = (hide(str(value)) for value in element.point.values())
        rows.append([str(element.index), *turned, phase_of(element), *figures])
    header = ["run", *keys, "phase", *METRICS]
    _print(header, rows)
    if len({element.point.get(SEED) for element in found}) > 1:
        print("mean ± standard deviation over seeds:")
        _print(*_over_seeds(found))
    file = Path(sweep.directory) / "summary.csv"
    write_text(file, csv_text([header, *rows]))
    print(f"table: {file}")


def _over_seeds(found: list[Element]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table with one row for all runs that differ only in the seed."""
    groups: dict[str, list[Element]] = {}
    for element in found:
        values = {key: value for key, value in element.point.items() if key != SEED}
        groups.setdefault(json.dumps(values), []).append(element)
    rows = [
        [*(hide(str(value)) for value in json.loads(values).values()), str(len(members)),
         *_figures([_metrics(element) or {} for element in members])]
        for values, members in groups.items()
    ]  # fmt: skip
    return [*(key for key in found[0].point if key != SEED), "seeds", *METRICS], rows


def _figures(metrics: list[dict[str, float | None]]) -> list[str]:
    """Return each metric, or its mean and standard deviation, or "" if a run has none."""
    texts = []
    for name in METRICS:
        values = [one[name] for one in metrics if one.get(name) is not None]
        if len(values) < len(metrics):
            texts.append("")
            continue
        text = f"{statistics.mean(values):.4f}"
        texts.append(text if len(values) == 1 else f"{text}±{statistics.stdev(values):.4f}")
    return texts


def _print(header: list[str], rows: list[list[str]]) -> None:
    table = Table(*header)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _metrics(element: Element) -> dict | None:
    file = element.run / "report/metrics.json"
    try:
        if not file.exists():
            return None
        written = read_json(file)
        known = {name: written.get(name) for name in METRICS}
        known["seconds"] = written["about"]["training_seconds"]
        return {name: None if value is None else float(value) for name, value in known.items()}
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        print(f"{file} cannot be read ({error}); `flatcal evaluate` writes it again")
        return None


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE")
    add(
        "--parallel",
        type=whole_number(),
        default=1,
        metavar="N",
        help="runs at a time",
    )
    add(
        "--processes",
        type=whole_number(),
        default=1,
        metavar="N",
        help="ranks of each run",
    )
    add("--launcher", type=Path, metavar="FILE",
        help="a file for accelerate, such as configs/accelerate/node_ddp.yaml; by default CPU "
        "processes, or plain Python for one rank")  # fmt: skip
    add(
        "--directory",
        type=Path,
        metavar="DIR",
        help="instead of the file's directory",
    )
    add(
        "--seeds",
        type=whole_number(),
        metavar="N",
        help="seeds 0 to N-1, instead of the file's",
    )
    add("--show", action="store_true", help="print the output of the runs on the terminal")
    add("--list", action="store_true", help="print the runs and start none")
    add("overrides", nargs="*", metavar="key.sub=value")
    return parser


if __name__ == "__main__":
    main()
