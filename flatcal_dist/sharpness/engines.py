"""Engines: what of a step differs by how weights and gradients are laid out over ranks."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness.rules import SAM


class Engine(Protocol):
    """What the step asks of an engine. `model` is called, `module` is the network within it."""

    model: nn.Module
    module: nn.Module
    device: torch.device
    world_size: int

    def zero_gradients(self) -> None: ...

    def accumulation(self, synchronize: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: whether it reduces gradients."""

    def backward(self, loss: Tensor) -> None: ...

    def perturbed(self, rule: SAM, local: bool) -> AbstractContextManager[Tensor]:
        """Move to w + e, with the gradients at hand, and bring w back bit for bit on every way out.

        Gives ||g||; empties the gradients. local: from this rank's own gradient.
        """

    def gradient_norm(self) -> Tensor:
        """Of the gradient of all ranks and all parameters, a float32 scalar."""

    def update(self, norm: Tensor, clip_norm: float | None) -> None:
        """Clip the gradient, whose norm is given, to clip_norm; one step of the base optimizer."""

    def sum(self, values: Sequence[Tensor | float]) -> list[float]:
        """Scalars summed over ranks, in float64: one small reduction, one wait for the device."""

    def synchronize_buffers(self) -> None:
        """Give every rank the buffers of rank 0, before weights are evaluated or saved."""


class ReplicatedEngine:
    """One process, or DistributedDataParallel: every rank holds all weights.

    model: a module, or DistributedDataParallel around one (best with broadcast_buffers=False:
    buffers are broadcast when they are needed, not in each forward pass).
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.distributed = isinstance(model, DistributedDataParallel)
        self.module: nn.Module = model.module if self.distributed else model
        self.optimizer = optimizer
        self.weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        self.device = self.weights[0].device
        self.world_size = dist.get_world_size(model.process_group) if self.distributed else 1

    def zero_gradients(self) -> None:
        self.module.zero_grad(set_to_none=True)

    def accumulation(self, synchronize: bool) -> AbstractContextManager[None]:
        # The forward pass has to be inside as well: DDP decides there whether it will reduce.
        return self.model.no_sync() if self.distributed and not synchronize else nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @contextmanager
    def perturbed(self, rule: SAM, local: bool) -> Iterator[Tensor]:
        # Reduced or not, the gradients at hand are the ones asked for, and they are whole.
        weights, gradients = self._with_gradients()
        with torch.no_grad():
            norm = rule.squared_norm(weights, gradients).sqrt() if weights else self._zero()
            scale = torch.where(norm > 0, rule.rho / norm, 0.0)
            before = [weight.clone() for weight in weights]
        try:
            with torch.no_grad():
                if weights:
                    rule.perturb_(weights, gradients, scale)
            self.zero_gradients()
            yield norm
        finally:
            # A copy: w + e - e is not w in floating point, and with an e of its own on each rank
            # the replicas would drift apart. What was moved comes back, with a gradient or without.
            with torch.no_grad():
                if weights:
                    torch._foreach_copy_(weights, before)

    def gradient_norm(self) -> Tensor:
        gradients = self._with_gradients()[1]
        return nn.utils.get_total_norm(gradients).float() if gradients else self._zero()

    def update(self, norm: Tensor, clip_norm: float | None) -> None:
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.weights, clip_norm, norm)
        self.optimizer.step()

    def sum(self, values: Sequence[Tensor | float]) -> list[float]:
        total = torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values]
        )
        if self.distributed:
            dist.all_reduce(total, group=self.model.process_group)
        return total.tolist()

    def synchronize_buffers(self) -> None:
        if self.distributed:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, group=self.model.process_group, group_src=0)

    def _with_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        weights = [weight for weight in self.weights if weight.grad is not None]
        return weights, [weight.grad for weight in weights]

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.device)
