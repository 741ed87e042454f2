"""What a rank does before imports that take seconds: find its launcher, and report errors to it.

This module needs nothing but Python.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from flatcal_dist.urls import hide

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PREEMPTED = 75  # sysexits.h: a temporary failure, the same command goes on
FIRST_RANK_SECONDS = 2.0  # how long other ranks let rank 0 speak first
SUMMARY_LINES = 7  # the longest message in the summary of a launcher

# The launchers of MPI set these, and Accelerate reads them besides the usual variables.
MPI = ("OMPI_COMM_WORLD", "MV2_COMM_WORLD", "PMI")
MPI_ENDINGS = ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


class LaunchError(RuntimeError):
    """The processes that run are not those that were asked for."""


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together.

    Attributes:
        rank: The rank of this process.
        world_size: The number of processes.
        watched: Whether a launcher waits for this process, which then has to end with it.
    """

    rank: int = 0
    world_size: int = 1
    watched: bool = False


def launch_of(environment: Mapping[str, str]) -> Launch:
    """Return what the variables of launchers say, without those that an earlier launch left.

    A process is one of several ranks if RANK and WORLD_SIZE say so. Variables that are empty, or
    that name only one process, may be left over: the process then runs alone.

    Raises:
        LaunchError: A variable names several processes, but this one does not know its place
            among them, or a variable is no number.
    """
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    watched = bool(environment.get("TORCHELASTIC_RUN_ID"))
    if size is None or (size == 1 and not rank):
        _refuse_lost_process(environment)
        return Launch(watched=watched)
    if rank is None:
        if size == 1:
            return Launch(watched=watched)
        raise LaunchError(
            f"WORLD_SIZE={size} says that {size} processes were started, but RANK is not set. "
            "Start them with `accelerate launch` or torchrun, which set both; or `unset WORLD_SIZE`"
        )
    if rank >= size:
        raise LaunchError(
            f"RANK={rank} is not below WORLD_SIZE={size}: `unset RANK WORLD_SIZE` if they are left "
            "over, or check the launcher"
        )
    _number(environment, "LOCAL_RANK", required=f"RANK={rank} and WORLD_SIZE={size} need it")
    _number(environment, "LOCAL_WORLD_SIZE")
    _number(environment, "MASTER_PORT", required=f"WORLD_SIZE={size} needs it", most=65535)
    if not environment.get("MASTER_ADDR", "").strip():
        raise LaunchError(
            f"MASTER_ADDR is not set, and WORLD_SIZE={size} needs it: the address of rank 0. "
            "`unset WORLD_SIZE RANK` to run as one process"
        )
    return Launch(rank, size, watched=True)


def _number(
    environment: Mapping[str, str], name: str, required: str = "", most: int = 2**31
) -> int | None:
    text = environment.get(name, "").strip()
    if not text and not required:
        return None
    if not (text.isascii() and text.isdecimal() and int(text) <= most):
        why = f", and {required}" if required else ""
        raise LaunchError(
            f"{name}={text} in the environment is not a whole number from 0 to {most:,}{why}. "
            f"Launchers set it; `unset {name}` if it is left over"
        )
    return int(text)


def _refuse_lost_process(environment: Mapping[str, str]) -> None:
    """Raise LaunchError for one of several processes that would all run alone, in one directory."""
    counts = [f"{prefix}_SIZE" for prefix in MPI]
    if "SLURM_PROCID" in environment:  # a task of srun; a shell of salloc has no such count
        counts.append("SLURM_STEP_NUM_TASKS")
    for name in counts:
        text = environment.get(name, "").strip()
        if text.isascii() and text.isdecimal() and int(text) > 1:
            how = (
                "srun: export RANK=$SLURM_PROCID, LOCAL_RANK=$SLURM_LOCALID, WORLD_SIZE, "
                "MASTER_ADDR and MASTER_PORT in each task, as launch/submit.py does"
                if name.startswith("SLURM")
                else "MPI, which does not start ranks here: use `accelerate launch` or torchrun"
            )
            raise LaunchError(
                f"{name}={text} says that this process is one of {text} of {how}. "
                f"If it is left over, `unset {name}`"
            )


def settle(environment: dict[str, str] | os._Environ, launch: Launch) -> None:
    """Remove variables that would mislead the libraries which read them."""
    names = [f"{prefix}_{ending}" for prefix in MPI for ending in MPI_ENDINGS]
    names += ["MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
    if launch.world_size == 1:
        names += RANK_VARIABLES
    for name in names:
        environment.pop(name, None)


def rank_to_speak() -> int:
    """Return the rank of this process, or 0 if the variables make no sense: then each speaks."""
    try:
        return launch_of(os.environ).rank
    except LaunchError:
        return 0


def preempted_code() -> int:
    """Return the exit code of a run that was asked to stop: FLATCAL_EXIT_PREEMPTED, or 75.

    Raises:
        LaunchError: The variable is no exit code.
    """
    code = _number(os.environ, "FLATCAL_EXIT_PREEMPTED", most=255)
    return PREEMPTED if code is None else code


def end_with_the_launcher() -> None:
    """Let this rank get SIGTERM when the process that launched it ends. Linux only.

    An error that nothing else catches, such as one of an import, is reported to the launcher.
    """
    sys.excepthook = _uncaught
    try:
        if not launch_of(os.environ).watched:
            return  # a shell started it, which may end before it
    except LaunchError:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):  # ranks that have started end in other ways
        if rank_to_speak() == 0:
            print("interrupted before the work began: the same command begins it", file=sys.stderr)
    else:
        text = "".join(traceback.format_exception(kind, error, trace))
        print(hide(text), end="", file=sys.stderr)
        tell_launcher(f"{kind.__name__}: {error}")


def give_up(cause: str) -> NoReturn:
    """End a process that cannot begin, with a message.

    Ranks cannot agree yet on who speaks. Rank 0 speaks at once, and the launcher ends the others. A
    rank that alone has a message speaks a moment later.
    """
    rank, cause = rank_to_speak(), hide(cause)
    tell_launcher(cause if rank == 0 else f"rank {rank}: {cause}")
    if rank:
        time.sleep(FIRST_RANK_SECONDS)
    sys.exit(f"error on rank {rank}: {cause}" if rank else f"error: {cause}")


def tell_launcher(cause: str) -> None:
    """Write the cause to where the last lines of the launcher come from.

    torchrun, and `accelerate launch` with several processes, end with the `py_callstack` of this
    file. `accelerate launch` with one process ends with another traceback. A small process waits
    for it, and prints the cause once more.
    """
    lines = hide(cause).splitlines()
    if len(lines) > SUMMARY_LINES:
        lines = [*lines[: SUMMARY_LINES - 1], "(all of the message stands above)"]
    text = "\n".join(lines)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time())), "py_callstack": text}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
    elif "ACCELERATE_MIXED_PRECISION" in os.environ and rank_to_speak() == 0:
        program = Path(sys.argv[0]).name
        with contextlib.suppress(OSError):
            subprocess.Popen(
                [sys.executable, "-S", "-c", AFTERWARDS, str(os.getppid()), f"{program}: {text}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )


AFTERWARDS = """
import os, sys, time
for _ in range(300):
    try:
        os.kill(int(sys.argv[1]), 0)
    except OSError:
        break
    time.sleep(0.1)
try:
    print(sys.argv[2], file=sys.stderr, flush=True)
except OSError:
    pass
"""
