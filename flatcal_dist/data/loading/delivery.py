"""Batches from worker processes, or the reason and the remedy where none can come.

Workers pass batches on in shared memory (/dev/shm) and by file descriptors. Where one of these runs
out, the worker of a DataLoader loses the batch in a background thread, and the run waits for ever.
Here such a worker ends instead. The run then ends within seconds and says what the worker could not
do.
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
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.loading.plan import PREFETCH, Workers

SHARED_MEMORY = Path("/dev/shm")
GAVE_UP = 70  # exit code of a worker that cannot deliver


class Batches:
    """The batches of a data set that makes one batch from each request.

    A DataError that a worker returns is raised here as it was raised there. Iterating also raises
    DataError where a worker was killed or cannot deliver.
    """

    def __init__(self, images: Dataset, requests: Any, workers: Workers) -> None:
        """Prepare the loader. No process is started before the first batch is asked for.

        Args:
            images: The data set, which returns whole batches, or a DataError instead of one.
            requests: What each batch is made of, in order; None for a stream, which makes its
                batches without being asked.
            workers: The processes that load.
        """
        self._workers = workers
        # Not a Queue: it has no background thread, and its pipe is open before anything runs out.
        self._causes = torch.multiprocessing.get_context(workers.context).SimpleQueue()
        self._loader = _loader(images, requests, workers, self._causes)

    def __len__(self) -> int:
        """Return the number of batches that one pass yields on this rank."""
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
            if not self._workers.count:
                raise
            raise DataError(self._in_words(error, iterator)) from error
        finally:
            del iterator  # so the workers end here, not when the last traceback is forgotten

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


def _loader(images: Dataset, requests: Any, workers: Workers, causes: Any) -> DataLoader:
    return DataLoader(
        images,
        sampler=requests,
        batch_size=None,  # the data set makes the batches
        collate_fn=_as_it_is,
        num_workers=workers.count,
        prefetch_factor=workers.prefetch if workers.count else None,
        pin_memory=workers.pin_memory,
        worker_init_fn=partial(start_worker, causes),
        multiprocessing_context=workers.context if workers.count else None,
        generator=torch.Generator(),  # else DataLoader draws from the process's random stream
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _quiet_iterator(loader: DataLoader) -> Iterator[Any]:
    """Return an iterator that reports dead workers only when it is asked for a batch.

    The handler of SIGCHLD that DataLoader installs would raise in any line of the main process.
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
    return f"The error of the worker stands further up. {files}. {_room()} {MORE_ROOM}"


MORE_ROOM = (
    "Give the container more of it (docker run --shm-size=8g, or --ipc=host; in Kubernetes an "
    "emptyDir of medium Memory at /dev/shm), or lower data.workers or data.micro_batch_size."
)


def needed_room(images: int, bytes_each: int, workers: int) -> int:
    """Return the bytes of shared memory that batches take while training runs.

    Each worker holds `PREFETCH` batches ready, one more batch is on its way, and one is in use.

    Args:
        images: The number of images in a batch.
        bytes_each: The bytes of one image with its label and number.
        workers: The number of worker processes.
    """
    return (workers * PREFETCH + 2) * images * bytes_each if workers else 0


def free_room() -> int | None:
    """Return the free bytes of shared memory, or None on a system that has no /dev/shm."""
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
    """Make a worker leave signals to the main process, and end if it cannot deliver.

    Ctrl-C, a closed terminal and the preemption of SLURM reach every process of a job. A worker
    that died of one would end the run before it could write its checkpoint. The main process ends
    its workers by SIGTERM, so a worker obeys this signal when the main process has sent it.

    Args:
        causes: A SimpleQueue, which gets the reason if this worker gives up.
        number: The number of the worker, which DataLoader passes.
    """
    for received in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(received, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()

    def give_up(error: BaseException) -> None:
        causes.put(f"{type(error).__name__}: {error}"[:1000])
        os._exit(GAVE_UP)

    # The threads that pack batches and pass descriptors on print their errors and lose the batch.
    setattr(queues.Queue, "_on_queue_feeder_error", staticmethod(lambda error, _: give_up(error)))  # noqa: B010
    threading.excepthook = lambda about: give_up(about.exc_value or about.exc_type())
    sys.excepthook = lambda _, error, __: give_up(error)


def _end_with_the_main_process() -> None:
    # A handler is not told who sent a signal; waiting for it is. Ignoring SIGTERM altogether
    # would let a run that fails wait for its workers for ever. (The parent's own number is no
    # help: it is the fork server's where there is one.)
    main = torch.multiprocessing.parent_process()
    if main is None:  # not a worker
        return
    while main.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 5)
        if received is not None and received.si_pid == main.pid:
            break
    os._exit(0)
