"""How a global batch is made up, and the shared memory that its loading needs."""

import socket
from functools import partial

from accelerate.utils import gather_object

from flatcal_dist.config import Config, DataConfig
from flatcal_dist.data import DataError, steps_per_epoch
from flatcal_dist.data.loading.delivery import MORE_ROOM, SHARED_MEMORY, free_room, needed_room
from flatcal_dist.data.order import micro_batch_count
from flatcal_dist.objectives import Objective
from flatcal_dist.ranks.distributed import on_all_ranks

LABEL_BYTES = 8  # bytes of a label, and of the number of a sample


def micro_batch_size(data: DataConfig, world_size: int) -> int:
    """Return the number of images of a forward pass: as configured, or the share of a rank."""
    return data.micro_batch_size or -(-data.global_batch_size // world_size)


def batch_arithmetic(
    config: Config, world_size: int, images: int | None, objective: Objective | None = None
) -> str:
    """Say in words how the global batch is made up.

    Args:
        config: The configuration.
        world_size: The number of ranks.
        images: The number of training images, where it is known.
        objective: The objective, if it compares pairs of images.

    Raises:
        DataError: The batch cannot be cut into pairs, or the data is smaller than a batch.
    """
    data, train = config.data, config.train
    size = data.global_batch_size
    count = micro_batch_count(size, micro_batch_size(data, world_size), world_size)
    paired = config.mixing.name != "none" and f"mixing.name={config.mixing.name} mixes"
    if objective is not None and objective.pairs != "none":
        paired = f"objective.name={objective.name} compares"
    if paired and size % (2 * world_size * count):
        raise DataError(
            f"{paired} pairs of images, but {size} images on {world_size} ranks in {count} micro-"
            "batches each are not an even number per micro-batch: make data.global_batch_size a "
            f"multiple of {2 * world_size * count}, or choose another data.micro_batch_size"
        )
    share = f"{size / world_size:g}"
    text = (
        f"a step takes {size} images: {world_size} rank{'s' * (world_size > 1)} x {share} images, "
        f"in {count} micro-batch{'es' * (count > 1)} of {size / world_size / count:g} on a rank"
    )
    if images is None:
        length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs} epochs"
        return f"{text}; {length} (no training data found yet, so their number of images is open)"
    steps = steps_per_epoch(images, size)
    total = train.max_steps or train.epochs * steps
    return (
        f"{text}; {images:,} images make {steps:,} steps an epoch ({images - steps * size} images "
        f"of each epoch's order are left over); {total:,} steps in all, {total / steps:g} epochs"
    )


def check_room(config: Config) -> str:
    """Say in words how much shared memory loader workers need on this machine.

    All ranks call this function. Raises FailedTogether if any machine has less free, because
    workers would die of it later.
    """
    machines = gather_object([socket.gethostname()])
    here = machines.count(socket.gethostname())
    return on_all_ranks(partial(_check_room, config, len(machines), here))


def _check_room(config: Config, world_size: int, local_ranks: int) -> str:
    data = config.data
    each = data.channels * data.image_size**2 + 2 * LABEL_BYTES
    images = micro_batch_size(data, world_size), config.evaluate.batch_size
    needed = local_ranks * sum(needed_room(size, each, data.workers) for size in images)
    text = (
        f"loader workers hold up to {needed / 2**20:,.1f} MiB of batches in shared memory here "
        f"({local_ranks} ranks x {data.workers} workers, training and evaluation)"
    )
    free = free_room()
    if free is not None and needed > free:
        raise DataError(
            f"{text}, but {SHARED_MEMORY} has {free / 2**20:,.1f} MiB free. {MORE_ROOM}"
        )
    return text
