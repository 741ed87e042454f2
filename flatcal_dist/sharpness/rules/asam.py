"""Adaptive SAM."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flatcal_dist.sharpness.rules.base import (
    AscentRule,
    Context,
    Shards,
    ratio,
    squared_norm,
)


@dataclass(frozen=True)
class ASAM(AscentRule):
    """Adaptive SAM (Kwon et al., ICML 2021): e = rho * T^2 g / ||T g||_2, scale-invariant.

    T = |w| + eta, element by element, for parameters whose whole name contains `weight` (norm
    layers and parametrizations.weight.original0 included). T = 1 for all other parameters, as in
    the authors' code. A good rho is about ten times SAM's.
    """

    name: ClassVar[str] = "asam"

    eta: Annotated[
        float, Field(ge=0, le=1000, description="What is added to the absolute value of a weight.")
    ] = 0.01

    def perturb_(self, shards: Shards, context: Context) -> Tensor:
        # One tensor at a time: T g as a whole would be another copy of the weights.
        squares = [
            squared_norm([gradient * (weight.abs() + self.eta) if self._adapts(name) else gradient])
            for name, weight, gradient in self._each(shards)
        ]
        norm = context.total(torch.stack(squares).sum() if squares else torch.zeros(())).sqrt()
        scale = ratio(context.rho, norm)
        for name, weight, gradient in self._each(shards):
            gradient.mul_(scale)
            if self._adapts(name):
                gradient.mul_((weight.abs() + self.eta).square_())
        return norm

    @staticmethod
    def _each(shards: Shards) -> Iterator[tuple[str, Tensor, Tensor]]:
        return zip(shards.names, shards.weights, shards.gradients, strict=True)

    @staticmethod
    def _adapts(name: str) -> bool:
        return "weight" in name
