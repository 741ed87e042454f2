"""Cross-entropy."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from flatcal_dist.objectives.base import Objective, at_least_float32
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """The loss is -sum_k q_k log p_k.

    The target q is one class, or the probabilities of a mixed sample.
    """

    name: ClassVar[str] = "cross_entropy"

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        return cross_entropy(logits, targets.labels, "none")


def cross_entropy(
    logits: Tensor, target: Tensor, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy, a scalar, or [N] for reduction "none".

    Args:
        logits: Logits [N, K].
        target: Class indices [N], or probabilities [N, K] of mixed samples.
        reduction: "mean", "sum" or "none".
        label_smoothing: The probability that is spread over all classes, for either kind of target.
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
