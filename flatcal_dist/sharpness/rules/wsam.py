"""Weighted SAM."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from flatcal_dist.sharpness.rules.base import Context, Memory, Shards
from flatcal_dist.sharpness.rules.sam import SAM


@dataclass(frozen=True)
class WSAM(SAM):
    """WSAM (Yue et al., KDD 2023, algorithms 1 and 2): a weighted sharpness beside the loss.

    The objective is L + weight * (L_SAM - L), with weight = gamma / (1 - gamma). So gamma 0.5 is
    SAM, gamma 0 is plain training, and above 0.5 sharpness counts more than in SAM. With the ascent
    gradient g and SAM's descent gradient g_s, there are two forms:

    decoupled     The optimizer gets g. After its step each weight moves by
                  -(learning rate) * weight * (g_s - g). So no momentum and no second moment sees
                  the sharpness, as decoupled weight decay. It is the default of the authors' code,
                  too (atorch.optimizers.wsam).
    not decoupled The optimizer gets g + weight * (g_s - g).

    Their code differs from this in three points: each rank perturbs by its own gradient, both
    gradients are clipped (to a norm of 1 by default) before they are compared, and weights come
    back by subtraction. Without clipping and on one process both agree to rounding.

    `optimizer.clip_norm` acts on what the optimizer gets. Until the second gradient is there, g
    takes the memory of one more copy of the weights, and decoupled another one until the end of the
    step. On ZeRO the decoupled form gathers the weights once more in each step.
    """

    name: ClassVar[str] = "wsam"
    keeps_ascent: ClassVar[bool] = True
    combines: ClassVar[bool] = True

    gamma: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="How much sharpness counts, gamma / (1 - gamma) beside the loss. 0.5 is "
            "SAM.",
        ),
    ] = 0.9
    decouple: Annotated[
        bool,
        Field(description="Whether sharpness moves the weights past the optimizer's momentum."),
    ] = True

    @property
    def decoupled(self) -> bool:
        return self.decouple

    @property
    def weight(self) -> float:
        """The weight of sharpness beside the loss."""
        return self.gamma / (1 - self.gamma)

    def combine_(self, shards: Shards, context: Context) -> Memory | None:
        ascent = context.ascent
        if ascent is None:
            return None
        beside: Memory = {}
        for name, gradient in shards.by_name():
            clean = ascent.get(name)  # a parameter that only one pass used is zero in the other
            sharpness = gradient if clean is None else gradient - clean
            if self.decouple:
                beside[name] = sharpness * (self.weight / shards.loss_scale)
            if clean is None:
                gradient.mul_(0.0 if self.decouple else self.weight)
            else:
                gradient.copy_(clean)
                if not self.decouple:
                    gradient.add_(sharpness, alpha=self.weight)
        return beside if self.decouple else None
