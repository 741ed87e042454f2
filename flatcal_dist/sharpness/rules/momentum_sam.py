"""Momentum-SAM."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from flatcal_dist.sharpness.rules.base import Context, Memory, Rule, Shards, along_memory_


@dataclass(frozen=True)
class MomentumSAM(Rule):
    """Momentum-SAM (Becker et al., 2024, arXiv 2401.12033): e = -rho * v / ||v||_2.

    v is the momentum, v <- momentum * v + g, of the gradients g at w + e. So a step has one pass
    and costs what a plain step costs. The first step does not perturb, because there is no v. The
    rule keeps v itself, one more copy of the weights, so that it works with every optimizer. If
    `momentum` is the optimizer's, v equals SGD's momentum buffer, up to weight decay, which v does
    not hold. A good rho is about ten times SAM's.
    """

    name: ClassVar[str] = "momentum_sam"
    combines: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    momentum: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="The decay of the gradients that are added up. Best: optimizer.momentum.",
        ),
    ] = 0.9

    @property
    def ascent_share(self) -> float:
        return 0.0

    def perturb_(self, shards: Shards, context: Context) -> Tensor:
        return along_memory_(shards, context, sign=-1)

    def combine_(self, shards: Shards, context: Context) -> Memory:
        after = {name: self.momentum * v for name, v in (context.memory or {}).items()}
        for name, gradient in shards.by_name():
            g = gradient / shards.loss_scale
            after[name] = after[name] + g if name in after else g
        return after
