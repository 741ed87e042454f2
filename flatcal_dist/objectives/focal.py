"""Focal loss."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class Focal(Objective):
    """The loss is -(1 - p)^gamma * log p (Lin et al., ICCV 2017).

    Here p is the probability of the true class. Mukhoti et al. (NeurIPS 2020) use the loss for
    calibration, with gamma 3. With gamma 0 it is cross-entropy. The factor is differentiated.
    """

    name: ClassVar[str] = "focal"
    hard_labels: ClassVar[bool] = True

    gamma: Annotated[
        float,
        Field(ge=0, le=100, description="How fast a sample's weight falls with its probability."),
    ] = 3.0

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        nll = cross_entropy(logits, targets.labels, reduction="none")
        # 1 - p without cancellation, and above 0: a power below 1 has no slope there.
        rest = -torch.expm1(-nll)
        return rest.clamp(min=torch.finfo(nll.dtype).tiny) ** self.gamma * nll
