"""Sharpness-aware minimization."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatcal_dist.sharpness.rules.base import AscentRule, Context, Shards, ratio, squared_norm


@dataclass(frozen=True)
class SAM(AscentRule):
    """Sharpness-aware minimization (Foret et al., ICLR 2021, section 3): e = rho * g / ||g||_2.

    There is one norm over all parameters. With `every` above 1 the rule is periodic SAM.
    """

    name: ClassVar[str] = "sam"

    def perturb_(self, shards: Shards, context: Context) -> Tensor:
        norm = context.total(squared_norm(shards.gradients)).sqrt()
        if shards.gradients:  # a rank may hold none of what is perturbed
            torch._foreach_mul_(shards.gradients, ratio(context.rho, norm))
        return norm
