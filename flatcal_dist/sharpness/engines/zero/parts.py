"""Where DeepSpeed ZeRO keeps weights and gradients: the one place that knows its internals.

All classes answer the same questions. Two copies of the weights exist. The master is in fp32 and
in parts over ranks, and only the optimizer changes it. The forward pass uses the other copy, in the
precision of the network. DeepSpeed has no public way to change the second copy (its
safe_set_full_fp32_param changes the first). So private attributes are used, as they are in
DeepSpeed 0.19.8:

  stages 1, 2  bit16_groups, bit16_groups_flat, parallel_partitioned_bit16_groups,
               single_partition_of_fp32_groups, averaged_gradients, all_grad_tensors,
               real_dp_process_group, nccl_start_alignment_factor, allgather_bucket_size;
               of a parameter _hp_mapping and _index_in_param_group; all_gather_dp_groups
  1 in bf16    another class, with bf16_groups, bf16_groups_flat, bf16_partitioned_groups,
               fp32_groups_flat_partition, fp32_groups_gradients_flat instead
  stage 3      fp16_groups, fp32_partitioned_groups_flat, grad_partitions_flat_buffer,
               sub_group_to_group_id, averaged_gradients, persistent_parameters, parameter_offload,
               _set_fp32_optimizer_param_groups, _clear_fp32_optimizer_param_groups;
               of a parameter ds_tensor, ds_numel, ds_process_group
  all          optimizer, loss_scaler
  on CPUs      deepspeed.ops.__compatible_ops__
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.accelerator.is_available():
    # Before the import, which settles what DeepSpeed runs on.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # As DeepSpeed's own launcher; without it stage 3 starts numactl for every reduction to count.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))

import deepspeed
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

# On CPUs DeepSpeed would compile its own all-reduce over shared memory at the first start, which
# takes minutes and a compiler, and hangs on processors without AVX2: gloo's does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Part(NamedTuple):
    """This rank's part of one parameter, in flat tensors of one length.

    They are views of DeepSpeed's tensors.
    """

    name: str
    start: int  # in the whole parameter, flat
    master: Tensor  # fp32, what the optimizer changes
    used: Tensor  # what the forward pass uses


class PartitionedState:
    """Stages 1 and 2: the weights that are used are whole on every rank, all else is in parts.

    For each parameter group, `groups` has its parameters, `flats` all weights that are used,
    `pieces` views of these by rank, and `masters` this rank's piece in fp32.
    """

    def __init__(self, zero: deepspeed.DeepSpeedEngine) -> None:
        self.zero = zero.optimizer
        self.ranks = [dist.get_rank(group) for group in self.zero.real_dp_process_group]
        self._find()
        names = {parameter: name for name, parameter in zero.module.named_parameters()}
        self.parameters: list[nn.Parameter] = []
        self.parts: list[Part] = []
        for group, pieces, rank in zip(self.groups, self.pieces, self.ranks, strict=True):
            for parameter in group:
                mapping = vars(parameter)["_hp_mapping"]
                if mapping is None:  # wholly on other ranks
                    continue
                where = mapping.get_hp_fragment_address()
                used = pieces[rank].narrow(0, where.start, where.numel)
                self.parameters.append(parameter)
                start = mapping.lp_fragment_address.start
                master = mapping.get_hp_fragment().detach()
                self.parts.append(Part(names[parameter], start, master, used))

    def _find(self) -> None:
        self.groups = self.zero.bit16_groups
        self.flats = self.zero.bit16_groups_flat
        self.pieces = self.zero.parallel_partitioned_bit16_groups
        self.masters = [flat.detach() for flat in self.zero.single_partition_of_fp32_groups]

    @property
    def places(self) -> list[int]:
        """The place of each group among the parameter groups of the user's optimizer."""
        return list(range(len(self.groups)))

    def gradients(self) -> list[Tensor]:
        """Return the reduced gradients of the parts: flat fp32 views of what DeepSpeed will use."""
        found = []
        for parameter in self.parameters:
            mapping, index = (vars(parameter)[n] for n in ("_hp_mapping", "_index_in_param_group"))
            gradient = mapping.get_lp_grad_fragment(index).view(-1)
            where = mapping.lp_fragment_address
            if gradient.numel() != where.numel:  # the gradient of the whole parameter
                gradient = gradient.narrow(0, where.start, where.numel)
            found.append(gradient)
        return found

    def share_gradients(self) -> None:
        """Let the norm that DeepSpeed clips by see what was changed in `gradients`."""

    def clear_gradients(self) -> None:
        """Drop the gradients, and the reduced parts that DeepSpeed's zero_grad would keep."""
        self.zero.zero_grad(set_to_none=True)
        for group in range(len(self.groups)):
            self.zero.averaged_gradients[group] = None
            self.zero.all_grad_tensors[group] = None

    def publish(self) -> None:
        """Let the forward pass of every rank see all parts that are used. Called by all ranks."""
        self._gather(self.flats, self.pieces)

    def _gather(self, flats: list[Tensor], pieces: list[list[Tensor]]) -> None:
        all_gather_dp_groups(
            groups_flat=flats,
            partitioned_param_groups=pieces,
            dp_process_group=self.zero.real_dp_process_group,
            start_alignment_factor=self.zero.nccl_start_alignment_factor,
            allgather_bucket_size=self.zero.allgather_bucket_size,
        )

    def withdraw(self) -> None:
        """Put the master back into this rank's parts, without communication."""
        for pieces, rank, master in zip(self.pieces, self.ranks, self.masters, strict=True):
            pieces[rank].copy_(master)

    def frozen(self, parameter: nn.Parameter) -> Tensor:
        """Return what this rank holds of a parameter that is not trained."""
        return parameter.detach()

    def whole(self, parameter: nn.Parameter) -> Any:
        """Return a context in which a parameter that is not trained is whole."""
        return nullcontext()

    @contextmanager
    def base_optimizer(self) -> Iterator[torch.optim.Optimizer]:
        """Give the user's optimizer, with the parameters that it has a state for."""
        yield self.zero.optimizer


class PartitionedStateBf16(PartitionedState):
    """Stage 1 in bf16: every rank has whole gradients too, in fp32."""

    def _find(self) -> None:
        self.groups = self.zero.bf16_groups
        self.flats = self.zero.bf16_groups_flat
        self.pieces = self.zero.bf16_partitioned_groups
        self.masters = [flat.detach() for flat in self.zero.fp32_groups_flat_partition]

    def share_gradients(self) -> None:
        flats = self.zero.fp32_groups_gradients_flat
        sizes = [master.numel() for master in self.masters]
        pieces = [list(flat.split(size)) for flat, size in zip(flats, sizes, strict=True)]
        self._gather(flats, pieces)

    def clear_gradients(self) -> None:
        self.zero.zero_grad(set_to_none=True)


class PartitionedWeights:
    """Stage 3: the weights that are used are in parts as well, gathered module by module."""

    def __init__(self, zero: deepspeed.DeepSpeedEngine) -> None:
        self.zero = zero.optimizer
        self.groups = self.zero.fp16_groups
        names = {parameter: name for name, parameter in zero.module.named_parameters()}
        self.cuts: list[tuple[str, nn.Parameter, int, int]] = []  # name, of what, start, length
        for group in self.groups:
            for parameter in group:
                size = parameter.ds_tensor.ds_numel
                start = dist.get_rank(parameter.ds_process_group) * size
                # The last parts are padded, with whatever was in memory: never to be read.
                length = min(size, parameter.ds_numel - start)
                if length > 0:
                    self.cuts.append((names[parameter], parameter, start, length))

    @property
    def parts(self) -> list[Part]:
        return [
            Part(
                name,
                start,
                safe_get_local_fp32_param(parameter).detach().narrow(0, 0, length),
                _partition(parameter).narrow(0, 0, length),
            )
            for name, parameter, start, length in self.cuts
        ]

    @property
    def masters(self) -> list[Tensor]:
        return [flat.detach() for flat in self.zero.fp32_partitioned_groups_flat]

    @property
    def places(self) -> list[int]:
        return [self.zero.sub_group_to_group_id[i] for i in range(len(self.groups))]

    def gradients(self) -> list[Tensor]:
        return [
            safe_get_local_grad(parameter).narrow(0, 0, length)
            for _, parameter, _, length in self.cuts
        ]

    def share_gradients(self) -> None:
        pass

    def clear_gradients(self) -> None:
        """Drop the gradients, and zero the buffer of parts.

        A parameter that a pass does not use would keep there what the last pass left.
        """
        self.zero.zero_grad(set_to_none=True)
        self.zero.grad_partitions_flat_buffer.zero_()
        self.zero.averaged_gradients = {}

    def publish(self) -> None:
        # What is gathered is a copy of the parts: give it up. Small parameters stay gathered
        # between passes, so that they are gathered here, all at once, as DeepSpeed's step does.
        self.zero.parameter_offload.partition_all_parameters()
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def withdraw(self) -> None:
        for part in self.parts:
            part.used.copy_(part.master)
        self.zero.parameter_offload.partition_all_parameters()

    def frozen(self, parameter: nn.Parameter) -> Tensor:
        return _partition(parameter)

    def whole(self, parameter: nn.Parameter) -> Any:
        return deepspeed.zero.GatheredParameters([parameter])

    @contextmanager
    def base_optimizer(self) -> Iterator[torch.optim.Optimizer]:
        self.zero._set_fp32_optimizer_param_groups()
        try:
            yield self.zero.optimizer
        finally:
            self.zero._clear_fp32_optimizer_param_groups()


Layout = PartitionedState | PartitionedWeights


def _partition(parameter: nn.Parameter) -> Tensor:
    """Return this rank's part of a parameter of stage 3, an attribute that DeepSpeed adds."""
    part: Tensor = vars(parameter)["ds_tensor"]
    return part.detach()


def layout_of(zero: deepspeed.DeepSpeedEngine) -> Layout:
    """Return the layout of a DeepSpeed engine, by what its optimizer has."""
    if hasattr(zero.optimizer, "fp16_groups"):
        return PartitionedWeights(zero)
    if hasattr(zero.optimizer, "bf16_groups"):
        return PartitionedStateBf16(zero)
    return PartitionedState(zero)
