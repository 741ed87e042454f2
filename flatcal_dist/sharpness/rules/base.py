"""The contract of a rule: where the descent gradient is taken, of which loss, and its use.

A rule is pure tensor mathematics. It sees matching lists of tensors (`Shards`), which are whole
parameters or the parts of them that one rank holds, and what else it needs (`Context`). The step
asks a rule, in this order:

    perturbs_at(step)    Does this step perturb? If not, it is a plain one.
    ascent_share         On which share of the batch is the ascent gradient taken? 0: there is none.
    selects(name)        Is the parameter of this name perturbed?
    perturb_             Turn the ascent gradient into the perturbation e, in place.
    descent_loss(loss)   Which loss is followed at w + e, given that of the ascent?
    combine_             Change the descent gradient, in place, and say what to remember.

Only `perturb_` has to be written. A new rule is one file with one class: its `name` is what a
configuration calls it, and its fields are keys of the configuration's section `sharpness`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flatcal_dist.choices import check
from flatcal_dist.sharpness.errors import StepError

# (logits [N, K], targets of N samples) -> losses [N]: an Objective, or a function made of one.
Loss = Callable[[Tensor, Any], Tensor]
Memory = dict[str, Tensor]  # a tensor for each parameter, by name


Length = Annotated[float, Field(ge=0, le=1000, description="The length of the perturbation.")]
Every = Annotated[
    int,
    Field(ge=1, le=10**12, description="Perturb only in every N-th step, from the first step on."),
]


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


@dataclass
class Context:
    """What a rule knows of the step, beside weights and gradients.

    rho: the length of e in this step, which a schedule may have changed. memory: what the rule
    remembers, or None. total: sums a tensor over the ranks that hold other parts; its shape is
    kept. ascent: the ascent gradient by name, for `combine_` only; None in a plain step, or unless
    the rule `keeps_ascent`.
    """

    rho: float
    memory: Memory | None
    total: Callable[[Tensor], Tensor]
    ascent: Memory | None = None


@dataclass(frozen=True)
class Rule(ABC):
    """The base of all rules.

    Args:
        rho: The length of the perturbation.
        every: Perturb only in every N-th step, from the first step on (periodic SAM).

    Raises:
        StepError: A field has another type than it declares, or lies outside its bounds.
    """

    name: ClassVar[str]  # in the configuration

    rho: Length = 0.05
    every: Every = 1
    # combine_ gets a copy of the ascent gradient: one more copy of the weights until then.
    keeps_ascent: ClassVar[bool] = False
    # combine_ is to be called; both gradients must then be of all ranks.
    combines: ClassVar[bool] = False
    # The rule defines the losses of both passes itself, from class indices.
    own_loss: ClassVar[bool] = False
    # Of each micro-batch, from its first sample on. At 0 the rule perturbs by what it remembers.
    ascent_share: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check(self, StepError)

    def perturbs_at(self, step: int) -> bool:
        return step % self.every == 0

    def selects(self, name: str) -> bool:
        """Whether the parameter of this name is perturbed."""
        return True

    @abstractmethod
    def perturb_(self, shards: Shards, context: Context) -> Tensor:
        """Turn the gradients of the selected parameters into e, of length rho, in place.

        Without an ascent pass the gradients are zeros, to be filled. Returns the norm that rho was
        divided by, a scalar. If it is not finite, the step is skipped.
        """

    def descent_loss(self, loss: Loss) -> Loss:
        """The loss of the second gradient, given that of the first: the same."""
        return loss

    def combine_(self, shards: Shards, context: Context) -> Memory | None:
        """Change the gradient that the optimizer gets, in place. Called only if `combines`.

        shards are all parameters with a gradient, that of the descent or of a plain step. Returns
        what to remember from now on, or None if nothing new is. A skipped step changes nothing.
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
