"""The loss that calibrated SAM follows at the perturbed weights."""

import math

import torch
from torch import Tensor

from flatcal_dist.objectives.base import reduce
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets, labels_of


def csam_loss(
    logits: Tensor, target: Tensor | Targets, gamma: float, reduction: str = "mean"
) -> Tensor:
    """The calibrated SAM objective (Tan et al., ICLR 2026, arXiv 2505.23866), literal form.

    With p the softmax probability of the true class,

        l(p) = -log p                        where p <= 1/2
        l(p) = -(1 + p)^-gamma * log p       elsewhere,  0 <= gamma <= 2.

    The weight is differentiated. It jumps at p = 1/2 and tends to 2^-gamma as p goes to 1, so
    samples that are already right with confidence push less. Defined for hard labels; gamma 0 is
    exactly `cross_entropy`.

    logits: [N, K]; target: class indices [N], or Targets; returns a scalar, or [N] with reduction
    "none". Raises ValueError for gamma outside [0, 2], soft labels, or an unknown reduction.
    """
    if not 0 <= gamma <= 2:
        raise ValueError(f"csam_loss: gamma must lie in [0, 2], not {gamma}")
    target = labels_of(target)
    if target.is_floating_point() or target.ndim != 1:
        raise ValueError(
            "csam_loss is defined for hard labels only: `target` must hold class indices of shape "
            f"[N], not {target.dtype} of shape {list(target.shape)}"
        )
    negative_log_p = cross_entropy(logits, target, reduction="none")
    if gamma == 0:
        losses = negative_log_p
    else:
        # (1 + p)^-gamma = exp(-gamma log(1 + p)), from the log-probability: nothing underflows.
        weight = torch.exp(-gamma * torch.log1p(torch.exp(-negative_log_p)))
        confident = negative_log_p < math.log(2)
        losses = torch.where(confident, weight * negative_log_p, negative_log_p)
    return reduce(losses, reduction)
