"""A process group of one process, for engines that need a group where nobody launched ranks."""

import os

import torch.distributed as dist

from flatcal_dist.sharpness.errors import StepError


def join_alone(backend: str, engine: str) -> None:
    """Make this process the only rank, unless there is a group already.

    Args:
        backend: The backend of torch.distributed, such as "gloo" or "nccl".
        engine: The name of the engine, for the message.

    Raises:
        StepError: WORLD_SIZE says that there are other ranks, which have not joined.
    """
    if dist.is_initialized():
        return
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise StepError(
            f"{engine} needs ranks that have joined: call flatcal_dist.ranks.distributed.start or "
            "torch.distributed.init_process_group first"
        )
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
