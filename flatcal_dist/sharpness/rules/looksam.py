"""LookSAM."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flatcal_dist.sharpness.rules.base import (
    Context,
    Every,
    Memory,
    Shards,
    dot,
    ratio,
    squared_norm,
)
from flatcal_dist.sharpness.rules.sam import SAM


@dataclass(frozen=True)
class LookSAM(SAM):
    """LookSAM (Liu et al., CVPR 2022): the costly part of SAM's gradient, kept for some steps.

    Every `every`-th step is a step of SAM, with ascent gradient g and descent gradient g_s. The
    rule remembers the part of g_s across g: g_v = g_s - (g_s . g / ||g||^2) g. The other steps
    follow g + alpha * (||g|| / ||g_v||) * g_v, where g is the plain gradient of the step. Norms and
    products are over all parameters. g_v takes the memory of one more copy of the weights, in
    checkpoints too.
    """

    name: ClassVar[str] = "looksam"
    keeps_ascent: ClassVar[bool] = True
    combines: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    every: Every = 5
    alpha: Annotated[
        float, Field(ge=0, le=1000, description="The weight of the remembered part of a gradient.")
    ] = 0.7

    def combine_(self, shards: Shards, context: Context) -> Memory | None:
        if context.ascent is not None:
            # At rho 0 both gradients are the same, and what is across is rounding.
            return self._across(shards, context.ascent if context.rho > 0 else {}, context)
        if context.memory:
            self._add_across_(shards, context.memory, context)
        return None

    def _across(self, shards: Shards, ascent: Memory, context: Context) -> Memory:
        """Return g_v by name. A parameter that only one pass used counts as zero in the other.

        Where the whole ascent gradient is zero, g_v is zero.
        """
        pairs = [(g_s, ascent[n]) for n, g_s in shards.by_name() if n in ascent]
        product = dot([g_s for g_s, _ in pairs], [g for _, g in pairs])
        along = context.total(torch.stack([product, squared_norm(list(ascent.values()))]))
        factor, known = ratio(along[0], along[1]), (along[1] > 0).float()
        across = {name: -factor * g for name, g in ascent.items()}
        for name, g_s in shards.by_name():
            across[name] = known * (g_s + across[name] if name in ascent else g_s)
        return across

    def _add_across_(self, shards: Shards, memory: Memory, context: Context) -> None:
        """Replace g by g + alpha * (||g|| / ||g_v||) * g_v."""
        squares = context.total(
            torch.stack([squared_norm(shards.gradients), squared_norm(list(memory.values()))])
        )
        factor = self.alpha * ratio(squares[0], squares[1]).sqrt()
        for name, gradient in shards.by_name():
            if name in memory:
                gradient.add_(factor * memory[name])
