"""Focal loss whose exponent depends on the sample."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.focal import focal
from flatcal_dist.objectives.targets import Targets

Gamma = Annotated[float, Field(ge=0, le=100)]


@dataclass(frozen=True)
class FLSD(Objective):
    """The focal loss with a larger exponent for less likely labels (Mukhoti et al., NeurIPS 2020).

    With p the probability of the true class, the loss is -(1 - p)^gamma * log p, where

        gamma = gamma_low      for p < low,
        gamma = gamma_middle   for low <= p < high,
        gamma = gamma_high     for high <= p.

    The defaults are FLSD-53 of the paper: gamma 5 for p < 0.2, else 3. With gamma_high 2 it is
    FLSD-52. The factor (1 - p)^gamma is differentiated, and the choice of gamma is not: the loss
    jumps at `low` and at `high`. This is the form of the authors' code
    (torrvision/focal_calibration), which sums over the batch and does not average.

    With all three exponents 0 the loss is cross-entropy.
    """

    name: ClassVar[str] = "flsd"
    hard_labels: ClassVar[bool] = True

    low: Annotated[
        float, Field(ge=0, le=1, description="The probability below which gamma_low counts.")
    ] = 0.2
    high: Annotated[
        float,
        Field(ge=0, le=1, description="The probability from which on gamma_high counts."),
    ] = 0.5
    gamma_low: Annotated[
        Gamma, Field(description="The exponent of samples with a probability below `low`.")
    ] = 5.0
    gamma_middle: Annotated[
        Gamma, Field(description="The exponent of samples between `low` and `high`.")
    ] = 3.0
    gamma_high: Annotated[
        Gamma, Field(description="The exponent of samples with a probability of at least `high`.")
    ] = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise ValueError(
                f"FLSD: objective.low = {self.low:g} is above objective.high = {self.high:g}: no "
                "sample lies between, so gamma_middle would never count"
            )

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        nll = cross_entropy(logits, targets.labels, reduction="none")
        return focal(nll, self.gammas((-nll.detach()).exp()))

    def gammas(self, p: Tensor) -> Tensor:
        """Return the exponent of each sample, [N], for probabilities [N] of the true class."""
        middle = torch.full_like(p, self.gamma_middle)
        upper = torch.where(p < self.high, middle, self.gamma_high)
        return torch.where(p < self.low, self.gamma_low, upper)
