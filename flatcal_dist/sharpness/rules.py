"""The rules: where the descent gradient is taken, and of which loss. Pure tensor mathematics.

A rule answers three questions, and the step asks them in this order:

    squared_norm(weights, gradients)        the local part of ||g||^2; the engine sums the parts
    perturb_(weights, gradients, scale)     w <- w + e, in place, with scale = rho / ||g||
    descent_loss(loss)                      the loss whose gradient at w + e is followed from w

`weights` and `gradients` are matching lists of tensors: whole parameters, or one rank's shards.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flatcal_dist.losses import csam_loss

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits [N, K], target [N]) -> losses [N]


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimization (Foret et al., ICLR 2021, section 3): e = rho * g / ||g||_2.

    One norm over all parameters. Raises ValueError for a rho that is negative or not finite.
    """

    rho: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise ValueError(f"rho must be finite and not negative, got {self.rho}")

    def squared_norm(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """||g||^2 of these tensors, a float32 scalar."""
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        return torch.stack(norms).square().sum()

    def perturb_(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], scale: Tensor
    ) -> None:
        """w <- w + scale * g; the gradients are used up, so that no further memory is needed."""
        torch._foreach_mul_(gradients, scale)
        torch._foreach_add_(weights, gradients)

    def descent_loss(self, loss: Loss) -> Loss:
        """The loss of the second gradient, given that of the first: the same."""
        return loss


@dataclass(frozen=True)
class CSAM(SAM):
    """Calibrated SAM (Tan et al., ICLR 2026, arXiv 2505.23866).

    SAM's perturbation, from plain cross-entropy; the descent gradient is that of `csam_loss` at
    w + e. gamma 0 is SAM. Raises ValueError for gamma outside [0, 2].
    """

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 2:
            raise ValueError(f"gamma must lie in [0, 2], got {self.gamma}")

    def descent_loss(self, loss: Loss) -> Loss:
        if self.gamma == 0:
            return loss
        return partial(csam_loss, gamma=self.gamma, reduction="none")
