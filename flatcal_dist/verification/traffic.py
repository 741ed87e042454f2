"""What a step sends: its collectives and their bytes, counted by PyTorch's profiler."""

import math
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")
BACKENDS = ("gloo:", "nccl:")
BYTES = {"double": 8, "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4}


def counted(work: Callable[[], T]) -> tuple[T, int, int]:
    """Run `work` and count what it sends.

    Returns:
        The result, the number of collectives that were started, and their bytes. The bytes are
        the size of the tensors handed over on this rank, not what a ring or tree sends for them.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it speaks of GPUs that are not there
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        result = work()
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name().startswith(BACKENDS)
    ]
    return result, len(events), sum(_bytes(event) for event in events)


def _bytes(event: "torch._C._autograd._KinetoEvent") -> int:
    return sum(
        math.prod(shape) * BYTES.get(dtype, 4)
        for shape, dtype in zip(event.shapes(), event.dtypes(), strict=False)
        if shape
    )
