"""Friendly SAM."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flatcal_dist.sharpness.rules.base import Context, Memory, Shards
from flatcal_dist.sharpness.rules.sam import SAM


@dataclass(frozen=True)
class FriendlySAM(SAM):
    """Friendly SAM (Li et al., CVPR 2024, algorithm 1): perturb along the noise of the batch.

    e = rho * d / ||d||_2 with d = g - sigma * m, where m estimates the full gradient:
    m <- decay * m + (1 - decay) * g. As in the authors' code (nblt/F-SAM), d uses the m of before
    this step, and the first step perturbs along g and sets m = g. Their adaptive form is not here.
    Only steps that perturb change m. It takes the memory of one more copy of the weights, in
    checkpoints too, and g takes another one until the second gradient is there. With sigma 0 the
    rule is SAM.
    """

    name: ClassVar[str] = "friendly_sam"
    keeps_ascent: ClassVar[bool] = True
    combines: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    sigma: Annotated[
        float,
        Field(
            ge=0,
            le=1000,
            description="How much of the remembered gradient is taken from the perturbation.",
        ),
    ] = 1.0
    decay: Annotated[
        float,
        Field(ge=0, lt=1, description="The decay of the gradients that are averaged."),
    ] = 0.9

    def perturb_(self, shards: Shards, context: Context) -> Tensor:
        for name, gradient in shards.by_name():
            if context.memory and name in context.memory:
                gradient.sub_(context.memory[name], alpha=self.sigma * shards.loss_scale)
        return super().perturb_(shards, context)

    def combine_(self, shards: Shards, context: Context) -> Memory | None:
        if context.ascent is None:
            return None
        ascent = {name: g / shards.loss_scale for name, g in context.ascent.items()}
        if context.memory is None:
            return ascent
        return {
            name: torch.lerp(ascent[name], m, self.decay) if name in ascent else self.decay * m
            for name, m in context.memory.items()
        } | {name: g for name, g in ascent.items() if name not in context.memory}
