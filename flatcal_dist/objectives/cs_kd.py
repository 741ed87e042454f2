"""Class-wise self-knowledge distillation."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective, Pairs, at_least_float32
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class CSKD(Objective):
    """Cross-entropy, and equal predictions for images of a class (Yun et al., CVPR 2020).

    With z(x) the logits of an image and x' its partner, another image of its class, the loss is

        -log p(x) + weight * T^2 * KL(softmax(z(x') / T) || softmax(z(x) / T)),

    where the partner is the teacher and has no gradient. The factor T^2, weight 1 and T = 4 are
    taken from the authors' code (alinlab/cs-kd).

    Both images of a pair are trained, and each is the teacher of the other. The authors' loader
    gives each image of a batch a second image that is only a teacher, which costs one more forward
    pass. There the second image may be the first one again, and here it is always another. An
    image that has no partner of its class (see `Objective.pairs`) has cross-entropy alone. Each
    pass of a sharpness-aware step computes its teachers at the weights of the pass.

    With weight 0 the loss is cross-entropy.
    """

    name: ClassVar[str] = "cs_kd"
    hard_labels: ClassVar[bool] = True
    pairs: ClassVar[Pairs] = "same_class"

    temperature: Annotated[
        float,
        Field(gt=0, le=1000, description="What logits are divided by where images are compared."),
    ] = 4.0
    weight: Annotated[
        float, Field(ge=0, le=1000, description="The weight of the divergence between two images.")
    ] = 1.0

    def losses(self, output: Tensor, targets: Targets) -> Tensor:
        labels = targets.labels
        partner = torch.arange(len(labels), device=labels.device) ^ 1
        scaled = F.log_softmax(at_least_float32(output) / self.temperature, dim=1)
        teacher = scaled.detach()[partner]
        divergence = F.kl_div(scaled, teacher, reduction="none", log_target=True).sum(1)
        paired = (labels == labels[partner]).to(divergence.dtype)
        factor = self.weight * self.temperature**2
        return cross_entropy(output, labels, "none") + factor * paired * divergence
