"""DistributedDataParallel, prepared so that a run that goes on repeats one that never stopped."""

import torch
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.networks.evaluation_mode import in_evaluation_mode
from flatcal_dist.sharpness.passes.outputs import logits_of


def arrange_buckets(
    model: DistributedDataParallel, shape: tuple[int, ...], device: torch.device
) -> None:
    """Have DDP arrange its buckets in the order of a backward pass before the first step.

    Without this, DDP does so after the first step. A gradient's place in a bucket decides in which
    order more than two ranks are added up. A run that goes on would then differ, by rounding, in
    the step after from one that never stopped.

    Args:
        model: The network in DistributedDataParallel.
        shape: The shape [C, H, W] of an image.
        device: Where the network is.
    """
    with in_evaluation_mode(model):
        # Two images: a norm that never keeps statistics takes no single one.
        logits_of(model(torch.zeros(2, *shape, device=device))).sum().backward()
    model.zero_grad(set_to_none=True)
