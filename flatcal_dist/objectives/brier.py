"""The Brier score."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from flatcal_dist.objectives.base import Objective, at_least_float32
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class Brier(Objective):
    """The loss is sum_k (q_k - p_k)^2, the Brier score (Brier, Monthly Weather Review 1950).

    Here p are the softmax probabilities. The target q is one class, or the probabilities of a mixed
    sample. The sum over classes is Brier's form and that of Mukhoti et al. (NeurIPS 2020;
    torrvision/focal_calibration). It lies between 0 and 2, and does not become steep for samples
    that are very wrong, as cross-entropy does: there its slope tends to 0.
    """

    name: ClassVar[str] = "brier"

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        p = at_least_float32(logits).softmax(1)
        labels = targets.labels
        q = labels if labels.is_floating_point() else F.one_hot(labels, p.shape[1])
        if q.shape != p.shape:
            raise ValueError(
                f"Brier: targets must be class indices [N], or probabilities of shape "
                f"{list(p.shape)} as the logits, not {labels.dtype} of shape {list(labels.shape)}"
            )
        return (q.to(p.dtype) - p).square().sum(1)
