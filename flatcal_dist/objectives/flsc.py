"""Focal loss whose exponent depends on the epoch."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.focal import focal, refuse_labels_alone
from flatcal_dist.objectives.targets import Targets

Gamma = Annotated[float, Field(ge=0, le=100)]
Epoch = Annotated[int, Field(ge=0, le=1_000_000)]


@dataclass(frozen=True)
class FLSc(Objective):
    """The focal loss with exponents by epoch (Mukhoti et al., NeurIPS 2020).

    With p the probability of the true class, the loss is -(1 - p)^gamma * log p, where

        gamma = gamma_first    in the epochs before `second_from`,
        gamma = gamma_second   from there to the epoch before `third_from`,
        gamma = gamma_third    from there on.

    Epochs count from 0, as in the authors' code (torrvision/focal_calibration). The defaults are
    FLSc-531 in a training of 350 epochs: gamma 5 in epochs 0 to 99, 3 in epochs 100 to 249, and 1
    from epoch 250 on. A shorter training needs other epochs. That code sums over the batch, and
    does not average.

    The loss depends on the epoch, so it needs `Targets` that hold the epoch. With all three
    exponents 0 it is cross-entropy.
    """

    name: ClassVar[str] = "flsc"
    hard_labels: ClassVar[bool] = True

    gamma_first: Annotated[Gamma, Field(description="The exponent of the first epochs.")] = 5.0
    gamma_second: Annotated[
        Gamma, Field(description="The exponent from the epoch `second_from` on.")
    ] = 3.0
    gamma_third: Annotated[
        Gamma, Field(description="The exponent from the epoch `third_from` on.")
    ] = 1.0
    second_from: Annotated[
        Epoch, Field(description="The first epoch with gamma_second, counted from 0.")
    ] = 100
    third_from: Annotated[
        Epoch, Field(description="The first epoch with gamma_third, counted from 0.")
    ] = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.second_from > self.third_from:
            raise ValueError(
                f"FLSc: objective.second_from = {self.second_from} is after objective.third_from = "
                f"{self.third_from}: gamma_second would never count"
            )

    @property
    def begins(self) -> int:
        return self.second_from

    def __call__(self, output: Any, targets: Tensor | Targets) -> Tensor:
        refuse_labels_alone("FLSc", targets)
        return super().__call__(output, targets)

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        nll = cross_entropy(logits, targets.labels, reduction="none")
        return focal(nll, self.gamma_of(targets.epoch))

    def gamma_of(self, epoch: int) -> float:
        """Return the exponent of an epoch."""
        if epoch < self.second_from:
            return self.gamma_first
        return self.gamma_second if epoch < self.third_from else self.gamma_third
