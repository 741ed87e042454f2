"""The runs of a study on this machine: started, counted, stopped, and gone on with."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flatcal_dist import config as configuration
from flatcal_dist.errors import ConfigError
from flatcal_dist.ranks.signals import SIGNALS
from flatcal_dist.runs.directory import RunDirectory, RunError
from flatcal_dist.studies.elements import Element
from flatcal_dist.studies.file import Study
from flatcal_dist.urls import hide

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds that a run may take to write a checkpoint and stop


@dataclass(frozen=True)
class How:
    """How runs are started.

    Attributes:
        processes: The ranks of a run.
        parallel: How many runs there are at once.
        launcher: A file for accelerate. None takes CPU processes, or plain Python for one rank.
        show: Whether the output of the runs is printed here, and not kept in files.
        seconds: How long runs may take together before they are stopped. None: any time.
    """

    processes: int = 1
    parallel: int = 1
    launcher: Path | None = None
    show: bool = False
    seconds: float | None = None


class Jobs:
    """The runs that are running. A signal or the end of the time stops each of them once."""

    def __init__(self, study: Study, how: How) -> None:
        self.study, self.how = study, how
        self.running: dict[subprocess.Popen, Element] = {}
        self.evaluated: set[str] = set()  # by name: an evaluation is tried once
        self.failed: list[Element] = []
        self.stopping = self.out_of_time = False
        self.deadline = time.monotonic() + how.seconds if how.seconds is not None else None

    def run(self, waiting: Sequence[Element]) -> None:
        """Train and evaluate all of them, as many at once as `how` says."""
        kept = {number: signal.signal(number, self._interrupted) for number in SIGNALS}
        try:
            self._run(list(waiting))
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _run(self, left: list[Element]) -> None:
        while self.running or (left and not self.stopping):
            while left and not self.stopping and len(self.running) < self.how.parallel:
                element = left.pop(0)
                try:
                    self._start(element)
                except (OSError, RunError) as error:  # no room for its log, a damaged state.json
                    self.failed.append(element)
                    print(f"[{element.index}] {element.name}: not started: {error}", flush=True)
            time.sleep(0.2)
            left[:0] = self._collect()
            if self.deadline is not None and time.monotonic() > self.deadline and not self.stopping:
                self.out_of_time = True
                self._stop("the time is over")
            if self.stopping and time.monotonic() > self.killed_at:
                self._signal(signal.SIGKILL)

    def _start(self, element: Element) -> None:
        what = to_do(self.study, element)
        make = evaluation if what == "evaluate" else command
        words = make(self.study, element, self.how)
        note = ""
        if what == "evaluate":
            self.evaluated.add(element.name)
            note = " is evaluated"
        print(f"[{element.index}] {element.name}{note}", flush=True)
        log = logs(element)
        log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            output = None if self.how.show else stack.enter_context(log.open("a"))
            print(f"$ {hide(shlex.join(words))}", file=output, flush=True)
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=surroundings(),
                start_new_session=True,  # signals are passed on, once
            )
        self.running[process] = element
        if self.stopping:  # the signal came while it was being started
            self._signal(signal.SIGINT)

    def _collect(self) -> list[Element]:
        """Take out the runs that have ended, and return those that are to be evaluated now."""
        trained = []
        for process in [process for process in self.running if process.poll() is not None]:
            element = self.running.pop(process)
            unevaluated = False
            try:
                phase = phase_of(element)
                unevaluated = to_do(self.study, element) == "evaluate"
            except RunError as error:  # the others go on
                phase = f"unreadable: {error}"
            text = f"[{element.index}] {element.name}: {phase}"
            again = unevaluated and element.name in self.evaluated
            if (phase != "finished" or process.returncode or again) and not self.stopping:
                self.failed.append(element)
                text += f" (exit code {process.returncode})"
                text += ", but its evaluation wrote no shift.json" if again else ""
                text += ", see above" if self.how.show else f", see {logs(element)}"
            elif unevaluated:
                trained.append(element)
            print(text, flush=True)
        return trained

    def _interrupted(self, *_: object) -> None:
        if not self.stopping:
            self._stop("stopping")

    def _stop(self, why: str) -> None:
        self.stopping, self.killed_at = True, time.monotonic() + PATIENCE
        text = f"{why}: running runs save a checkpoint; the same command goes on\n"
        with contextlib.suppress(OSError):
            os.write(1, text.encode())
        self._signal(signal.SIGINT)

    def _signal(self, number: int) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, number)


def refuse_other_runs(found: Sequence[Element]) -> None:
    """Raise RunError if a directory holds the run of another configuration than the study's."""
    for element in found:
        file = RunDirectory(element.run).config_file
        try:
            old = configuration.load(file, recorded=True) if file.is_file() else element.config
        except ConfigError:  # damaged: the run itself says so when it starts
            continue
        if different := configuration.differences(old, element.config):
            raise RunError(
                f"{element.run} holds a run of another configuration than the study's:\n  "
                + "\n  ".join(different)
                + "\nName another place with --directory, or move this run away to make it again"
            )


def to_do(study: Study, element: Element) -> Literal["train", "evaluate"] | None:
    """Return what is missing of a run. Raises RunError if its state.json is damaged."""
    if phase_of(element) != "finished":
        return "train"
    evaluated = (RunDirectory(element.run).report / "shift.json").is_file()
    return "evaluate" if study.evaluate and not evaluated else None


def command(study: Study, element: Element, how: How) -> list[str]:
    """Return the command that a user would type for a run."""
    options = ["--config", study.base, *element.arguments]
    if any(hide(word) != word for word in options):
        # Everybody on the machine can read the words of a command.
        configuration.write(element.config, logs(element).with_suffix(".yaml"))
        options = ["--config", str(logs(element).with_suffix(".yaml"))]
    return launched("imagenet_csam", options, element, how)


def evaluation(study: Study, element: Element, how: How) -> list[str]:
    """Return the command that evaluates a run as the study says."""
    return launched("evaluate", [str(element.run), *study.evaluate], element, how)


def launched(name: str, options: list[str], element: Element, how: How) -> list[str]:
    """Return the command that starts a recipe on the ranks of a run."""
    recipe = [str(ROOT / f"recipes/{name}.py"), *options]
    if how.processes == 1 and how.launcher is None:
        return [sys.executable, *recipe]
    engine = element.config.train.engine
    launcher = how.launcher or ROOT / f"configs/accelerate/cpu_{engine}.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(launcher)]
    # Each run needs another port, because several run at once.
    ports = ["--main_process_port", "0"]
    return [sys.executable, *launch, "--num_processes", str(how.processes), *ports, *recipe]


def surroundings() -> dict[str, str]:
    """Return the environment of a run: one thread a rank, unless the user says otherwise."""
    return os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def phase_of(element: Element) -> str:
    """Return the phase in state.json, or "new". Raises RunError if that file is damaged."""
    state = RunDirectory(element.run).state()
    return state.phase if state is not None else "new"


def logs(element: Element) -> Path:
    """Return the log of a run. It lies beside the run directories, which a recipe creates."""
    return element.run.parent / "logs" / f"{element.name}.log"
