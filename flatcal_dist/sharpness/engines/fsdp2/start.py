"""Sharding a network for FSDP2: which blocks are gathered together, in which precision."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flatcal_dist.sharpness.engines.alone import join_alone
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.networks import refuse_unheld
from flatcal_dist.sharpness.passes.buffers import broadcast, broadcast_buffers

NORMS = (
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
    """Shard a network in place. Build the optimizer on its parameters afterwards.

    Every rank begins with rank 0's weights and buffers. The parameters of a block are gathered
    together. A block is a child of a Sequential or ModuleList with at least `smallest_block`
    parameters, innermost first; all that remains is one more block. A block that shares a weight
    with a module outside is gathered with the block that holds both. In low precision each norm
    layer that keeps statistics is gathered separately, in fp32.

    Args:
        network: An fp32 network.
        device: Where this rank computes.
        precision: The precision of the passes. Shards stay fp32, gradients are reduced in fp32.
        ranks_per_group: The number of ranks in a group. Each group of consecutive ranks holds all
            weights. None shards over all ranks.
        smallest_block: The least number of parameters of a block that is gathered separately.

    Returns:
        The network, whose parameters are DTensors now.

    Raises:
        StepError: The network cannot be sharded so.
    """
    join_alone("nccl" if device.type == "cuda" else "gloo", "FSDP2")
    world_size = dist.get_world_size()
    ranks = ranks_per_group or world_size
    if world_size % ranks:
        raise StepError(f"groups of {ranks} ranks do not divide the {world_size} ranks that run")
    refuse_unheld(network, "FSDP2")
    _start_as_rank_0(network.to(device))
    group = dist.group.WORLD if ranks == world_size else dist.new_subgroups(ranks)[0]
    assert group is not None  # the ranks have joined
    mesh = DeviceMesh.from_group(group, device.type)
    policy = MixedPrecisionPolicy()
    taken: set[nn.Parameter] = set()
    if precision != torch.float32:
        # What comes after a norm gets the precision of the pass, whatever the norm computes with.
        whole = replace(policy, output_dtype=precision)
        for norms in _norms_with_statistics(network):
            # Few numbers: kept until the backward pass, which then has no need to gather again.
            fully_shard(norms, mesh=mesh, reshard_after_forward=False, mp_policy=whole)
            taken |= {w for norm in norms for w in norm.parameters()}
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    for block in reversed(_blocks(network)):
        own = [w for w in block.parameters() if w not in taken]
        if sum(w.numel() for w in own) >= smallest_block:
            fully_shard(block, mesh=mesh, mp_policy=policy)
            taken |= set(block.parameters())
    # Blocks are left out: what comes after a block takes its output in the precision of the pass.
    output = None if precision == torch.float32 else torch.float32
    fully_shard(network, mesh=mesh, mp_policy=replace(policy, output_dtype=output))
    return network


@torch.no_grad()
def _start_as_rank_0(network: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0, in a layout that has rows."""
    for weight in network.parameters():
        weight.data = weight.data.contiguous()  # channels_last has no rows
    broadcast(network.parameters())
    broadcast_buffers(network)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Return the children of Sequential and ModuleList that compute something, outer before inner.

    A child that shares a parameter with a module outside is left out, because FSDP2 gathers a
    parameter with one block only.
    """
    containers = (nn.Sequential, nn.ModuleList)
    children = [c for m in network.modules() if isinstance(m, containers) for c in m.children()]
    users = _users(network)
    return [
        child
        for child in dict.fromkeys(children)
        if not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        and all(users[w] <= set(child.modules()) for w in child.parameters())
    ]


def in_full_precision(network: nn.Module) -> set[int]:
    """Return the ids of the parameters that passes use in fp32, whatever their precision."""
    norms = [norm for norms in _norms_with_statistics(network) for norm in norms]
    return {id(weight) for norm in norms for weight in norm.parameters()}


def _users(network: nn.Module) -> dict[nn.Parameter, set[nn.Module]]:
    """Return the modules that hold each parameter. Tied weights have more than one."""
    users: dict[nn.Parameter, set[nn.Module]] = {}
    for module in network.modules():
        for weight in module.parameters(recurse=False):
            users.setdefault(weight, set()).add(module)
    return users


def _norms_with_statistics(network: nn.Module) -> list[list[nn.Module]]:
    """Return the layers whose statistics are fp32 buffers, in lists that share a weight.

    Kernels need weight and statistics of one type, and bf16 has too few bits for a running mean.
    Autocast keeps these weights in fp32 as well. A norm that the user wrote is known by its
    buffers.
    """
    groups: list[tuple[list[nn.Module], set[nn.Parameter]]] = []
    for module in network.modules():
        weights = set(module.parameters())
        if module is network or not weights or not _is_norm(module):
            continue
        modules = [module]
        for group in [g for g in groups if g[1] & weights]:
            groups.remove(group)
            modules, weights = group[0] + modules, group[1] | weights
        groups.append((modules, weights))
    return [modules for modules, _ in groups]


def _is_norm(module: nn.Module) -> bool:
    own = {name for name, _ in module.named_buffers(recurse=False)}
    alike = {"running_mean", "running_var"} <= own
    return isinstance(module, NORMS) or (alike and not any(module.children()))
