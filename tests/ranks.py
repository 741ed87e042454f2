"""Run a function of a test on several gloo ranks, and get back what each returned."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds; a rank that hangs fails the test


def on_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(rank, world_size, *arguments)` on every rank; the list of results, by rank.

    `work` is a function at the top of its module. An exception on a rank fails the test.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(
            target=_run, args=(work, rank, world_size, port, queue, arguments), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    while len(results) < world_size:
        rank, result, error = queue.get(timeout=TIMEOUT)
        if error:
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank} failed:\n{error}")
        results[rank] = pickle.loads(result)
    for process in processes:
        process.join(TIMEOUT)
    return [results[rank] for rank in range(world_size)]


def _run(
    work: Callable, rank: int, world_size: int, port: int, queue: Any, arguments: tuple
) -> None:
    try:
        torch.set_num_threads(1)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if world_size > 1:
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
        result = work(rank, world_size, *arguments)
        queue.put((rank, pickle.dumps(result), None))  # tensors by value, not by shared memory
        if world_size > 1:
            dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
