"""Focal loss."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatcal_dist.objectives.base import Objective
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class Focal(Objective):
    """-(1 - p)^gamma * log p, with p the probability of the true class (Lin et al., ICCV 2017).

    Mukhoti et al. (NeurIPS 2020) use it for calibration, with gamma 3. With gamma 0 it is
    cross-entropy. The factor is differentiated. Raises ValueError for a negative gamma.
    """

    gamma: float = 3.0
    hard_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"gamma must not be negative, got {self.gamma}")

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        nll = cross_entropy(logits, targets.labels, reduction="none")
        # 1 - p without cancellation, and above 0: a power below 1 has no slope there.
        rest = -torch.expm1(-nll)
        return rest.clamp(min=torch.finfo(nll.dtype).tiny) ** self.gamma * nll
