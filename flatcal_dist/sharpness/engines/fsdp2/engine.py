"""FSDP2: weights, gradients and optimizer state cut into shards over ranks (ZeRO-3's layout).

Every rank holds its rows of each parameter in fp32. A forward or backward pass gathers the whole
of a block from the shards, in the precision of the pass, and drops it again. So a perturbation
changes the shards while nothing whole is held, and the next forward pass sees it without more work.

Only the public interface of torch.distributed.fsdp is used, but for passes.py.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flatcal_dist.sharpness.engines.base import (
    Arrangement,
    refuse_part,
    refuse_unusable,
    slots_by_parameter,
    with_groups,
)
from flatcal_dist.sharpness.engines.fsdp2.passes import end_passes, forget_gradients, refuse_unknown
from flatcal_dist.sharpness.engines.fsdp2.start import in_full_precision
from flatcal_dist.sharpness.engines.fsdp2.state import (
    copy_into,
    join,
    local,
    parameters_of,
    sharded,
    sharded_like,
    split,
)
from flatcal_dist.sharpness.engines.loss_scale import LossScale
from flatcal_dist.sharpness.engines.move import Backup, Displacement, Measured, measure
from flatcal_dist.sharpness.engines.of_parameters import OfParameters
from flatcal_dist.sharpness.engines.optimizer_probe import refuse_rows
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.networks import sparse_refused
from flatcal_dist.sharpness.passes.buffers import broadcast_buffers, set_buffers
from flatcal_dist.sharpness.rules import Rule, Shards, squared_norm
from flatcal_dist.sharpness.scope import Scope


class ShardedEngine(OfParameters):
    """A network sharded by `start.shard`, and an optimizer on its sharded parameters.

    The engine perturbs for all ranks. Where the network is sharded over groups of ranks, it can
    also perturb for each group alone, since each group holds all weights. Replicas (ranks of
    different groups with the same shard) then average their gradients after the backward pass.

    While micro-batches accumulate, each rank holds a whole gradient in fp32.

    Args:
        model: The network, as `shard` gives it.
        optimizer: An optimizer, built on the network's parameters after `shard`.
        compute_dtype: The precision that the network was sharded with. With torch.float16 the
            engine scales losses.

    Raises:
        StepError: The network is not sharded so, or the optimizer cannot serve it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = self.module = self.named = model
        self.optimizer = optimizer
        # Kept, and not looked up: while a block is gathered, the network has other parameters.
        self.parameters = dict(model.named_parameters())
        self.root = _refuse_unsharded(model, self.parameters, optimizer)
        self.weights = {n: w for n, w in self.parameters.items() if w.requires_grad}
        self.blocks = [m for m in model.modules() if isinstance(m, FSDPModule)]
        refuse_unusable(self.weights, optimizer)
        refuse_part(self.weights, {id(w) for w in parameters_of(optimizer)})
        shapes = [[tuple(w.shape) for w in group["params"]] for group in optimizer.param_groups]
        refuse_rows(optimizer, shapes, sharded(parameters_of(optimizer)[0]).device_mesh)
        first = sharded(next(iter(self.weights.values())))
        self.device = first.to_local().device
        self.world_size = dist.get_world_size()
        self.group = first.device_mesh.get_group()
        self.replicas = self._replicas(dist.get_process_group_ranks(self.group))
        self.averaged = False  # whether the present gradient is the mean over replicas
        whole = in_full_precision(model)
        self.dtypes = {
            n: torch.float32 if id(w) in whole else compute_dtype for n, w in self.weights.items()
        }
        self.scale = LossScale.start(compute_dtype)
        self.backup = Backup()

    def _replicas(self, ranks: list[int]) -> Scope:
        """Return the ranks that hold the same shard as this one, as a scope to sum over."""
        size = len(ranks)
        if ranks != list(range(ranks[0] // size * size, ranks[0] // size * size + size)):
            raise StepError(
                f"FSDP2 shards over groups of consecutive ranks only, and the mesh has {ranks}"
            )
        count = self.world_size // size
        group = None
        if 1 < count < self.world_size:
            same = [list(range(i, self.world_size, size)) for i in range(size)]
            found, _ = dist.new_subgroups_by_enumeration(same)
            assert not isinstance(found, int)  # every rank is in one of the groups
            group = found
        return Scope("replicas", count, count == self.world_size, group)

    @property
    def inference(self) -> nn.Module:
        return self.model

    def reduces(self, scope: Scope) -> bool:
        return scope.everyone or scope.ranks == self.world_size // self.replicas.ranks

    def check(self, rule: Rule, scope: Scope, per_micro_batch: bool) -> None:
        ranks = self.world_size // self.replicas.ranks
        if per_micro_batch:
            raise StepError(
                "per_micro_batch takes ascent gradients beside the one that accumulates, and FSDP2 "
                "has one place for gradients; use DDP, or perturb once per step"
            )
        if not self.reduces(scope):
            raise StepError(
                f"scope {scope.name!r} needs other weights in every {scope.ranks} of "
                f"{self.world_size} ranks, but {ranks} ranks gather their weights from each "
                "other's shards; use scope 'global', shard over groups of so many ranks "
                "(ranks_per_group), or use DDP"
            )

    def leaves_own(self) -> bool:
        return False

    def all_parameters(self) -> list[nn.Parameter]:
        self._drop_gathered()  # whole ones are other objects
        return list(self.module.parameters())

    def broadcasting(self) -> AbstractContextManager[bool]:
        return nullcontext(False)

    def zero_gradients(self) -> None:
        for weight in self.weights.values():
            weight.grad = None
        forget_gradients(self.model)

    @contextmanager
    def accumulation(self, reduce: bool) -> Iterator[None]:
        self.root.set_requires_gradient_sync(reduce)
        try:
            yield
        except BaseException:
            end_passes(self.model)
            raise

    def backward(self, loss: Tensor) -> None:
        self.averaged = False
        with sparse_refused():
            (loss * self.loss_scale).backward()

    def shards(self, scope: Scope) -> Shards:
        if not scope.everyone:  # each group perturbs alone
            return replace(self._held(), total=self._total_of_group)
        self._average()
        return replace(self._held(), total=self.total)

    @torch.no_grad()
    def _held(self) -> Shards:
        held = {n: (w, w.grad) for n, w in self.weights.items() if w.grad is not None}
        weights = [local(w) for w, _ in held.values()]
        gradients = [local(gradient) for _, gradient in held.values()]
        return Shards(list(held), weights, gradients, loss_scale=self.loss_scale)

    @torch.no_grad()
    def _average(self) -> None:
        """Average the gradient over replicas, bit for bit the same on them."""
        gradients = self._held().gradients
        if self.replicas.ranks > 1 and gradients and not self.averaged:
            self.replicas.sum_(gradients)
            torch._foreach_div_(gradients, self.replicas.ranks)
        self.averaged = True

    def whole_weights(self) -> Shards:
        raise StepError("no rank of FSDP2 holds whole weights")

    def _total_of_group(self, part: Tensor) -> Tensor:
        part = part.detach().to(self.device, copy=True)
        dist.all_reduce(part, group=self.group)
        return part

    def total(self, part: Tensor) -> Tensor:
        # Over replicas too, for one result: groups by themselves may sum in another order.
        part = part.detach().to(self.device, copy=True)
        dist.all_reduce(part)
        return part / self.replicas.ranks

    @contextmanager
    def moved(self, shards: Shards) -> Iterator[Displacement]:
        names, weights = list(shards.names), list(shards.weights)
        dtypes = [self.dtypes[name] for name in names]
        total = shards.total
        self._drop_gathered()
        with self.backup.moved(shards) as before:

            def displacement() -> Measured:
                self._average()
                found = [self.weights[name].grad for name in names]
                gradients = [None if g is None else local(g) for g in found]
                return measure(weights, before, gradients, dtypes, total)

            try:
                yield displacement
            finally:
                self._drop_gathered()

    def _drop_gathered(self) -> None:
        """Drop gathered weights, so that the next forward pass gathers them again.

        The root block stays whole after an evaluation.
        """
        for block in self.blocks:
            block.reshard()

    def gradient_norm(self) -> Tensor:
        self._average()
        return self.total(squared_norm(self._held().gradients)).sqrt() / self.loss_scale

    @torch.no_grad()
    def update(self, norm: Tensor, clip_norm: float | None) -> None:
        gradients = self._held().gradients
        self.scale.unscale_(gradients)
        if clip_norm is not None and gradients:
            # As torch.nn.utils.clip_grads_with_norm_, which does not mix shards and a plain norm.
            torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1))
        self._drop_gathered()
        self.optimizer.step()
        self.zero_gradients()
        self.scale.update(skipped=False)

    def over_ranks(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def synchronize_buffers(self) -> None:
        broadcast_buffers(self.module)

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor]:
        """Return the whole state_dict on the CPU on rank 0, and nothing on other ranks.

        Called by all ranks. One parameter at a time is whole on the device.
        """
        self._drop_gathered()
        whole = {}
        for name, tensor in self.module.state_dict().items():
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if dist.get_rank() == 0:
                whole[name] = value.to("cpu", copy=True)
        return whole

    @torch.no_grad()
    def local_state(self) -> dict[str, Any]:
        """Return a state for the same rank among as many ranks in the same groups."""
        optimizer = self.optimizer.state_dict()
        return {
            "layout": self._layout(),
            "weights": {n: local(w).detach() for n, w in self.weights.items()},
            "buffers": dict(self.module.named_buffers()),
            "optimizer": {
                "state": {i: split(s) for i, s in optimizer["state"].items()},
                "param_groups": optimizer["param_groups"],
            },
            "scale": dict(vars(self.scale)),
        }

    @torch.no_grad()
    def load_local_state(self, state: dict[str, Any]) -> None:
        """Raise StepError for the state of another rank, layout or network."""
        if state["layout"] != self._layout():
            raise StepError(
                f"the state is of {state['layout']}, this is {self._layout()}; start from the full "
                "weights, or with as many ranks"
            )
        self._drop_gathered()
        copy_into({n: local(w) for n, w in self.weights.items()}, state["weights"])
        set_buffers(self.module, state["buffers"], self.device)
        saved = state["optimizer"]
        parameters = parameters_of(self.optimizer)
        joined = {i: join(s, sharded(parameters[i])) for i, s in saved["state"].items()}
        self.optimizer.load_state_dict({"state": joined, "param_groups": saved["param_groups"]})
        self.scale = LossScale(**state["scale"])

    @torch.no_grad()
    def masters(self) -> dict[str, Tensor]:
        return {name: local(weight) for name, weight in self.weights.items()}

    def rewritten(self) -> None:
        self._drop_gathered()

    def arrangement(self) -> Arrangement:
        rank, pieces = dist.get_rank(self.group), {}
        for name, weight in self.weights.items():
            row = weight.numel() // weight.shape[0] if weight.numel() else 0
            rows = -(-weight.shape[0] // dist.get_world_size(self.group))  # as torch.chunk cuts
            start = min(rank * rows, weight.shape[0]) * row
            pieces[name] = [list(weight.shape), start, local(weight).numel()]
        return {
            "pieces": pieces,
            "slots": slots_by_parameter(self.optimizer, self.parameters.items()),
            "loss_scale": self.loss_scale,
        }

    @torch.no_grad()
    def load_optimizer(self, state: dict[int, dict[str, Any]], groups: list[dict]) -> None:
        parameters = parameters_of(self.optimizer)
        joined = {i: sharded_like(s, sharded(parameters[i])) for i, s in state.items()}
        self.optimizer.load_state_dict(with_groups(self.optimizer, joined, groups))

    def _layout(self) -> dict[str, int]:
        return {
            "rank": dist.get_rank(),
            "world_size": self.world_size,
            "ranks_per_group": self.world_size // self.replicas.ranks,
        }


def _refuse_unsharded(
    model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> FSDPModule:
    """Return the model, and raise StepError for one that is not sharded as the engine needs it."""
    if not isinstance(model, FSDPModule) or not all(
        isinstance(w, DTensor) and w.device_mesh.ndim == 1 and w.dtype == torch.float32
        for w in parameters.values()
    ):
        raise StepError(
            "ShardedEngine takes an fp32 network in which every parameter is sharded over a mesh "
            "of one dimension: shard it with flatcal_dist.sharpness.engines.fsdp2.start.shard"
        )
    refuse_unknown(model)
    own = {id(w) for w in parameters.values()}
    if not all(id(w) in own for w in parameters_of(optimizer)):
        raise StepError(
            "the optimizer holds parameters from before the network was sharded, which nothing "
            "reads any more: build it after shard()"
        )
    return model
