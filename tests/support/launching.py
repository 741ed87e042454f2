"""Start the real recipes as a user does, and read what they leave behind."""

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import torch
from accelerate.commands.launch import launch_command, launch_command_parser

from tests.support.quick_reports import be_quick
from tests.support.ranks import FORKING, free_port

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 180  # seconds; a job that hangs fails the test


def command(
    recipe: str, *arguments: str, processes: int = 2, launcher: str = "cpu_ddp"
) -> list[str]:
    """`accelerate launch ... recipes/RECIPE.py`, or plain Python for one process."""
    script = [str(ROOT / f"recipes/{recipe}.py"), *map(str, arguments)]
    if processes == 1:
        return [sys.executable, *script]
    config = ROOT / f"configs/accelerate/{launcher}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launch, "--num_processes", str(processes), *script]


def launch(
    recipe: str,
    *arguments: str,
    processes: int = 2,
    launcher: str = "cpu_ddp",
    cwd: Path | None = None,
    through_accelerate: bool = False,
    whole_report: bool = False,
) -> subprocess.CompletedProcess:
    """Run to the end; the completed process, standard error joined to standard output.

    The ranks are forked from the server of tests.support.ranks, with the environment that
    Accelerate makes of its configuration: they are what `accelerate launch` starts, without its
    seconds of imports. Their reports are quick ones, without figures (`quick_reports`), unless
    whole_report. through_accelerate: by that command itself, and as it is.
    """
    words = command(recipe, *arguments, processes=processes, launcher=launcher)
    if through_accelerate:
        return run(words, cwd)
    environments: list[dict[str, str]] = [{}]
    if processes > 1:
        environments = _as_launched(ROOT / f"configs/accelerate/{launcher}.yaml", processes)
    path = ROOT / f"recipes/{recipe}.py"
    code, text = _forked(path, arguments, environments, cwd, quick=not whole_report)
    return subprocess.CompletedProcess(words, code if processes == 1 else min(abs(code), 1), text)


def script(
    path: Path, *arguments: object, cwd: Path | None = None, seconds: float = TIMEOUT
) -> subprocess.CompletedProcess:
    """Run `python PATH ARGUMENTS` as `launch` runs one process of a recipe."""
    code, text = _forked(path, list(map(str, arguments)), [{}], cwd, seconds)
    return subprocess.CompletedProcess([str(path), *map(str, arguments)], code, text)


def flatcal(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run `flatcal ARGUMENTS` in the same way."""
    return script(ROOT / "flatcal_dist/cli/__main__.py", *arguments, cwd=cwd)


def _forked(
    path: Path,
    arguments: Sequence[str],
    environments: list[dict[str, str]],
    cwd: Path | None,
    seconds: float = TIMEOUT,
    quick: bool = True,
) -> tuple[int, str]:
    """The exit code and the output of a script in processes with these environments."""
    call = str(path), list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        ranks = [
            FORKING.Process(
                target=_as_script, args=(*call, _environment() | own, output, cwd, quick)
            )
            for own in environments
        ]
        for rank in ranks:
            rank.start()
        code = _end_of(ranks, seconds)
        return code, output.read_text(errors="replace")


def _as_launched(config: Path, processes: int) -> list[dict[str, str]]:
    """The environment of each rank under `accelerate launch --config_file CONFIG`.

    Accelerate's launcher runs up to where it calls torchrun, whose variables are added here.
    """
    words = ["--config_file", str(config), "--num_processes", str(processes), "script.py"]
    environment: dict[str, str] = {}
    with mock.patch("torch.distributed.run.run") as torchrun:
        torchrun.side_effect = lambda _: environment.update(os.environ)
        launch_command(launch_command_parser().parse_args(words))
    port, count = str(free_port()), str(processes)
    return [
        environment
        | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        | {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        for rank in range(processes)
    ]


def _as_script(
    script: str,
    arguments: list[str],
    environment: dict[str, str],
    output: Path,
    cwd: Path | None,
    quick: bool,
) -> None:
    """In a forked process: what Python does with `python SCRIPT ARGUMENTS`."""
    os.environ.clear()
    os.environ.update(environment)
    if cwd:
        os.chdir(cwd)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    torch.set_num_threads(1)
    if quick:
        be_quick()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _end_of(ranks: list[BaseProcess], seconds: float) -> int:
    """The first exit code that is not 0, after which the others are ended, as torchrun does."""
    deadline = time.monotonic() + seconds
    try:
        running = list(ranks)
        while running:
            left = deadline - time.monotonic()
            assert wait([rank.sentinel for rank in running], left), "a job that hangs"
            for rank in [rank for rank in running if not rank.is_alive()]:
                running.remove(rank)
                if rank.exitcode:
                    for other in running:
                        other.terminate()
                        other.join(30)
                    return rank.exitcode
        return 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(words: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        words,
        cwd=cwd,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=TIMEOUT,
    )


def interrupt(words: list[str], when: Callable[[], bool]) -> tuple[int, str]:
    """Start, press Ctrl-C (SIGINT to the whole group) once `when()` holds; exit code and output."""
    process = subprocess.Popen(
        words,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + TIMEOUT
    while not when():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the moment to interrupt never came"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, output


def digits(method: str, run: Path, data: Path, *overrides: str) -> list[str]:
    """Arguments of a digits run of a few steps without evaluation; overrides come last, and win."""
    return [
        "--config",
        str(ROOT / f"configs/digits/{method}.yaml"),
        f"run.dir={run}",
        f"data.train={data}",
        f"data.validation={data}",
        "evaluate.at_end=false",
        "train.validate_every_epochs=null",
        "wandb.mode=disabled",
        *overrides,
    ]
