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
    samples that are already right with confidence push less. With gamma 0 the loss is exactly
    `cross_entropy`.

    Args:
        logits: Logits [N, K].
        target: Class indices [N], or Targets with them.
        gamma: How much less a confident sample weighs.
        reduction: "mean" or "sum" gives a scalar, "none" gives [N].

    Raises:
        ValueError: gamma is outside [0, 2], labels are soft, or the reduction is unknown.
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
