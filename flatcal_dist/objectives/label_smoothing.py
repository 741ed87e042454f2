"""Cross-entropy with label smoothing."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class LabelSmoothing(Objective):
    """The loss is -sum_k q_k log p_k, with q = (1 - smoothing) * target + smoothing / K.

    Szegedy et al. (CVPR 2016, section 7) and torch use this form, in which the true class keeps
    1 - smoothing + smoothing / K.
    """

    name: ClassVar[str] = "label_smoothing"

    smoothing: Annotated[
        float,
        Field(ge=0, lt=1, description="The probability that is spread evenly over all classes."),
    ] = 0.1

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        return cross_entropy(logits, targets.labels, "none", self.smoothing)
