"""Margin-based label smoothing."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective, at_least_float32
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class MarginSmoothing(Objective):
    """Cross-entropy, and logits within a margin of the largest (MbLS, Liu et al., CVPR 2022).

    With z the logits of a sample and K classes, the loss is

        -sum_k q_k log softmax(z)_k + weight / K * sum_k max(0, max_j z_j - z_k - margin).

    The mean over classes is the form of the authors' code (by-liu/MbLS, class LogitMarginL1), and
    so are margin 10 and weight 0.1. The paper writes the sum over classes, which is K times as
    much. The largest logit is differentiated. Where several logits are the largest, one of them has
    the slope, as in that code. That code can also change the weight by epoch, which the paper does
    not use and which is not here. The target q is one class, or the probabilities of a mixed
    sample. The penalty does not depend on it.

    With weight 0 the loss is cross-entropy.
    """

    name: ClassVar[str] = "margin_smoothing"

    margin: Annotated[
        float,
        Field(ge=0, le=1e6, description="How far a logit may be below the largest one at no cost."),
    ] = 10.0
    weight: Annotated[
        float, Field(ge=0, le=1000, description="The weight of distances beyond the margin.")
    ] = 0.1

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        z = at_least_float32(logits)
        beyond = (z.max(1, keepdim=True).values - z - self.margin).relu().mean(1)
        return cross_entropy(logits, targets.labels, "none") + self.weight * beyond
