"""Focal loss."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class Focal(Objective):
    """The loss is -(1 - p)^gamma * log p (Lin et al., ICCV 2017, section 3.2).

    Here p is the probability of the true class. Mukhoti et al. (NeurIPS 2020) use the loss for
    calibration, with gamma 3. With gamma 0 it is cross-entropy. The factor is differentiated.

    The code of Zhu et al. (ECCV 2022; Impression2805/FMFP) is gamma 2 and plain_epochs 9: it counts
    epochs from 1, and epochs 1 to 9 train with cross-entropy. That code puts 1e-4 in the place of
    a smaller p, so that the samples that are most wrong have no slope. Here they have one. The code
    of Mukhoti et al. (torrvision/focal_calibration) sums over the batch, and does not average.

    With plain_epochs the loss depends on the epoch, so it needs `Targets` that hold the epoch.
    """

    name: ClassVar[str] = "focal"
    hard_labels: ClassVar[bool] = True

    gamma: Annotated[
        float,
        Field(ge=0, le=100, description="How fast a sample's weight falls with its probability."),
    ] = 3.0
    plain_epochs: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description="How many epochs at the beginning train with plain cross-entropy.",
        ),
    ] = 0

    @property
    def begins(self) -> int:
        return self.plain_epochs

    def __call__(self, output: Any, targets: Tensor | Targets) -> Tensor:
        if self.plain_epochs:
            refuse_labels_alone("Focal with plain_epochs", targets)
        return super().__call__(output, targets)

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        nll = cross_entropy(logits, targets.labels, reduction="none")
        return nll if targets.epoch < self.plain_epochs else focal(nll, self.gamma)


def focal(nll: Tensor, gamma: float | Tensor) -> Tensor:
    """Return (1 - p)^gamma * -log p of samples, [N].

    Args:
        nll: The negative log-probability -log p of the true class, [N].
        gamma: The exponent, one for all samples or one for each, [N]. It has no gradient.
    """
    # 1 - p without cancellation, and above 0: a power below 1 has no slope there.
    rest = -torch.expm1(-nll)
    return rest.clamp(min=torch.finfo(nll.dtype).tiny) ** gamma * nll


def refuse_labels_alone(name: str, targets: Tensor | Targets) -> None:
    """Raise ValueError if targets are labels alone, which do not tell the epoch."""
    if not isinstance(targets, Targets):
        raise ValueError(
            f"{name} depends on the epoch: give it Targets(labels, epoch=...) instead of labels"
        )
