"""Surrogate-gap guided SAM."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flatcal_dist.sharpness.rules.base import (
    Context,
    Shards,
    dot,
    ratio,
    squared_norm,
)
from flatcal_dist.sharpness.rules.sam import SAM


@dataclass(frozen=True)
class GSAM(SAM):
    """GSAM (Zhuang et al., ICLR 2022, algorithm 1): descend on the surrogate gap as well.

    With the ascent gradient g and the descent gradient g_p of SAM, the rule follows
    g_p - alpha * g_across, where g_across = g - (g . g_p / ||g_p||^2) g_p is the part of g across
    g_p. The paper lets rho fall with the learning rate (see `sharpness.rho_schedule`). With alpha 0
    the rule is SAM. Until the second gradient is there, g takes the memory of one more copy of the
    weights.
    """

    name: ClassVar[str] = "gsam"
    keeps_ascent: ClassVar[bool] = True
    combines: ClassVar[bool] = True

    alpha: Annotated[
        float,
        Field(
            ge=0,
            le=1000,
            description="The weight of the part of the ascent gradient that is taken away.",
        ),
    ] = 0.4

    def combine_(self, shards: Shards, context: Context) -> None:
        ascent = context.ascent
        if ascent is None or context.rho == 0:  # one gradient, or twice the same
            return
        pairs = [(g_p, ascent[n]) for n, g_p in shards.by_name() if n in ascent]
        product = dot([g_p for g_p, _ in pairs], [g for _, g in pairs])
        along = context.total(torch.stack([product, squared_norm(shards.gradients)]))
        factor = 1 + self.alpha * ratio(along[0], along[1])
        for name, g_p in shards.by_name():
            g_p.mul_(factor)
            if name in ascent:
                g_p.sub_(ascent[name], alpha=self.alpha)
