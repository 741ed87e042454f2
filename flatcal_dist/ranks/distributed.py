"""Ranks start with Accelerate, check that they are those that were asked for, and fail together."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
)

from flatcal_dist.ranks.launcher import (
    Launch,
    LaunchError,
    launch_of,
    preempted_code,
    settle,
    tell_launcher,
)
from flatcal_dist.ranks.signals import ignore_signals
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.sharpness.engines.registry import ENGINES, PLUGINS, launched_engine
from flatcal_dist.urls import hide
from flatcal_dist.warning_lines import print_warnings_plainly

T = TypeVar("T")

# A collective without an answer fails after this time, instead of waiting for ever.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)

# What gloo and NCCL say when the process at the other end has ended.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "Broken pipe",
)


class FailedTogether(RuntimeError):
    """Some rank could not go on. All ranks raise this, with the first cause as the message."""


def start(
    engine: str,
    precision: str,
    world_size: int | None = None,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> Accelerator:
    """Join the other ranks, on the accelerator of the machine or on its CPU.

    It works under `accelerate launch`, under torchrun, or alone as one process.

    Args:
        engine: The engine of the configuration.
        precision: The precision of the configuration.
        world_size: The number of ranks that the configuration asks for, if it does.
        timeout: How long a collective waits for other ranks.

    Raises:
        LaunchError: The launcher or `world_size` asked for another number of processes than run
            here, the launcher asked for another precision or engine, or its variables make no
            sense.
    """
    preempted_code()  # so that a wrong variable is named now, and not when the run ends
    launch = launch_of(os.environ)
    print_warnings_plainly()
    # torch >= 2.13 asks for a new name, which Accelerate does not pass on yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    mixed = {"fp32": "no"}.get(precision, precision) if ENGINES[engine].autocasts else "no"
    _refuse_other_launch(engine, precision)
    settle(os.environ, launch)
    cpu = not torch.accelerator.is_available()
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=mixed,
            kwargs_handlers=[
                # Running statistics are broadcast before they are saved or used, not in each pass.
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, gradient_as_bucket_view=True
                ),
                InitProcessGroupKwargs(timeout=timeout),
            ],
        )
    except (RuntimeError, ValueError, OSError) as error:  # DistErrors of torch are RuntimeErrors
        if (why := _not_started(launch, error)) is None:
            raise
        raise LaunchError(why) from error
    found = accelerator.num_processes
    if found != launch.world_size:
        raise LaunchError(
            f"the launcher was asked for {launch.world_size} processes, but this one found itself "
            f"among {found}; check the launcher's configuration against "
            f"configs/accelerate/*_{engine}.yaml"
        )
    if world_size not in (None, found):
        raise LaunchError(
            f"run.world_size={world_size}, but {found} processes run; launch as many as the "
            "configuration wants, or set run.world_size=null"
        )
    return accelerator


def _not_started(launch: Launch, error: Exception) -> str | None:
    """Return why Accelerate does not start and what to do, or None if the error says enough."""
    if misread := _misread(error):
        return (
            f"Accelerate does not start: {error}. It stands in the environment as "
            f"{', '.join(misread)}: mend it, or `unset {' '.join(misread)}`"
        )
    if launch.world_size > 1:
        return _not_joined(launch, error)
    variables = sorted(name for name in os.environ if name.startswith("ACCELERATE_"))
    if not variables:
        return None
    return (
        f"Accelerate does not start: {error}. It reads {', '.join(variables)} from the "
        "environment: `unset` those that are left over"
    )


def _misread(error: Exception) -> list[str]:
    """Return the variables whose value an error names, such as OMP_NUM_THREADS=4,2."""
    if not isinstance(error, ValueError):
        return []
    return sorted(name for name, value in os.environ.items() if value and repr(value) in str(error))


def _not_joined(launch: Launch, error: Exception) -> str:
    where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
    return (
        f"this process is rank {launch.rank} of {launch.world_size} by its environment, and did "
        f"not find the others at {where} (MASTER_ADDR and MASTER_PORT): "
        f"{type(error).__name__}: {str(error).splitlines()[0][:300]}. If nobody started the "
        "others, `unset RANK WORLD_SIZE LOCAL_RANK`; else look for their own errors"
    )


def _refuse_other_launch(engine: str, precision: str) -> None:
    under_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    # Accelerate's plain CPU launcher prepares a rendezvous for several processes and starts one.
    rendezvous = "MASTER_PORT" in os.environ and "MASTER_ADDR" in os.environ
    if under_accelerate and rendezvous and "RANK" not in os.environ:
        raise LaunchError(
            "`accelerate launch` was asked for several processes and started one (its --cpu and "
            f"MULTI_CPU need mpirun); use --config_file configs/accelerate/cpu_{engine}.yaml, with "
            "--num_processes N for another number. If you asked for one process, "
            "`unset MASTER_ADDR MASTER_PORT`, which are left over from an earlier launch"
        )
    mixed = {"fp32": "no"}.get(precision, precision)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", mixed):
        raise LaunchError(
            f"`accelerate launch` was asked for mixed precision '{launched}' "
            "(ACCELERATE_MIXED_PRECISION in the environment), the configuration "
            f"has '{mixed}'; drop it from the launcher, train.precision decides"
        )
    named = launched_engine(os.environ)
    if under_accelerate and "RANK" in os.environ and named is None:
        keys = {key for plugin in PLUGINS for key in (plugin.switch, plugin.key)}
        found = ", ".join(f"{key}={os.environ[key]}" for key in sorted(keys & set(os.environ)))
        raise LaunchError(
            f"`accelerate launch` was asked for a plugin that no engine here uses ({found}): "
            f"launch with configs/accelerate/*_{engine}.yaml"
        )
    if under_accelerate and "RANK" in os.environ and named != engine:
        raise LaunchError(
            f"`accelerate launch` was asked for {named}, the configuration has "
            f"train.engine={engine}: launch with configs/accelerate/*_{engine}.yaml, or set "
            f"train.engine={named}"
        )
    # This package drives the engines. Accelerate only starts processes, and wraps for DDP.
    for plugin in PLUGINS:
        os.environ.pop(plugin.switch, None)


def on_all_ranks(work: Callable[[], T]) -> T:
    """Do `work` on every rank. If it fails on one, raise FailedTogether with its cause on all.

    It is for work without collectives, such as reading, checking and building.
    """
    result: list[T] = []
    cause = ""
    try:
        result.append(work())
    except Exception as error:
        cause = describe(error) or type(error).__name__
    causes = gather_object([cause])
    for rank, text in enumerate(causes):
        if text:
            alone = len(causes) == 1 or all(other == text for other in causes)
            raise FailedTogether(text if alone else f"rank {rank}: {text}")
    return result[0]


def said_by_rank_0(value: T) -> T:
    """Return on all ranks what rank 0 passed. Called by all ranks."""
    return gather_object([value])[0]


def meant_for_people(error: BaseException) -> bool:
    """Whether the message of an error says what is wrong, so that a traceback adds nothing."""
    return type(error).__module__.startswith("flatcal_dist")


def describe(error: BaseException) -> str:
    """Return the message of an error, with its type unless the message is meant for people."""
    if isinstance(error, KeyboardInterrupt):
        by = str(error) or "SIGINT"  # the handler of Python does not say so
        return f"interrupted by {by}; the same command goes on"
    text = hide(str(error) if meant_for_people(error) else f"{type(error).__name__}: {error}")
    if any(sign in text for sign in LOST):
        text += (
            "\n(a connection was lost: another rank has ended. Its own error stands elsewhere in "
            "the log; one that the system killed, for want of memory say, leaves none)"
        )
    return text


@contextmanager
def ending_together(
    accelerator: Accelerator, directory: RunDirectory | None = None
) -> Iterator[None]:
    """Turn any error into a message and an exit code, at once, on the rank that has it.

    The code is 1, or 75 for an interruption. The launcher and the closed connections then end the
    other ranks. Their errors come later, and they name the first cause, which the run directory
    keeps.
    """
    try:
        yield
        accelerator.end_training()
    except (Exception, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if interrupted:
            ignore_signals()
            if directory:
                with suppress(OSError, RuntimeError):
                    directory.interrupt(str(error))
        elif not meant_for_people(error):
            print(hide(traceback.format_exc()), file=sys.stderr)
        end(
            describe(error),
            accelerator.process_index,
            None if interrupted else directory,
            agreed=isinstance(error, FailedTogether),
            code=preempted_code() if interrupted else 1,
        )


def end(
    cause: str,
    rank: int,
    directory: RunDirectory | None = None,
    agreed: bool = False,
    code: int = 1,
) -> NoReturn:
    """Print the cause and the first recorded one, and exit at once. Any thread may call this.

    Args:
        cause: Why this rank ends.
        rank: This rank.
        directory: The run directory, which records the failure.
        agreed: Whether all ranks end for this cause, so that only rank 0 prints it.
        code: The exit code.
    """
    first = cause
    if directory:
        with suppress(OSError, RuntimeError):  # a full disk must not hide what happened
            first = directory.fail(cause, rank)
    if not agreed:
        print(f"error on rank {rank}: {cause}", file=sys.stderr)
        if first != cause and not first.endswith(cause):
            was = "the first error was on" if first.startswith("rank ") else "the run was ended by"
            print(f"{was} {first}", file=sys.stderr)
    elif rank == 0:
        print(f"error: {cause}", file=sys.stderr)
    tell_launcher(first)
    sys.stderr.flush()
    sys.stdout.flush()
    # An orderly shutdown would wait for ranks that may be waiting for this one.
    os._exit(code)
