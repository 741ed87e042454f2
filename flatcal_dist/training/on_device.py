"""How a micro-batch gets from the loader to the step."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from flatcal_dist import inputs
from flatcal_dist.config import Config
from flatcal_dist.data import Batch, Index
from flatcal_dist.data.shards.listing import Stream
from flatcal_dist.objectives import Targets
from flatcal_dist.ranks.distributed import on_all_ranks


class OnDevice:
    """Returns images and targets of a batch on the device, normalized and mixed."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device, self.seed = device, config.run.seed
        self.channels_last = config.model.channels_last
        self.normalize = inputs.normalization(config.data).to(device)
        self.mixing = config.mixing.mixing(config.model.num_classes)

    def __call__(self, batch: Batch) -> tuple[Tensor, Targets]:
        images = self.normalize(batch.images.to(self.device, non_blocking=True))
        labels = batch.labels.to(self.device, non_blocking=True)
        samples = batch.samples.to(self.device, non_blocking=True)
        targets = Targets(labels, samples, batch.epoch)
        if self.mixing is not None:
            images, targets = self.mixing.targets(images, targets, batch.samples, self.seed)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets


def statistics_inputs(
    config: Config, train: Index | Stream, accelerator: Accelerator, on_device: OnDevice
) -> Iterator[tuple[Tensor, bool]]:
    """Yield inputs of this rank to estimate norm statistics on, and whether they count.

    All ranks call this.

    Args:
        config: The configuration.
        train: The training data.
        accelerator: This rank among the others.
        on_device: Brings batches to the device.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    pin_memory = accelerator.device.type == "cuda"
    loader, count = inputs.statistics_batches(config, train, rank, ranks, pin_memory)
    batches = iter(loader)
    # A rank whose data fails must not leave the others waiting in the network.
    while (batch := on_all_ranks(lambda: next(batches, None))) is not None:
        yield on_device(batch)[0], batch.step < count
