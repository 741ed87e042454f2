"""SAM by the gradient of the last step."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flatcal_dist.sharpness.rules.base import Context, Memory, Rule, Shards, along_memory_


@dataclass(frozen=True)
class StaleSAM(Rule):
    """SAM with a stale ascent gradient: e = rho * g' / ||g'||_2, g' the last step's gradient.

    g' is the gradient that the optimizer got in the last step, taken at that step's w + e and
    reduced over all ranks. So a step has one pass, no further all-reduce, and costs what a plain
    step costs. The first step does not perturb. g' takes the memory of one more copy of the
    weights, in checkpoints too. AsyncSAM (arXiv 2503.11147) also perturbs by a gradient one step
    old; its authors take it at the unperturbed weights, on a batch of its own, in parallel.
    """

    name: ClassVar[str] = "stale_sam"
    combines: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    @property
    def ascent_share(self) -> float:
        return 0.0

    def perturb_(self, shards: Shards, context: Context) -> Tensor:
        return along_memory_(shards, context, sign=1)

    def combine_(self, shards: Shards, context: Context) -> Memory:
        return {name: gradient / shards.loss_scale for name, gradient in shards.by_name()}
