"""Stable SAM."""

from dataclasses import dataclass
from typing import ClassVar

from flatcal_dist.sharpness.rules.base import Context, Shards, ratio, squared_norm
from flatcal_dist.sharpness.rules.sam import SAM


@dataclass(frozen=True)
class SSAM(SAM):
    """Stable SAM (Tan et al., JMLR 2025, arXiv 2401.07250): SAM's direction, and the clean length.

    With the ascent gradient g and the descent gradient g_s of SAM, the rule follows
    (||g|| / ||g_s||) g_s. Both norms are over all parameters. The gradient at w + e is often longer
    than at w, which makes SAM unstable at high learning rates.
    """

    name: ClassVar[str] = "ssam"
    keeps_norm: ClassVar[bool] = True
    combines: ClassVar[bool] = True

    def combine_(self, shards: Shards, context: Context) -> None:
        if context.ascent_norm is None:
            return
        norm = context.total(squared_norm(shards.gradients)).sqrt()
        factor = ratio(context.ascent_norm, norm)
        for gradient in shards.gradients:
            gradient.mul_(factor)
