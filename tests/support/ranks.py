"""Run a function of a test on several gloo ranks, and get back what each returned.

Ranks are forked from a server that has imported torch and the like and done nothing else, so each
is fresh, and there at once.
"""

import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 240  # seconds without a word from any rank, after which the test fails
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["tests.support.preloaded"])


def on_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(rank, world_size, *arguments)` on every rank; the list of results, by rank.

    `work` is a function at the top of its module. An exception on a rank, or its death without a
    word, fails the test at once.
    """
    environment = dict(os.environ) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks: list[tuple[BaseProcess, Connection]] = []
    meeting = tempfile.TemporaryDirectory()
    try:
        for rank in range(world_size):
            ours, theirs = FORKING.Pipe(duplex=False)
            call = (work, rank, world_size, meeting.name, environment, theirs, arguments)
            process = FORKING.Process(target=_run, args=call)
            process.start()
            theirs.close()  # so that the death of the rank ends the pipe
            ranks.append((process, ours))
        return [pickle.loads(result) for result in _results(ranks)]
    finally:
        for process, pipe in ranks:
            process.kill()
            process.join()
            pipe.close()
        meeting.cleanup()


@functools.cache
def start_server() -> None:
    process = FORKING.Process(target=int)
    process.start()
    process.join()


def _results(ranks: list[tuple[BaseProcess, Connection]]) -> list[bytes]:
    results: dict[int, bytes] = {}
    while len(results) < len(ranks):
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), TIMEOUT)
        assert ready, f"ranks {sorted(waiting.values())} said nothing for {TIMEOUT} s"
        for pipe in ready:
            rank = waiting[pipe]
            try:
                result, error = pipe.recv()
            except EOFError:
                ranks[rank][0].join()
                raise AssertionError(
                    f"rank {rank} died with exit code {ranks[rank][0].exitcode}"
                ) from None
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = result
    return [results[rank] for rank in range(len(ranks))]


def free_port() -> int:
    """One that nobody has at this moment; the server runs, so that ranks take it at once."""
    start_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(
    work: Callable,
    rank: int,
    world_size: int,
    meeting: str,
    environment: dict[str, str],
    pipe: Connection,
    arguments: tuple,
) -> None:
    try:
        torch.set_num_threads(1)
        os.environ |= environment  # the server's is of when it started
        if world_size > 1:
            file = f"file://{meeting}/store"  # not a port, which somebody else may take
            dist.init_process_group("gloo", init_method=file, rank=rank, world_size=world_size)
        result = pickle.dumps(work(rank, world_size, *arguments))  # tensors by value
        if dist.is_initialized():  # `work` may have ended it, all ranks together
            dist.barrier()  # a rank that is done would be killed while others talk to it
        pipe.send((result, None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
