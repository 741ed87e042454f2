"""Sharpness-aware minimization."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flatcal_dist.sharpness.rules.base import Memory, Rule, Shards, Total, ratio, squared_norm


@dataclass(frozen=True)
class SAM(Rule):
    """Sharpness-aware minimization (Foret et al., ICLR 2021, section 3): e = rho * g / ||g||_2.

    There is one norm over all parameters. With `every` above 1 it is periodic SAM.
    """

    def perturb_(self, shards: Shards, rho: float, memory: Memory | None, total: Total) -> Tensor:
        norm = total(squared_norm(shards.gradients)).sqrt()
        torch._foreach_mul_(shards.gradients, ratio(rho, norm))
        return norm
