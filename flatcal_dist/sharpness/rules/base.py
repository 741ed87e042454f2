"""The contract of a rule: where the descent gradient is taken, of which loss, and its use.

A rule is pure tensor mathematics. It sees matching lists of tensors, which are whole parameters or
the shards of one rank, and a function `total` that sums a small tensor over the ranks that hold the
other parts. The step asks a rule, in this order:

    perturbs_at(step)    Does this step perturb? If not, it is a plain one.
    ascent_share         On which share of the batch is the ascent gradient taken? 0: there is none.
    selects(name)        Is the parameter of this name perturbed?
    perturb_(...)        Turn the ascent gradient into the perturbation e, in place.
    descent_loss(loss)   Which loss is followed at w + e, given that of the ascent?
    combine_(...)        Change the descent gradient, in place, and say what to remember.

Only `perturb_` has to be written. A new rule is one file with one class.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatcal_dist.sharpness.errors import StepError

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits [N, K], target of N samples) -> losses [N]
Memory = dict[str, Tensor]  # a tensor for each parameter, by name
Total = Callable[[Tensor], Tensor]


@dataclass
class Shards:
    """What one rank holds of weights and of a gradient at them: three lists of one length.

    names: the network's own parameter names. weights: in full precision, not to be changed.
    gradients: changed in place. own: nobody else reads these gradients' memory, so that it can hold
    the weights at w while they are moved. loss_scale: what the gradients were multiplied by.
    """

    names: Sequence[str]
    weights: Sequence[Tensor]
    gradients: list[Tensor]
    own: bool = False
    loss_scale: float = 1.0

    def by_name(self) -> Iterator[tuple[str, Tensor]]:
        return zip(self.names, self.gradients, strict=True)

    def selected(self, selects: Callable[[str], bool]) -> "Shards":
        """Those of the parameters that a rule selects by name."""
        chosen = [i for i, name in enumerate(self.names) if selects(name)]
        if len(chosen) == len(self.names):
            return self
        names, weights, gradients = (
            [values[i] for i in chosen] for values in (self.names, self.weights, self.gradients)
        )
        return Shards(names, weights, gradients, self.own, self.loss_scale)


@dataclass(frozen=True)
class Rule:
    """The base of all rules.

    Args:
        rho: The length of the perturbation.
        every: Perturb only in every N-th step, from the first step on (periodic SAM).

    Raises:
        StepError: rho is negative or not finite, or `every` is not a whole number above 0.
    """

    rho: float
    every: int = 1
    # combine_ gets a copy of the ascent gradient: one more copy of the weights until then.
    keeps_ascent: ClassVar[bool] = False
    # combine_ is to be called; both gradients must then be of all ranks.
    combines: ClassVar[bool] = False
    # The rule defines the losses of both passes itself.
    own_loss: ClassVar[bool] = False
    # Of each micro-batch, from its first sample on. At 0 the rule perturbs by what it remembers.
    ascent_share: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise StepError(f"rho must be finite and not negative, got {self.rho}")
        if not isinstance(self.every, int) or self.every < 1:
            raise StepError(f"every must be at least 1 and whole, got {self.every}")

    def perturbs_at(self, step: int) -> bool:
        return step % self.every == 0

    def selects(self, name: str) -> bool:
        """Whether the parameter of this name is perturbed."""
        return True

    def perturb_(self, shards: Shards, rho: float, memory: Memory | None, total: Total) -> Tensor:
        """Turn the gradients into the perturbation e of length rho, in place.

        Without an ascent pass the gradients are zeros, to be filled.

        Args:
            shards: Of the selected parameters.
            rho: The length of e in this step, which a schedule may have changed.
            memory: What the rule remembers, or None.
            total: Sums a tensor over the ranks that hold other parts.

        Returns:
            The norm that rho was divided by, a scalar. If it is not finite, the step is skipped.
        """
        raise NotImplementedError

    def descent_loss(self, loss: Loss) -> Loss:
        """The loss of the second gradient, given that of the first: the same."""
        return loss

    def combine_(
        self,
        shards: Shards,
        rho: float,
        ascent: Memory | None,
        memory: Memory | None,
        total: Total,
    ) -> Memory | None:
        """Change the gradient that the optimizer gets, in place. Called only if `combines`.

        Args:
            shards: All parameters with a gradient: that of the descent, or of a plain step.
            rho: The length of e in this step; at 0 both gradients are the same.
            ascent: The ascent gradient, by name; None in a plain step, or unless `keeps_ascent`.
            memory: What the rule remembers, or None.
            total: Sums a tensor over the ranks that hold other parts.

        Returns:
            What to remember from now on, or None if nothing new is. A skipped step changes nothing.
        """
        return None


def ratio(a: float | Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b, 0.0)


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
