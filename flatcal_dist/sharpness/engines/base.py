"""What the step asks of an engine, and the functions that all engines share."""

import inspect
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flatcal_dist.sharpness.engines.move import Displacement
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.rules import Rule, Shards
from flatcal_dist.sharpness.scope import Scope


class Engine(Protocol):
    """What the step asks of an engine.

    `model` is what a forward pass calls, with all wrappers. `module` is the network as the engine
    calls it where no gradient is reduced. `named` is the network whose parameters have the names
    that the user gave them, without a prefix of torch.compile or of a wrapper.
    """

    model: nn.Module
    module: nn.Module
    named: nn.Module
    optimizer: torch.optim.Optimizer  # its param_groups hold the learning rate
    device: torch.device
    world_size: int

    @property
    def loss_scale(self) -> float:
        """The factor of losses before the backward pass, which is 1 but in fp16."""

    @property
    def scales_losses(self) -> bool:
        """Whether the engine scales losses at all, as it does in fp16."""

    def check(self, rule: Rule, scope: Scope, per_micro_batch: bool) -> None:
        """Raise StepError, with reason and alternatives, for what this engine cannot do.

        The engine is not changed by it.

        Args:
            rule: The rule of the step.
            scope: The ranks that perturb together.
            per_micro_batch: Whether each micro-batch has its own perturbation.
        """

    def reduces(self, scope: Scope) -> bool:
        """Return whether the engine's backward pass itself sums the gradient of this scope."""

    def leaves_own(self) -> bool:
        """Return whether a backward pass without a reduction leaves this rank's gradient behind.

        If so, `shards` gives that gradient.
        """

    def all_parameters(self) -> list[nn.Parameter]:
        """Return all parameters that the network has now, the trained ones and the others.

        They are the objects that the optimizer and the engine know.
        """

    def broadcasting(self) -> AbstractContextManager[bool]:
        """Return a context for the passes of one step.

        Inside it no forward pass replaces a rank's buffers by those of another rank. The context
        gives True if the buffers were broadcast on entry instead, once for all passes.
        """

    def zero_gradients(self) -> None:
        """Drop every gradient, those that were not reduced too."""

    def accumulation(self, reduce: bool) -> AbstractContextManager[None]:
        """Return a context for forward and backward pass of one micro-batch.

        `reduce` says whether the backward pass also sums the gradients over the ranks.
        """

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of the loss, times loss_scale.

        A reduced gradient is the mean over the ranks.
        """

    def fill_gradients(self, names: Iterable[str]) -> None:
        """Give each of these parameters a gradient of zeros, if no pass has given it one."""

    def shards(self, scope: Scope) -> Shards:
        """Return this rank's part of the weights, and of the gradient that passes have left.

        The gradient is the mean over the ranks of the scope, if `reduces(scope)` is true and the
        last backward pass reduced. Otherwise it is this rank's.
        """

    def whole_weights(self) -> Shards:
        """Return all weights whole, without gradients. Only for engines whose ranks hold them so.

        Raises StepError where no rank does.
        """

    def weight_decays(self) -> dict[str, float]:
        """Return the weight decay that the optimizer gives to each trained weight, by name."""

    def total(self, part: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks that hold the other parts of `masters`.

        Its shape is kept. Called by all ranks.
        """

    def moved(self, shards: Shards) -> AbstractContextManager[Displacement]:
        """Return a context in which the weights are moved by e = shards.gradients.

        The weights come back bit for bit on every way out. The engine takes the list of e over and
        empties it. `shards` may hold a part of the parameters. The context gives a function that
        measures e, as the forward pass saw it, against the gradient of that moment.
        """

    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradient of all ranks and all parameters, a float32 scalar.

        The loss scale is divided out.
        """

    def update(self, norm: Tensor, clip_norm: float | None) -> None:
        """Clip the gradient, take one step of the base optimizer, and drop the gradients.

        Args:
            norm: The norm of the gradient, as `gradient_norm` gives it.
            clip_norm: The largest norm, or None for no clipping.
        """

    def skip(self) -> None:
        """Leave weights and optimizer as they are, drop the gradients, and tell the loss scale."""

    def sum(self, values: Sequence[Tensor | float]) -> list[float]:
        """Return scalars summed over ranks, in float64.

        It takes one small reduction and one wait for the device.
        """

    def over_ranks(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, as a new tensor. Called by all ranks."""

    def synchronize_buffers(self) -> None:
        """Give every rank the buffers of rank 0, before weights are evaluated or saved."""

    @property
    def inference(self) -> nn.Module:
        """The module to call for evaluation. All ranks call it equally often."""

    def full_weights(self) -> dict[str, Tensor]:
        """Return the full fp32 weights and the buffers by the network's names, on the CPU.

        They are whole on rank 0. Called by all ranks. They are never perturbed, because a step
        leaves nothing behind.
        """

    def local_state(self) -> dict[str, Any]:
        """Return all that this rank needs to go on bit for bit.

        That is weights, optimizer state and loss scale, as tensors and plain containers. The next
        step changes these tensors, so copy them before it.
        """

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Go on from what `local_state` gave on the same rank, among as many ranks."""

    def masters(self) -> dict[str, Tensor]:
        """Return this rank's part of each trained weight in fp32, by name, in any shape."""

    def rewritten(self) -> None:
        """Take note that the masters were changed from outside.

        Called by all ranks before the next pass.
        """

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of each weight of which this rank holds a part, by name."""

    def arrangement(self) -> "Arrangement":
        """Return where this rank's parts lie in the whole, for other engines and rank counts."""

    def load_optimizer(self, state: dict[int, dict[str, Any]], groups: list[dict]) -> None:
        """Load the optimizer state of this rank.

        Args:
            state: The state by index of the optimizer's parameters, shaped as `arrangement` says.
            groups: What the saved parameter groups held beside their parameters.
        """

    def set_loss_scale(self, value: float) -> None:
        """Set the loss scale, if the engine has one."""


# It consists of plain containers, for checkpoints.
# pieces: name -> [shape of the whole, where this rank's part begins in it when flat, length]; a
#   part is contiguous.
# slots: for each index of the optimizer's parameters, the shape on this rank and the parts in it
#   when flat: [name, offset, length].
# loss_scale: the loss scale.
Arrangement = dict[str, Any]


def slots_by_parameter(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, Tensor]]
) -> list[list]:
    """Return the slots of an optimizer that holds the parameters themselves.

    Each index then has one part.
    """
    names = {id(weight): name for name, weight in parameters}
    held = [w for group in optimizer.param_groups for w in group["params"]]
    local = [w.to_local() if isinstance(w, DTensor) else w for w in held]
    return [
        [list(part.shape), [[names[id(weight)], 0, part.numel()]]]
        for weight, part in zip(held, local, strict=True)
    ]


def rates_by_name(optimizer: torch.optim.Optimizer, slots: list[list]) -> dict[str, float]:
    """Return the learning rate of each weight that has a part in the slots of an optimizer."""
    left = iter(slots)
    return {
        name: float(group["lr"])
        for group in optimizer.param_groups
        for _, (_, parts) in zip(group["params"], left, strict=False)
        for name, _, _ in parts
    }


def with_groups(
    optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]], groups: list[dict]
) -> dict[str, Any]:
    """Return a state_dict for this optimizer.

    Args:
        optimizer: Its parameter groups give the indices of their parameters.
        state: The state by index.
        groups: What the saved parameter groups held beside their parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    merged = [saved | {"params": group["params"]} for group, saved in zip(own, groups, strict=True)]
    return {"state": state, "param_groups": merged}


def stack(values: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """Return scalars as one float64 vector on the device."""
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])


def refuse_unusable(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Raise StepError for weights or an optimizer that the step cannot serve."""
    if not weights:
        raise StepError("the network has no parameter that requires a gradient: nothing to train")
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise StepError(
                f"weight {name} is {weight.dtype}: weights are kept in float32, and autocast or "
                "the engine's precision computes in less; call network.float()"
            )
    if type(optimizer).__module__.startswith("accelerate"):
        raise StepError(
            "the optimizer was prepared by Accelerate, which would scale losses and skip steps on "
            "its own: give the engine the optimizer that you built, and prepare the network only"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise StepError(
            f"{type(optimizer).__name__} evaluates the loss by itself, as often as it likes, but "
            "the step takes both passes: choose an optimizer whose step() needs no closure"
        )


def refuse_part(weights: dict[str, nn.Parameter], held: set[int]) -> None:
    """Raise StepError if an optimizer with parameters of these ids lacks a trainable weight."""
    lacking = [name for name, weight in weights.items() if id(weight) not in held]
    if lacking:
        raise StepError(
            f"the optimizer holds {len(weights) - len(lacking)} of {len(weights)} trainable "
            f"weights, and {lacking[0]} is missing: perturbation and gradient norm would still "
            "include it. Freeze what is not to be trained, requires_grad_(False), or give it to "
            "the optimizer"
        )
