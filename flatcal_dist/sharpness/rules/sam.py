"""Sharpness-aware minimization."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flatcal_dist.sharpness.rules.base import AscentRule, Context, Shards, along_gradient_


@dataclass(frozen=True)
class SAM(AscentRule):
    """Sharpness-aware minimization (Foret et al., ICLR 2021, section 3): e = rho * g / ||g||_2.

    There is one norm over all parameters. With `every` above 1 the rule is periodic SAM.
    """

    name: ClassVar[str] = "sam"

    def perturb_(self, shards: Shards, context: Context) -> Tensor:
        return along_gradient_(shards, context)
