"""Cross-entropy."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from flatcal_dist.objectives.base import Objective, at_least_float32
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-sum_k q_k log p_k, with q the target: one class, or the probabilities of a mixed sample."""

    name: ClassVar[str] = "cross_entropy"

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        return cross_entropy(logits, targets.labels, "none")


def cross_entropy(
    logits: Tensor, target: Tensor, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of logits [N, K] and class indices [N], or probabilities [N, K] of mixed ones.

    A scalar, or [N] for reduction "none". Label smoothing applies to either.
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
