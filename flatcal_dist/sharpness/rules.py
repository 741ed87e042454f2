"""The rules: where the descent gradient is taken, and of which loss. Pure tensor mathematics.

A rule sees matching lists of tensors: whole parameters, or the shards of one rank. It is asked

    squared_norm(shards)            its part of the square of the norm that rho is divided by
    perturbation_(shards, scale)    turn the gradients into e, in place; scale = rho / that norm
    descent_loss(loss)              the loss whose gradient at w + e is followed from w
    own_loss                        whether it says itself what the losses are
    perturbs_at(step)               whether this step does so at all (otherwise it is a plain one)

and a new rule is a small class with these. One that `remembers` has two more, as LookSAM has.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from flatcal_dist.losses import csam_loss
from flatcal_dist.sharpness.errors import StepError

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits [N, K], target [N]) -> losses [N]


@dataclass
class Shards:
    """What one rank holds of weights and of a gradient at them: three lists of one length.

    names: the network's own parameter names. weights: in full precision, not to be changed.
    gradients: may carry a loss scale; changed in place. own: nobody else reads these gradients'
    memory, so that it can hold the weights at w while they are moved.
    """

    names: Sequence[str]
    weights: Sequence[Tensor]
    gradients: list[Tensor]
    own: bool = False

    def by_name(self) -> Iterator[tuple[str, Tensor]]:
        return zip(self.names, self.gradients, strict=True)


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimization (Foret et al., ICLR 2021, section 3): e = rho * g / ||g||_2.

    One norm over all parameters. every: perturb in each `every`-th step only, from the first on
    (periodic SAM), the others are plain steps.
    Raises StepError for a rho that is negative or not finite, or `every` below 1.
    """

    rho: float
    every: int = 1
    remembers: ClassVar[bool] = False  # whether it keeps something from step to step
    own_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise StepError(f"rho must be finite and not negative, got {self.rho}")
        if not isinstance(self.every, int) or self.every < 1:
            raise StepError(f"every must be at least 1 and whole, got {self.every}")

    def perturbs_at(self, step: int) -> bool:
        return step % self.every == 0

    def squared_norm(self, shards: Shards) -> Tensor:
        return squared_norm(shards.gradients)

    def perturbation_(self, shards: Shards, scale: Tensor) -> None:
        torch._foreach_mul_(shards.gradients, scale)

    def descent_loss(self, loss: Loss) -> Loss:
        """The loss of the second gradient, given that of the first: the same."""
        return loss


@dataclass(frozen=True)
class CSAM(SAM):
    """Calibrated SAM (Tan et al., ICLR 2026, arXiv 2505.23866).

    SAM's perturbation, from plain cross-entropy; the descent gradient is that of `csam_loss` at
    w + e. gamma 0 is SAM. Raises StepError for gamma outside [0, 2].
    """

    gamma: float = 1.0
    own_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 2:
            raise StepError(f"gamma must lie in [0, 2], got {self.gamma}")

    def descent_loss(self, loss: Loss) -> Loss:
        if self.gamma == 0:
            return loss
        return partial(csam_loss, gamma=self.gamma, reduction="none")


@dataclass(frozen=True)
class ASAM(SAM):
    """Adaptive SAM (Kwon et al., ICML 2021): e = rho * T^2 g / ||T g||_2, scale-invariant.

    T = |w| + eta, element by element, for parameters whose whole name contains `weight` (norm
    layers and parametrizations.weight.original0 included), 1 for all others, as in the authors'
    code. rho is about ten times SAM's.
    """

    eta: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise StepError(f"eta must be finite and not negative, got {self.eta}")

    def squared_norm(self, shards: Shards) -> Tensor:
        # One tensor at a time: T g as a whole would be another copy of the weights.
        squares = [
            squared_norm([gradient * (weight.abs() + self.eta) if self._adapts(name) else gradient])
            for name, weight, gradient in zip(
                shards.names, shards.weights, shards.gradients, strict=True
            )
        ]
        return torch.stack(squares).sum() if squares else torch.zeros(())

    def perturbation_(self, shards: Shards, scale: Tensor) -> None:
        for name, weight, gradient in zip(
            shards.names, shards.weights, shards.gradients, strict=True
        ):
            gradient.mul_(scale)
            if self._adapts(name):
                gradient.mul_((weight.abs() + self.eta).square_())

    @staticmethod
    def _adapts(name: str) -> bool:
        return "weight" in name


@dataclass(frozen=True)
class LookSAM(SAM):
    """LookSAM (Liu et al., CVPR 2022): the costly part of SAM's gradient, kept for some steps.

    Every `every`-th step is SAM's, with descent gradient g_s, and remembers its part across the
    ascent gradient g: g_v = g_s - (g_s . g / ||g||^2) g. The others follow
    g + alpha * (||g|| / ||g_v||) * g_v, with a plain gradient g of their own. Norms and products
    are over all parameters. Memory: g_v, one more copy of the weights, in checkpoints too; and e
    of SAM's steps until their second gradient is there.
    """

    every: int = 5
    alpha: float = 0.7
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise StepError(f"alpha must be finite and not negative, got {self.alpha}")

    def remember(
        self, ascent: dict[str, Tensor], shards: Shards, total: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """g_v by name, from a vector along g and the gradients of the descent.

        `total` sums over the ranks. What only one pass used counts as zero in the other. Without an
        ascent gradient (it is zero, or rho is) there is nothing across it to remember: zero.
        """
        pairs = [(g_s, ascent[n]) for n, g_s in shards.by_name() if n in ascent]
        product = dot([a for a, _ in pairs], [b for _, b in pairs])
        along = total(torch.stack([product, squared_norm(list(ascent.values()))]))
        factor = torch.where(along[1] > 0, along[0] / along[1], 0.0)
        known = (along[1] > 0).float()
        across = {name: -factor * g for name, g in ascent.items()}
        for name, g_s in shards.by_name():
            across[name] = known * (g_s + across[name] if name in ascent else g_s)
        return across

    def correct_(
        self, memory: dict[str, Tensor], shards: Shards, total: Callable[[Tensor], Tensor]
    ) -> None:
        """g <- g + alpha * (||g|| / ||g_v||) * g_v, in place."""
        mine = [squared_norm(shards.gradients), squared_norm(list(memory.values()))]
        squares = total(torch.stack(mine))
        factor = torch.where(squares[1] > 0, self.alpha * (squares[0] / squares[1]).sqrt(), 0.0)
        for name, gradient in shards.by_name():
            if name in memory:
                gradient.add_(factor * memory[name])


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, a float32 scalar."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return torch.stack(norms).square().sum()


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Sum of the products of all elements, a float32 scalar."""
    if not a:
        return torch.zeros(())
    return torch.stack([(x.float() * y.float()).sum() for x, y in zip(a, b, strict=True)]).sum()
