"""Start the real recipes as a user does, and read what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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
) -> subprocess.CompletedProcess:
    """Run to the end; the completed process, standard error joined to standard output."""
    return run(command(recipe, *arguments, processes=processes, launcher=launcher), cwd)


def run(words: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        words,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
