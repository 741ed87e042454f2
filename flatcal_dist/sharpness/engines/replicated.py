"""The engine of one process and of DistributedDataParallel: every rank holds all weights."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness.engines.base import (
    Arrangement,
    refuse_part,
    refuse_unusable,
    slots_by_parameter,
    with_groups,
)
from flatcal_dist.sharpness.engines.fabric import within_fabric
from flatcal_dist.sharpness.engines.loss_scale import LossScale
from flatcal_dist.sharpness.engines.move import Backup, Displacement, measure
from flatcal_dist.sharpness.engines.of_parameters import OfParameters
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.networks import refuse_sparse, refuse_unheld, sparse_refused
from flatcal_dist.sharpness.passes.buffers import broadcast_buffers, set_buffers
from flatcal_dist.sharpness.rules import Rule, Shards, squared_norm
from flatcal_dist.sharpness.scope import Scope

NOT_ROUNDED = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.PReLU
)  # fmt: skip


class ReplicatedEngine(OfParameters):
    """One process, or DistributedDataParallel: every rank holds all weights.

    Args:
        model: A module, or DistributedDataParallel around one, compiled or not, or a wrapper around
            either, such as Lightning Fabric's. DistributedDataParallel is best built with
            broadcast_buffers=False: buffers are broadcast when they are needed. Otherwise they are
            broadcast once at the beginning of each step.
        optimizer: An optimizer of the float32 parameters of the model.
        compute_dtype: The type that autocast rounds weights to, if it does. With torch.float16 the
            engine scales losses.

    Raises:
        StepError: The engine cannot serve this model or optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.wrapper = _find_wrapper(model)
        self.distributed = self.wrapper is not None
        self.group = self.wrapper.process_group if self.wrapper else None
        inner = getattr(model, "_orig_mod", model)  # torch.compile may be around either
        # A wrapper of the user's around DDP is a part of the network.
        wraps_all = self.wrapper is not None and inner is self.wrapper
        self.module: nn.Module = self.wrapper.module if self.wrapper and wraps_all else model
        original = within_fabric(inner)
        within = self.wrapper.module if self.wrapper else original
        self.named: nn.Module = getattr(within, "_orig_mod", within)
        refuse_unheld(self.named)
        self.optimizer = optimizer
        self.weights = {n: w for n, w in self.named.named_parameters() if w.requires_grad}
        refuse_unusable(self.weights, optimizer)
        own = {id(w) for w in self.named.parameters()}
        held = {id(w) for group in optimizer.param_groups for w in group["params"]}
        if not held <= own:
            raise StepError("the optimizer holds parameters of another network than the step's")
        refuse_part(self.weights, held)
        self.device = next(iter(self.weights.values())).device
        self.world_size = dist.get_world_size(self.group) if self.distributed else 1
        _refuse_part_of_the_world(self.world_size)
        # Accelerate keeps the forward of a network that it casts for.
        if compute_dtype == torch.float32 and hasattr(self.named, "_original_forward"):
            raise StepError(
                "the network was prepared by Accelerate in mixed precision, and the engine was not "
                "told: give it torch.bfloat16 or torch.float16, whose losses have to be scaled"
            )
        self.dtypes = _dtypes_under_autocast(self.named, compute_dtype)
        self.scale = LossScale.start(compute_dtype)
        self.backup = Backup()

    def check(self, rule: Rule, scope: Scope, per_micro_batch: bool) -> None:
        # Every rule and every scope, but for this: a rank's own gradient has to bypass DDP.
        own = per_micro_batch or not scope.everyone
        if own and self.reduces_always and self.module is self.model:
            raise StepError(
                "a static graph of DistributedDataParallel within another wrapper reduces every "
                "gradient, and this scope needs one that is not reduced: use static_graph=False, "
                "or scope 'global' without per_micro_batch"
            )

    def reduces(self, scope: Scope) -> bool:
        return scope.everyone

    @property
    def reduces_always(self) -> bool:
        """Whether every backward pass reduces, as in DDP with a static graph.

        Such a graph fails in a pass that must not reduce. It costs one reduction for each
        micro-batch. The gradient is the same, because the sum of means is the mean of sums.
        """
        return self.wrapper is not None and self.wrapper.static_graph

    def leaves_own(self) -> bool:
        return not self.reduces_always

    def all_parameters(self) -> list[nn.Parameter]:
        return list(self.named.parameters())

    @contextmanager
    def broadcasting(self) -> Iterator[bool]:
        # DDP broadcasts in the first forward pass after one that was reduced. A perturbation of a
        # rank's own is not reduced, or goes around DDP: one of its passes would have buffers of
        # rank 0, and the other those of the rank.
        wrapper = self.wrapper
        if wrapper is None or not (wrapper.broadcast_buffers and wrapper.modules_buffers):
            yield False
            return
        wrapper._sync_buffers()  # as its forward pass would
        wrapper.broadcast_buffers = False
        try:
            yield True
        finally:
            wrapper.broadcast_buffers = True

    def zero_gradients(self) -> None:
        self.module.zero_grad(set_to_none=True)

    def accumulation(self, reduce: bool) -> AbstractContextManager[None]:
        # The forward pass has to be inside as well: DDP decides there whether it will reduce.
        if self.wrapper is None or reduce or self.reduces_always:
            return nullcontext()
        return self.wrapper.no_sync()

    def backward(self, loss: Tensor) -> None:
        with sparse_refused():
            (loss * self.loss_scale).backward()

    def shards(self, scope: Scope) -> Shards:
        return self._held()

    def _held(self) -> Shards:
        held = {n: (w, w.grad) for n, w in self.weights.items() if w.grad is not None}
        for name, (_, gradient) in held.items():
            refuse_sparse(name, gradient)
        weights, gradients = [w for w, _ in held.values()], [g for _, g in held.values()]
        return Shards(list(held), weights, gradients, loss_scale=self.loss_scale)

    def whole_weights(self) -> Shards:
        weights = list(self.weights.values())
        return Shards(list(self.weights), weights, [], own=True, loss_scale=self.loss_scale)

    def total(self, part: Tensor) -> Tensor:
        return part  # every rank has all of it

    @contextmanager
    def moved(self, shards: Shards) -> Iterator[Displacement]:
        weights = [self.weights[name] for name in shards.names]
        dtypes = [self.dtypes[name] for name in shards.names]
        with self.backup.moved(shards) as before:
            yield lambda: measure(weights, before, [w.grad for w in weights], dtypes)

    def gradient_norm(self) -> Tensor:
        return squared_norm(self._held().gradients).to(self.device).sqrt() / self.loss_scale

    def update(self, norm: Tensor, clip_norm: float | None) -> None:
        self.scale.unscale_(self._held().gradients)
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.weights.values(), clip_norm, norm)
        self.optimizer.step()
        self.zero_gradients()
        self.scale.update(skipped=False)

    def over_ranks(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        if self.distributed:
            dist.all_reduce(total, group=self.group)
        return total

    def synchronize_buffers(self) -> None:
        if self.distributed:
            broadcast_buffers(self.module, self.group)

    @property
    def inference(self) -> nn.Module:
        return self.module

    def full_weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.named.state_dict().items()}

    def local_state(self) -> dict[str, Any]:
        return {
            "weights": self.named.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scale": vars(self.scale),
        }

    def load_local_state(self, state: dict[str, Any]) -> None:
        set_buffers(self.named, state["weights"], self.device)  # some may have changed their shape
        self.named.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scale = LossScale(**state["scale"])

    def masters(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.weights.items()}

    def rewritten(self) -> None:
        pass  # there is no other copy

    def arrangement(self) -> Arrangement:
        return {
            "pieces": {n: [list(w.shape), 0, w.numel()] for n, w in self.weights.items()},
            "slots": slots_by_parameter(self.optimizer, self.named.named_parameters()),
            "loss_scale": self.loss_scale,
        }

    def load_optimizer(self, state: dict[int, dict[str, Any]], groups: list[dict]) -> None:
        self.optimizer.load_state_dict(with_groups(self.optimizer, state, groups))


def _dtypes_under_autocast(network: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the type in which each parameter is used.

    Autocast rounds the weights that are multiplied with activations. It leaves parameters of norm
    layers, embeddings and the like as they are.
    """
    kept = {id(w) for m in network.modules() if _keeps(m) for w in m.parameters(recurse=False)}
    return {
        name: torch.float32 if id(weight) in kept else dtype
        for name, weight in network.named_parameters()
    }


def _keeps(module: nn.Module) -> bool:
    return isinstance(module, NOT_ROUNDED) or "norm" in type(module).__name__.lower()


def _find_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel in or around the network, or None where there is none.

    Raises StepError for a network of which only a part is wrapped, or that another engine serves.
    """
    for name, weight in model.named_parameters():
        other = "ShardedEngine" if isinstance(weight, DTensor) else None
        other = "ZeroEngine" if hasattr(weight, "ds_id") else other
        if other:
            raise StepError(f"weight {name} is sharded over ranks: the engine for that is {other}")
    for module in model.modules():
        if type(module).__module__.partition(".")[0] == "deepspeed":
            raise StepError("the network is DeepSpeed's: the engine for that is ZeroEngine")
    found = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    if not found:
        return None
    if len(found) > 1:
        raise StepError(
            f"{len(found)} parts of the network are wrapped in DistributedDataParallel by "
            "themselves, and would reduce their gradients one without the others: wrap the whole "
            "network once"
        )
    reduced = {id(weight) for weight in found[0].parameters()}
    for name, weight in model.named_parameters():
        if weight.requires_grad and id(weight) not in reduced:
            raise StepError(
                f"weight {name} is outside of the DistributedDataParallel within the network: its "
                "gradient would not be reduced, and ranks would drift apart. Wrap the whole network"
            )
    return found[0]


def _refuse_part_of_the_world(ranks: int) -> None:
    running = dist.get_world_size() if dist.is_initialized() else 1
    if 1 < ranks < running:
        raise StepError(
            f"the network is wrapped for {ranks} of the {running} ranks that run: wrap it in "
            "DistributedDataParallel without process_group"
        )
    if ranks < running:
        warnings.warn(
            f"{running} ranks run and the network is not wrapped: each trains its own. If one is "
            "meant, wrap it in DistributedDataParallel first",
            stacklevel=3,
        )
