"""Loss-equated SAM."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flatcal_dist.sharpness.rules.base import Context, Shards, ratio, squared_norm
from flatcal_dist.sharpness.rules.sam import SAM


@dataclass(frozen=True)
class LESAM(SAM):
    """Loss-equated SAM (Wang et al., ICML 2026, arXiv 2605.10183): fix the loss, not the radius.

    e = r * g / ||g||_2, with r = min(budget / ||g||_2, rho). So to first order every step raises
    the loss by `budget`, and rho is only the largest length. The budget falls to 0 along half a
    cosine over the last part of training, from the share `anneal_from` on.

    The paper anneals over the final epochs. Neither paper nor code was at hand to say how many, so
    0, which is the whole of training, is a choice of this project.
    """

    name: ClassVar[str] = "le_sam"
    length_counts: ClassVar[bool] = True

    budget: Annotated[
        float,
        Field(
            ge=0,
            le=1e6,
            description="By how much a perturbation raises the loss, to first order.",
        ),
    ] = 0.05
    anneal_from: Annotated[
        float,
        Field(ge=0, le=1, description="The share of training after which the budget falls to 0."),
    ] = 0.0

    def budget_at(self, progress: float) -> float:
        """Return the budget after this share of training."""
        if progress <= self.anneal_from:
            return self.budget
        fallen = (progress - self.anneal_from) / (1 - self.anneal_from)
        return self.budget * 0.5 * (1 + math.cos(math.pi * min(fallen, 1.0)))

    def perturb_(self, shards: Shards, context: Context) -> Tensor:
        norm = context.total(squared_norm(shards.gradients)).sqrt()
        budget = self.budget_at(context.progress)
        radius = ratio(budget * shards.loss_scale * shards.weight, norm).clamp(max=context.rho)
        if shards.gradients:  # a rank may hold none of what is perturbed
            torch._foreach_mul_(shards.gradients, ratio(radius, norm))
        return norm
