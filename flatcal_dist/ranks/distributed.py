"""Starting ranks with Accelerate, checking that they are those asked for, failing together."""

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

# After this long without an answer a collective fails, instead of waiting for a rank for ever.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)

# What gloo and NCCL say when the process at the other end is no more.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "Broken pipe",
)


class FailedTogether(RuntimeError):
    """Some rank could not go on; raised on every rank, with the first cause as its message."""


def start(
    engine: str,
    precision: str,
    world_size: int | None = None,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> Accelerator:
    """Join the other ranks, on the accelerator of the machine or on its CPU.

    Works under `accelerate launch`, torchrun, or alone (one process). Raises LaunchError when the
    launcher (or `world_size`) asked for another number of processes than is found here, or the
    launcher for another precision or engine, or where the launcher's variables make no sense.
    """
    preempted_code()  # a wrong variable is named now, and not when the run ends
    launch = launch_of(os.environ)
    print_warnings_plainly()
    # The new name that torch >= 2.13 asks for is one that Accelerate does not pass on yet.
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
    except (RuntimeError, ValueError, OSError) as error:  # torch's DistErrors are RuntimeErrors
        if misread := _misread(error):
            raise LaunchError(
                f"Accelerate does not start: {error}. It stands in the environment as "
                f"{', '.join(misread)}: mend it, or `unset {' '.join(misread)}`"
            ) from error
        if launch.world_size > 1:
            raise LaunchError(_not_joined(launch, error)) from error
        variables = sorted(name for name in os.environ if name.startswith("ACCELERATE_"))
        if not variables:
            raise
        raise LaunchError(
            f"Accelerate does not start: {error}. It reads {', '.join(variables)} from the "
            "environment: `unset` those that are left over"
        ) from error
    if accelerator.num_processes != launch.world_size:
        raise LaunchError(
            f"the launcher was asked for {launch.world_size} processes, but this one found itself "
            f"among {accelerator.num_processes}; check the launcher's configuration against "
            f"configs/accelerate/*_{engine}.yaml"
        )
    if world_size not in (None, accelerator.num_processes):
        raise LaunchError(
            f"run.world_size={world_size}, but {accelerator.num_processes} processes run; launch "
            "as many as the configuration wants, or set run.world_size=null"
        )
    return accelerator


def _misread(error: Exception) -> list[str]:
    """The variables whose value an error says is of a wrong kind, such as OMP_NUM_THREADS=4,2."""
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
    # We drive the engines ourselves: Accelerate is to start processes, and to wrap for DDP.
    for plugin in PLUGINS:
        os.environ.pop(plugin.switch, None)


def on_all_ranks(work: Callable[[], T]) -> T:
    """Do `work` on every rank; where it fails on one, raise FailedTogether with its cause on all.

    For work that ends on its own (reading, checking, building), never for work with collectives.
    """
    result, cause = None, ""
    try:
        result = work()
    except Exception as error:
        cause = describe(error)
    causes = gather_object([cause])
    for rank, text in enumerate(causes):
        if text:
            alone = len(causes) == 1 or all(other == text for other in causes)
            raise FailedTogether(text if alone else f"rank {rank}: {text}")
    return result


def said_by_rank_0(value: T) -> T:
    """The same on all ranks: what rank 0 passed. Called by all ranks."""
    return gather_object([value])[0]


def meant_for_people(error: BaseException) -> bool:
    """Whether its message says what is wrong and how to mend it: then a traceback adds nothing."""
    return type(error).__module__.startswith("flatcal_dist")


def describe(error: BaseException) -> str:
    """The message of an error meant for people as it is; any other with the name of its type."""
    if isinstance(error, KeyboardInterrupt):
        by = str(error) or "SIGINT"  # Python's own handler does not say
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

    1, or 75 for an interruption.

    The launcher and the closed connections then end the other ranks, whose own errors come after:
    they name the first cause, which the run directory keeps.
    """
    try:
        yield
        accelerator.end_training()
    except (Exception, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if interrupted:
            ignore_signals()
            if directory and directory.entered:
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
    """Say why, first of all what failed first, and exit at once. From any thread.

    agreed: all ranks end for this cause, so that one says it.
    """
    first = cause
    if directory and directory.entered:
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
    # No orderly shutdown: it would wait for ranks that may be waiting for this one.
    os._exit(code)
