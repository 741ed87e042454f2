"""Tasks on several processes, with results in the order of their completion."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from flatcal_dist.data.errors import DataError


def in_parallel(
    function: Callable[..., Any], tasks: Iterable[tuple], workers: int
) -> Iterator[tuple[int, Any]]:
    """Yield (number of the task, function(*task)) in the order of completion.

    Tasks are taken as workers become free, so they may be made lazily. With one worker, this
    process does all the work. The first error is raised after the tasks that run then have ended.

    Args:
        function: It is called once for each task.
        tasks: The arguments of each call.
        workers: The number of processes.

    Raises:
        DataError: There is no worker, or a worker was killed (most often by the kernel, for its
            memory).
    """
    if workers < 1:
        raise DataError(f"{workers} workers cannot work: use 1 or more.")
    numbered = enumerate(tasks)
    if workers == 1:
        return ((number, function(*task)) for number, task in numbered)
    # Processes are forked here, at the call, before a progress bar starts its thread.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker)
    running = {
        pool.submit(function, *task): number
        for number, task in itertools.islice(numbered, 2 * workers)
    }
    return _results(pool, running, function, numbered, workers)


def _results(
    pool: ProcessPoolExecutor,
    running: dict[Future, int],
    function: Callable[..., Any],
    numbered: Iterator[tuple[int, tuple]],
    workers: int,
) -> Iterator[tuple[int, Any]]:
    try:
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
                for number, task in itertools.islice(numbered, 1):
                    running[pool.submit(function, *task)] = number
    except BrokenProcessPool as error:
        raise DataError(
            "A worker process was killed, most often because memory ran out. Run the same "
            f"command again with fewer --workers than {workers}."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()  # returns only if the parent was killed
        os._exit(1)
