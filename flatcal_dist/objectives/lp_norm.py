"""Cross-entropy with a norm of the logits."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective, at_least_float32
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class LpNorm(Objective):
    """Cross-entropy, and short vectors of logits (Joo and Chung, arXiv 2006.06399).

    With z the logits of a sample, the loss is

        -sum_k q_k log softmax(z)_k + weight * ||z||_p,   ||z||_p = (sum_k |z_k|^p)^(1/p).

    The defaults are the L1 form of the code of Zhu et al. (ECCV 2022; Impression2805/FMFP), where
    ||z||_1 = sum_k |z_k|: a sum over classes, and a mean over samples. The target q is one class,
    or the probabilities of a mixed sample. The norm does not depend on it. At z_k = 0 the slope of
    |z_k| is taken to be 0, and so is that of the norm at z = 0.

    With weight 0 the loss is cross-entropy.
    """

    name: ClassVar[str] = "lp_norm"

    p: Annotated[
        float, Field(ge=1, le=100, description="Which norm it is: the exponent of each logit.")
    ] = 1.0
    weight: Annotated[
        float, Field(ge=0, le=1000, description="The weight of the norm of the logits.")
    ] = 0.01

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        plain = cross_entropy(logits, targets.labels, "none")
        return plain + self.weight * _norm(at_least_float32(logits), self.p)


def _norm(z: Tensor, p: float) -> Tensor:
    """Return ||z||_p of each row. No power overflows, and the slope is finite everywhere."""
    # ||z|| = c ||z / c|| has the same slope for each constant c, here the largest |z_k|.
    largest = z.detach().abs().amax(1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    return largest.squeeze(1) * torch.linalg.vector_norm(z / largest, p, dim=1)
