"""Sharpness of an evaluated network, measured on a part of the evaluated images."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flatcal_dist import inputs
from flatcal_dist.config import Config, ConfigError
from flatcal_dist.data.sets.variants import DataSet
from flatcal_dist.evaluation.passes import Ensemble
from flatcal_dist.evaluation.predicting import as_cropped
from flatcal_dist.networks.evaluation_mode import in_evaluation_mode
from flatcal_dist.ranks.distributed import on_all_ranks
from flatcal_dist.sharpness.measures import MeanLoss, Options, Sharpness, measure
from flatcal_dist.sharpness.measures.loss import Batch

BATCH = 64  # the most images of one pass: two backward passes need more memory than a prediction


def refuse_ensemble(module: nn.Module, options: Options | None) -> None:
    """Raise ConfigError if the sharpness of several networks is wanted."""
    if options is not None and isinstance(module, Ensemble):
        raise ConfigError("sharpness is measured for one network, and this is an ensemble")


def wanted_sharpness(
    config: Config,
    module: nn.Module,
    data: DataSet,
    accelerator: Accelerator,
    options: Options | None,
) -> dict[str, Any] | None:
    """Return what was measured, in plain containers, or None if nothing is wanted."""
    if options is None:
        return None
    return asdict(measured_sharpness(config, module, data, accelerator, options))


def measured_sharpness(
    config: Config, module: nn.Module, data: DataSet, accelerator: Accelerator, options: Options
) -> Sharpness:
    """Return the sharpness of the mean cross-entropy of a network, in fp32.

    All ranks call this function. Each reads its share of the images once, and keeps them in memory.

    Args:
        config: The configuration of the network.
        module: The network.
        data: The images.
        accelerator: All its ranks take part.
        options: What is measured.

    Raises:
        FailedTogether: The network cannot be differentiated twice, or an image cannot be read.
        MeasureError: The loss is not finite somewhere.
    """
    groups = chosen_groups(len(data.index), options)
    options = replace(options, m=len(groups[0]) if groups else options.m)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    own = on_all_ranks(lambda: _read(as_cropped(config, data), data, groups[rank::ranks]))
    normalize = inputs.normalization(config.data).to(accelerator.device)

    def prepare(images: Tensor) -> Tensor:
        return normalize(images.to(accelerator.device, non_blocking=True))

    with in_evaluation_mode(module):
        loss = MeanLoss(module, own, prepare, data.classes)
        on_all_ranks(loss.check)
        return measure(loss, options)


def chosen_groups(images: int, options: Options) -> list[np.ndarray]:
    """Return the numbers of the images in groups of m, in random order.

    The groups do not depend on the number of ranks. If there are fewer than m images, they make one
    group. Otherwise images that would make a smaller group are left out.
    """
    order = np.random.default_rng(options.seed).permutation(images)[: options.images]
    m = min(options.m, len(order))
    return [order[i : i + m] for i in range(0, len(order) - m + 1, m)] if m else []


def _read(config: Config, data: DataSet, groups: list[np.ndarray]) -> list[list[Batch]]:
    """Return groups of images [N, C, H, W] uint8 with their labels, in batches for a pass."""
    if not groups:
        return []
    wanted = np.concatenate(groups)
    images: dict[int, Tensor] = {}
    for batch in inputs.evaluation_batches(config, data.index, 0, 1, False, np.sort(wanted)):
        for image, sample, valid in zip(batch.images, batch.samples, batch.valid, strict=True):
            if valid:
                images[int(sample)] = image
    found = []
    for group in groups:
        stacked = torch.stack([images[int(sample)] for sample in group])
        labels = torch.from_numpy(data.label[group].astype(np.int64))
        found.append(list(zip(stacked.split(BATCH), labels.split(BATCH), strict=True)))
    return found
