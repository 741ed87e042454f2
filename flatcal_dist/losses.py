"""Per-sample objectives, computed from logits in float32 (or the input's wider type)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor, target: Tensor, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of logits [N, K] and class indices [N], or probabilities [N, K] of mixed ones.

    A scalar, or [N] for reduction "none". Label smoothing applies to either.
    """
    logits = _at_least_float32(logits)
    return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)


def csam_loss(logits: Tensor, target: Tensor, gamma: float, reduction: str = "mean") -> Tensor:
    """The calibrated SAM objective (Tan et al., ICLR 2026, arXiv 2505.23866), literal form.

    With p the softmax probability of the true class,

        l(p) = -log p                        where p <= 1/2
        l(p) = -(1 + p)^-gamma * log p       elsewhere,  0 <= gamma <= 2.

    The weight is differentiated. It jumps at p = 1/2 and tends to 2^-gamma as p goes to 1, so
    samples that are already right with confidence push less. Defined for hard labels; gamma 0 is
    exactly `cross_entropy`.

    logits: [N, K]; target: class indices [N]; returns a scalar, or [N] with reduction "none".
    Raises ValueError for gamma outside [0, 2], soft labels, or an unknown reduction.
    """
    if not 0 <= gamma <= 2:
        raise ValueError(f"csam_loss: gamma must lie in [0, 2], not {gamma}")
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


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Per-sample losses [N] to "mean", "sum", or "none"."""
    if reduction == "none":
        return losses
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not '{reduction}'")
    return losses.mean() if reduction == "mean" else losses.sum()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
