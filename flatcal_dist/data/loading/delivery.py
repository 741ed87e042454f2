"""Batches out of worker processes; and where none can come, the reason and the remedy.

Workers hand batches on in shared memory (/dev/shm) and by file descriptors. Where one of these runs
out, DataLoader's worker loses the batch in a background thread, and the run waits for ever. Here
such a worker ends, and the run with it: within seconds, with what the worker could not do.
"""

import os
import re
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing import queues
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch.utils.data import DataLoader, Dataset

from flatcal_dist.data.errors import DataError

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches that a worker holds ready, unless asked otherwise
GAVE_UP = 70  # exit code of a worker that cannot deliver


class Delivery(TypedDict, total=False):
    """What every loader passes on to `Batches`."""

    workers: int  # processes; 0: none
    prefetch: int  # batches that each worker holds ready
    pin_memory: bool
    multiprocessing_context: str | None  # how processes are started, None for the system's way


class Batches:
    """The batches of a DataLoader without collation; `requests` are what each is made of.

    A DataError that a worker returns is raised here as it was raised there. Iterating also raises
    DataError where a worker was killed or cannot deliver. requests: None for a stream, which makes
    its own batches. The rest: see `Delivery`.
    """

    def __init__(
        self,
        images: Dataset,
        requests: Any,
        *,
        workers: int = 0,
        prefetch: int = PREFETCH,
        pin_memory: bool = False,
        multiprocessing_context: str | None = None,
    ) -> None:
        self._workers, self._pinned = workers, pin_memory
        # Not a Queue: it has no background thread, and its pipe is open before anything runs out.
        self._causes = torch.multiprocessing.get_context(multiprocessing_context).SimpleQueue()
        self._loader = DataLoader(
            images,
            sampler=requests,
            batch_size=None,  # the sampler makes the batches
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=partial(start_worker, self._causes),
            multiprocessing_context=multiprocessing_context if workers else None,
            generator=torch.Generator(),  # else DataLoader draws from the process's random stream
        )

    def __len__(self) -> int:
        """Batches that one pass yields on this rank."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        iterator = None
        try:
            iterator = _quiet_iterator(self._loader)
            for batch in iterator:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            if not self._workers:
                raise
            raise DataError(self._in_words(error, iterator)) from error

    def _in_words(self, error: Exception, iterator: Any) -> str:
        causes = []
        while not self._causes.empty():
            causes.append(self._causes.get())
        codes = {worker.exitcode for worker in getattr(iterator, "_workers", [])}
        killed = [signal.Signals(-code).name for code in codes if code is not None and code < 0]
        cause = causes[0] if causes else f"{type(error).__name__}: {error}"
        if killed and not causes:
            cause = f"a worker was killed by {', '.join(killed)}"
        return f"A loader worker could not deliver a batch: {cause}. {_remedy(cause, killed)}"


def _as_it_is(batch: Any) -> Any:
    return batch


def _quiet_iterator(loader: DataLoader) -> Iterator[Any]:
    """An iterator of `loader` that reports dead workers when it is asked for a batch.

    DataLoader's handler of SIGCHLD would raise in whatever the main process does just then.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _remedy(cause: str, killed: list[str]) -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = f"A process may open {limit:,} files here (ulimit -n)"
    if re.search(r"open files|EMFILE|ancdata|Errno 24", cause):
        return (
            f"{files}, which is too few: raise the limit with `ulimit -n 4096`, or lower "
            "data.workers."
        )
    if re.search(r"shared memory|shm|mmap|No space left|Bus error", cause) or "SIGBUS" in killed:
        return f"{_room()} {MORE_ROOM}"
    if "SIGKILL" in killed:
        return (
            "Most often the system kills a process because memory has run out: lower data.workers, "
            f"or give the job more memory. {_room()}"
        )
    return f"Its own error stands further up. {files}. {_room()} {MORE_ROOM}"


MORE_ROOM = (
    "Give the container more of it (docker run --shm-size=8g, or --ipc=host; in Kubernetes an "
    "emptyDir of medium Memory at /dev/shm), or lower data.workers or data.micro_batch_size."
)


def needed_room(images: int, bytes_each: int, workers: int) -> int:
    """Bytes of shared memory that the batches of `images` take which `workers` hold ready.

    One more batch is on its way, and one in use.
    """
    return (workers * PREFETCH + 2) * images * bytes_each if workers else 0


def free_room() -> int | None:
    """Bytes of shared memory that are free; None on a system that keeps it elsewhere."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


def _room() -> str:
    free = free_room()
    if free is None:
        return ""
    total = shutil.disk_usage(SHARED_MEMORY).total
    return f"{SHARED_MEMORY} has {total / 2**20:,.1f} MiB, of which {free / 2**20:,.1f} are free."


def start_worker(causes: Any, number: int) -> None:
    """Workers leave signals to the main process, and end if they cannot deliver.

    Ctrl-C, a closed terminal and SLURM's preemption reach every process of a job; a worker that
    died of one would take the run with it before it could write its checkpoint. The main process
    itself ends its workers by SIGTERM, so that one is obeyed when it comes from there.

    causes: a SimpleQueue, which gets what a worker that ends could not do.
    """
    for received in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(received, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()

    def give_up(error: BaseException) -> None:
        causes.put(f"{type(error).__name__}: {error}"[:1000])
        os._exit(GAVE_UP)

    # The threads that pack batches and pass descriptors on print their errors and lose the batch.
    queues.Queue._on_queue_feeder_error = staticmethod(lambda error, _: give_up(error))
    threading.excepthook = lambda about: give_up(about.exc_value)
    sys.excepthook = lambda _, error, __: give_up(error)


def _end_with_the_main_process() -> None:
    # A handler is not told who sent a signal; waiting for it is. Ignoring SIGTERM altogether
    # would let a run that fails wait for its workers for ever. (The parent's own number is no
    # help: it is the fork server's where there is one.)
    main = torch.multiprocessing.parent_process()
    while main.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 5)
        if received is not None and received.si_pid == main.pid:
            break
    os._exit(0)
