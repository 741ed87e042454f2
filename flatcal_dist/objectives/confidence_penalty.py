"""Cross-entropy with a penalty on confident predictions."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective, at_least_float32
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class ConfidencePenalty(Objective):
    """Cross-entropy, and predictions of high entropy (Pereyra et al., ICLR 2017 workshop).

    With p the softmax probabilities, the loss is (section 3 of the paper)

        -sum_k q_k log p_k - weight * H(p),   H(p) = -sum_k p_k log p_k.

    The entropy is a sum over classes, in nats. The target q is one class, or the probabilities of
    a mixed sample; the entropy does not depend on it. The class PenaltyEntropy in the code of Liu
    et al. (CVPR 2022; by-liu/MbLS) takes the mean over classes, so its weight is K times this
    weight, and it keeps p within [1e-10, 1 - 1e-10].

    With weight 0 the loss is cross-entropy.
    """

    name: ClassVar[str] = "confidence_penalty"

    weight: Annotated[
        float, Field(ge=0, le=1000, description="The weight of the entropy of the prediction.")
    ] = 0.1

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        log_p = at_least_float32(logits).log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        return cross_entropy(logits, targets.labels, "none") - self.weight * entropy
