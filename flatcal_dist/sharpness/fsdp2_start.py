"""Sharding a network for FSDP2: which blocks are gathered together, in which precision."""

from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flatcal_dist.sharpness.buffers import broadcast, broadcast_buffers
from flatcal_dist.sharpness.errors import StepError

STATISTICS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
SMALLEST_BLOCK = 250_000  # parameters; 1 MB in fp32, below which a collective is mostly latency


def shard(
    network: nn.Module,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    ranks_per_group: int | None = None,
    smallest_block: int = SMALLEST_BLOCK,
) -> nn.Module:
    """Shard a network in place; build the optimizer on its parameters afterwards.

    Every rank begins with rank 0's weights and buffers. Gathered together are the parameters of
    each block: a child of a Sequential or ModuleList with at least `smallest_block` parameters,
    innermost first; and of all that remains. precision: of the passes; shards stay fp32, and
    gradients are reduced in fp32. ranks_per_group: shard over consecutive groups of so many ranks,
    each with all weights, instead of over all ranks.

    Raises StepError for what cannot be sharded so.
    """
    if not dist.is_initialized():
        raise StepError(
            "FSDP2 needs a process group: launch with "
            "accelerate launch --config_file configs/accelerate/*_fsdp2.yaml"
        )
    world_size = dist.get_world_size()
    ranks = ranks_per_group or world_size
    if world_size % ranks:
        raise StepError(f"groups of {ranks} ranks do not divide the {world_size} ranks that run")
    network.to(device)
    with torch.no_grad():
        for weight in network.parameters():
            weight.data = weight.data.contiguous()  # no other layout (channels_last) has rows
        broadcast(network.parameters())
        broadcast_buffers(network)
    group = dist.group.WORLD if ranks == world_size else dist.new_subgroups(ranks)[0]
    mesh = DeviceMesh.from_group(group, device.type)
    policy = _policy(network, precision)
    taken: set[nn.Parameter] = set()
    for block in reversed(_candidates(network)):
        own = [w for w in block.parameters() if w not in taken]
        if sum(w.numel() for w in own) >= smallest_block:
            taken |= set(fully_shard(block, mesh=mesh, mp_policy=policy).parameters())
    # Not of the blocks: what comes after one takes its output in the precision of the pass.
    output = None if precision == torch.float32 else torch.float32
    return fully_shard(network, mesh=mesh, mp_policy=replace(policy, output_dtype=output))


def _candidates(network: nn.Module) -> list[nn.Module]:
    """Children of Sequential and ModuleList that compute something, outer before inner."""
    containers = (nn.Sequential, nn.ModuleList)
    children = [c for m in network.modules() if isinstance(m, containers) for c in m.children()]
    return [c for c in dict.fromkeys(children) if not isinstance(c, (nn.ModuleList, nn.ModuleDict))]


def in_full_precision(network: nn.Module) -> set[int]:
    """Ids of the parameters that passes use in fp32 whatever their precision."""
    norms = [m for m in network.modules() if isinstance(m, STATISTICS)]
    return {id(w) for norm in norms for w in norm.parameters(recurse=False)}


def _policy(network: nn.Module, compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    if compute_dtype == torch.float32:
        return MixedPrecisionPolicy()
    # Their statistics are fp32 buffers, and kernels want weight and statistics of one type.
    whole = in_full_precision(network)
    options: dict[str, Any] = {}
    if whole:
        if "param_dtype_override_fn" not in {field.name for field in fields(MixedPrecisionPolicy)}:
            raise StepError(
                f"FSDP2 of torch {torch.__version__} cannot keep batch norm in fp32 beside "
                "low-precision weights; use a newer torch (2.15 can), fp32, or DDP"
            )
        options["param_dtype_override_fn"] = lambda w: torch.float32 if id(w) in whole else None
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, **options)
