"""The contract of a rule: where the descent gradient is taken, of which loss, and its use.

A rule is tensor mathematics alone. It sees matching lists of tensors (`Shards`), which are whole
parameters or the parts of them that one rank holds, and what else it needs (`Context`). The step
asks a rule, in this order:

    perturbs_at(step)    Does this step perturb? If not, it is a plain one.
    ascent_share         On which share of the batch is the ascent gradient taken? 0: there is none.
    selects(name)        Is the parameter of this name perturbed? (`select` narrows it down.)
    perturb_             Turn the ascent gradient into the perturbation e, in place.
    descent_loss(loss)   Which loss is followed at w + e, given the loss of the ascent?
    combine_             Change the descent gradient, in place, and say what to remember.
    decoupled            Does what `combine_` returns move the weights after the optimizer's step?

Only `perturb_` has to be written. A new rule is one file with one class. Its `name` is the value of
`sharpness.rule` in a configuration, and its fields are keys of the section `sharpness`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flatcal_dist.choices import check
from flatcal_dist.sharpness.errors import StepError

# (logits [N, K], targets of N samples) -> losses [N]: an Objective, or a function made of one.
Loss = Callable[[Tensor, Any], Tensor]
Memory = dict[str, Tensor]  # a tensor for each parameter, by name
Total = Callable[[Tensor], Tensor]

Length = Annotated[float, Field(ge=0, le=1000, description="The length of the perturbation.")]
Every = Annotated[
    int,
    Field(ge=1, le=10**12, description="Perturb only in every N-th step, from the first step on."),
]
Select = Annotated[
    Literal["all", "norms"],
    Field(
        description="Which weights are perturbed. norms: only those of norm layers (SAM-ON, "
        "Mueller et al., NeurIPS 2023)."
    ),
]
Share = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="The share of each micro-batch, from its first image on, that gives the "
        "ascent gradient. A smaller share costs less.",
    ),
]


def _unchanged(part: Tensor) -> Tensor:
    """The sum over ranks where each rank has all parts."""
    return part


AscentDecay = Annotated[
    bool,
    Field(
        description="Whether the ascent gradient holds the optimizer's weight decay, as that of a "
        "loss with an L2 penalty does (code of Foret et al.)."
    ),
]


@dataclass
class Shards:
    """What one rank holds of the weights and of a gradient at them: three lists of one length.

    Args:
        names: The names of the parameters in the network.
        weights: The weights in full precision. A rule does not change them.
        gradients: The gradients, which are changed in place.
        own: Whether nobody else reads the memory of these gradients. It can then hold the weights
            at w while they are moved.
        loss_scale: The factor that the gradients were multiplied by.
        weight: What the samples of these gradients weigh in the whole batch. The gradients of their
            mean loss were multiplied by it as well. Only known for a rule with `length_counts`
            or `decays_ascent`.
        total: Sums a tensor over the ranks that hold the other parts. Its shape is kept.
    """

    names: Sequence[str]
    weights: Sequence[Tensor]
    gradients: list[Tensor]
    own: bool = False
    loss_scale: float = 1.0
    weight: float | Tensor = 1.0
    total: Total = _unchanged

    def by_name(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and gradient of each parameter."""
        return zip(self.names, self.gradients, strict=True)

    def selected(self, selects: Callable[[str], bool]) -> "Shards":
        """Return the shards of the parameters that a rule selects by name."""
        chosen = [i for i, name in enumerate(self.names) if selects(name)]
        if len(chosen) == len(self.names):
            return self
        return replace(
            self,
            names=[self.names[i] for i in chosen],
            weights=[self.weights[i] for i in chosen],
            gradients=[self.gradients[i] for i in chosen],
        )


@dataclass
class Context:
    """What a rule knows of the step, beside weights and gradients.

    Args:
        rho: The length of e in this step. A schedule may have changed it.
        memory: What the rule remembers, or None.
        total: Sums a tensor over the ranks that hold the other parts. Its shape is kept.
        ascent: The ascent gradient by name, for `combine_` only. It is None in a plain step, and
            for a rule that does not set `keeps_ascent`.
        ascent_norm: The norm of the ascent gradient of all parameters, for `combine_` only. It is
            None in a plain step, and for a rule that does not set `keeps_norm`.
        progress: The share of training that is over, in [0, 1]. 0 where nobody told the step.
    """

    rho: float
    memory: Memory | None
    total: Total
    ascent: Memory | None = None
    ascent_norm: Tensor | None = None
    progress: float = 0.0


@dataclass(frozen=True)
class Rule(ABC):
    """The base of all rules.

    Args:
        rho: The length of the perturbation.
        every: Perturb only in every N-th step, from the first step on (periodic SAM).
        select: Perturb all weights, or those of norm layers only (SAM-ON).

    Raises:
        StepError: A field has another type than it declares, or lies outside its bounds.
    """

    name: ClassVar[str]  # in the configuration

    rho: Length = 0.05
    every: Every = 1
    select: Select = field(default="all", kw_only=True)
    # Whether `combine_` gets a copy of the ascent gradient. It takes the memory of one more copy of
    # the weights until then.
    keeps_ascent: ClassVar[bool] = False
    # Whether `combine_` gets the norm of the ascent gradient.
    keeps_norm: ClassVar[bool] = False
    # Whether e depends on the length of the ascent gradient, and not on its direction alone. Its
    # length is then `Shards.weight`.
    length_counts: ClassVar[bool] = False
    # Whether `combine_` is called. Both gradients must then be of all ranks.
    combines: ClassVar[bool] = False
    # Whether `combine_` returns something to remember, which checkpoints hold. The step does not
    # need to know it: documentation and verification do.
    remembers: ClassVar[bool] = False
    # Whether the rule defines the losses of both passes itself, from class indices.
    own_loss: ClassVar[bool] = False
    # Whether the targets that the descent loss gets hold the outputs at w (`Targets.at_w`).
    follows_outputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self, StepError)

    @property
    def ascent_share(self) -> float:
        """The share of each micro-batch, from its first sample on, that gives the ascent gradient.

        At 0 there is no ascent pass: the rule perturbs by what it remembers.
        """
        return 1.0

    @property
    def decays_ascent(self) -> bool:
        """Whether `perturb_` gets g + (weight decay of the optimizer) * w in place of g."""
        return False

    @property
    def decoupled(self) -> bool:
        """Whether `combine_` returns no memory, but a second descent direction for the weights.

        Each weight then moves by -(learning rate) times it, after the optimizer's step.
        """
        return False

    def perturbs_at(self, step: int) -> bool:
        """Return whether the step of this number, counted from 0, perturbs."""
        return step % self.every == 0

    def selects(self, name: str) -> bool:
        """Return whether the parameter of this name is perturbed."""
        return True

    @abstractmethod
    def perturb_(self, shards: Shards, context: Context) -> Tensor:
        """Turn the gradients of the selected parameters into e, of length rho, in place.

        For a rule without an ascent pass the gradients are zeros, which it fills. The function
        returns the norm that rho was divided by, a scalar. If it is not finite, the step is
        skipped.
        """

    def descent_loss(self, loss: Loss) -> Loss:
        """Return the loss of the second gradient, given the loss of the first."""
        return loss

    def combine_(self, shards: Shards, context: Context) -> Memory | None:
        """Change the gradient that the optimizer gets, in place. Called only if `combines`.

        The shards hold all parameters with a gradient, from the descent or from a plain step. The
        function returns what to remember from now on, or None if there is nothing new. A skipped
        step changes nothing.
        """
        return None


@dataclass(frozen=True)
class AscentRule(Rule):
    """A rule with an ascent pass, which may be on a share of the batch.

    Args:
        share: The share of each micro-batch that gives the ascent gradient.
        ascent_decay: Whether the ascent gradient holds the optimizer's weight decay.
    """

    share: Share = field(default=1.0, kw_only=True)
    ascent_decay: AscentDecay = field(default=False, kw_only=True)

    @property
    def ascent_share(self) -> float:
        return self.share

    @property
    def decays_ascent(self) -> bool:
        return self.ascent_decay


def along_gradient_(shards: Shards, context: Context) -> Tensor:
    """Turn gradients into e = rho * g / ||g||_2, in place, and return the norm of all of them."""
    norm = context.total(squared_norm(shards.gradients)).sqrt()
    if shards.gradients:  # a rank may hold none of what is perturbed
        torch._foreach_mul_(shards.gradients, ratio(context.rho, norm))
    return norm


def along_memory_(shards: Shards, context: Context, sign: int) -> Tensor:
    """Turn zeros into e = sign * rho * v / ||v||_2, with v what the rule remembers.

    Without a memory e is 0. Returns the norm of v.
    """
    memory = context.memory or {}
    held = [memory.get(name) for name in shards.names]
    norm = context.total(squared_norm([v for v in held if v is not None])).sqrt()
    scale = sign * ratio(context.rho, norm)
    for e, v in zip(shards.gradients, held, strict=True):
        if v is not None:
            torch.mul(v, scale, out=e)
    return norm


def ratio(a: float | Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b, 0.0)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements, a float32 scalar."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.stack(norms).square().sum()


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the sum of the products of all elements, a float32 scalar."""
    if not a:
        return torch.zeros(())
    return torch.stack([(x.float() * y.float()).sum() for x, y in zip(a, b, strict=True)]).sum()
