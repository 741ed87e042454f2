"""What the step asks of an engine, and what all engines share."""

import inspect
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flatcal_dist.sharpness.engines.move import Displacement
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.rules import Rule, Shards
from flatcal_dist.sharpness.scope import Scope


class Engine(Protocol):
    """What the step asks of an engine. `model` is called, `module` is the network within it."""

    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer  # its param_groups hold the learning rate
    device: torch.device
    world_size: int

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by before backward, 1 but in fp16."""

    @property
    def scales_losses(self) -> bool:
        """Whether it does so at all, in fp16."""

    def check(self, rule: Rule, scope: Scope, per_micro_batch: bool) -> None:
        """Raises ValueError, with reason and alternatives, for what this engine cannot do."""

    def reduces(self, scope: Scope) -> bool:
        """Whether the reduction of its backward pass gives the gradient of this scope."""

    def leaves_own(self) -> bool:
        """Whether a backward pass that is not reduced leaves this rank's gradient in `shards`."""

    def all_parameters(self) -> list[nn.Parameter]:
        """All that the network has now, as the optimizer and the engine know them."""

    def broadcasting(self) -> AbstractContextManager[bool]:
        """Around the passes of a step: no forward pass changes buffers of one rank for another's.

        Gives whether that was done now instead, once for all passes.
        """

    def zero_gradients(self) -> None: ...

    def accumulation(self, reduce: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: whether gradients are reduced with it."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of the loss (times loss_scale); reduced, the mean over ranks."""

    def shards(self) -> Shards:
        """This rank's part of weights and reduced gradient."""

    def whole_weights(self) -> Shards:
        """All weights, whole, with no gradients yet; for engines whose ranks hold them so."""

    def total(self, part: Tensor) -> Tensor:
        """Sum over the ranks that hold the other parts of what `shards` gives; shape kept."""

    def moved(self, shards: Shards) -> AbstractContextManager[Displacement]:
        """Move the weights by e = shards.gradients; bring them back bit for bit on every way out.

        It takes the list of e over, and empties it. shards may be of a part of the parameters. It
        yields a function that measures the move, as the forward pass saw it, against the gradient
        that is there by then.
        """

    def gradient_norm(self) -> Tensor:
        """Of the gradient of all ranks and all parameters, without loss scale: float32 scalar."""

    def update(self, norm: Tensor, clip_norm: float | None) -> None:
        """Clip the gradient, whose norm is given; one step of the base optimizer; no gradients."""

    def skip(self) -> None:
        """Leave weights and optimizer as they are; no gradients; tell the loss scale."""

    def sum(self, values: Sequence[Tensor | float]) -> list[float]:
        """Scalars summed over ranks, in float64: one small reduction, one wait for the device."""

    def over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, as a new tensor. Called by all of them."""

    def synchronize_buffers(self) -> None:
        """Give every rank the buffers of rank 0, before weights are evaluated or saved."""

    @property
    def inference(self) -> nn.Module:
        """What is called for evaluation, by all ranks the same number of times."""

    def full_weights(self) -> dict[str, Tensor]:
        """Full fp32 weights and buffers by the network's own names, on the CPU; whole on rank 0.

        Called by all ranks. Never perturbed: a step leaves nothing behind.
        """

    def local_state(self) -> dict[str, Any]:
        """All that this rank needs to go on bit for bit: weights, optimizer state, loss scale.

        Tensors and plain containers only; what the next step changes, so copy it before.
        """

    def load_local_state(self, state: dict[str, Any]) -> None: ...

    def masters(self) -> dict[str, Tensor]:
        """This rank's part of each trained weight in fp32, by name, of any shape."""

    def rewritten(self) -> None:
        """The masters were changed from outside; called by all ranks before the next pass."""

    def arrangement(self) -> "Arrangement":
        """Where this rank's parts lie in the whole, for other engines and numbers of ranks."""

    def load_optimizer(self, state: dict[int, dict[str, Any]], groups: list[dict]) -> None:
        """Optimizer state of this rank, shaped as `arrangement` says; what else groups hold."""

    def set_loss_scale(self, value: float) -> None: ...


# Plain containers, for checkpoints. pieces: name -> [shape of the whole, where this rank's part
# begins in it when flat, length]; a part is contiguous. slots: by index of the optimizer's
# parameters, the shape on this rank and the parts in it when flat: [name, offset, length].
# loss_scale: as it is.
Arrangement = dict[str, Any]


def slots_by_parameter(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, Tensor]]
) -> list[list]:
    """Of an optimizer that holds the parameters themselves: each index has one part."""
    names = {id(weight): name for name, weight in parameters}
    held = [w for group in optimizer.param_groups for w in group["params"]]
    local = [w.to_local() if hasattr(w, "to_local") else w for w in held]
    return [
        [list(part.shape), [[names[id(weight)], 0, part.numel()]]]
        for weight, part in zip(held, local, strict=True)
    ]


def with_groups(
    optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]], groups: list[dict]
) -> dict[str, Any]:
    """A state_dict for this optimizer, with what saved groups hold beside their parameters."""
    own = optimizer.state_dict()["param_groups"]
    merged = [saved | {"params": group["params"]} for group, saved in zip(own, groups, strict=True)]
    return {"state": state, "param_groups": merged}


def stack(values: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """Scalars as one float64 vector."""
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])


def refuse_unusable(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Raises StepError for weights or an optimizer that no step of ours can serve."""
    if not weights:
        raise StepError("the network has no parameter that requires a gradient: nothing to train")
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise StepError(
                f"weight {name} is {weight.dtype}: weights are kept in float32, autocast or the "
                "engine's precision computes in less; call network.float()"
            )
    if type(optimizer).__module__.startswith("accelerate"):
        raise StepError(
            "the optimizer was prepared by Accelerate, which would scale and skip for itself: give "
            "the step the optimizer that went in, and prepare the network only"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise StepError(
            f"{type(optimizer).__name__} evaluates the loss by itself, as often as it likes; the "
            "step takes both passes: choose an optimizer whose step() needs no closure"
        )


def refuse_part(weights: dict[str, nn.Parameter], held: set[int]) -> None:
    """Raises StepError if an optimizer with parameters of these ids lacks a trainable weight."""
    lacking = [name for name, weight in weights.items() if id(weight) not in held]
    if lacking:
        raise StepError(
            f"the optimizer holds {len(weights) - len(lacking)} of {len(weights)} trainable "
            f"weights, and not {lacking[0]}: a perturbation and a gradient norm would still have "
            "them. Freeze what is not to be trained, requires_grad_(False), or give it to the "
            "optimizer"
        )
