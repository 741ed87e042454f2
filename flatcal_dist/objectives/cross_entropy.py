"""Cross-entropy, with or without label smoothing."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from flatcal_dist.objectives.base import Objective, at_least_float32
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-sum_k q_k log p_k, where q is (1 - smoothing) * target + smoothing / K.

    With a smoothing above 0 it is label smoothing (Szegedy et al., CVPR 2016) in torch's form: the
    true class keeps 1 - smoothing + smoothing / K.
    """

    smoothing: float = 0.0

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        return cross_entropy(logits, targets.labels, "none", self.smoothing)


def cross_entropy(
    logits: Tensor, target: Tensor, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of logits [N, K] and class indices [N], or probabilities [N, K] of mixed ones.

    A scalar, or [N] for reduction "none". Label smoothing applies to either.
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
