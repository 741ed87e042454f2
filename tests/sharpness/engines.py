"""One network on every engine, and what all of its weights are at a moment."""

import functools
import os
from types import ModuleType

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness import ReplicatedEngine, zero_start
from flatcal_dist.sharpness.fsdp2 import ShardedEngine, shard
from flatcal_dist.sharpness.zero import ZeroEngine, start_zero
from tests.sharpness.reference import make_network, make_optimizer

CPU = torch.device("cpu")
ZERO = ("zero1", "zero2", "zero3")
ENGINES = ("ddp", *ZERO, "fsdp2")


def make_engine(
    kind: str,
    network: nn.Module | None = None,
    precision: torch.dtype = torch.float32,
    optimizer=make_optimizer,
    clip_norm: float | None = None,
    ranks_per_group: int | None = None,
):
    """kind: one of ENGINES; "ddp" is plain where only one process runs.

    The settings for large networks are made small, so that parameters are cut, padded, partitioned
    in groups and reduced in several buckets by ZeRO, and FSDP2 has a block beside the root.
    """
    network = make_network() if network is None else network
    if kind == "ddp":
        model = network
        if dist.is_initialized():
            model = DistributedDataParallel(
                network, broadcast_buffers=False, find_unused_parameters=_leaves_some(network)
            )
        return ReplicatedEngine(model, optimizer(network), precision)
    if kind == "fsdp2":
        model = shard(network, CPU, precision, ranks_per_group, smallest_block=100)
        return ShardedEngine(model, optimizer(model), precision)
    os.environ.setdefault("LOCAL_RANK", "0")
    _make_small(zero_start)
    built = optimizer(network)
    return ZeroEngine(start_zero(network, built, int(kind[-1]), precision, clip_norm))


def _leaves_some(network: nn.Module) -> bool:
    return any(hasattr(m, "spare") for m in network.modules())


def _make_small(module: ModuleType) -> None:
    original = getattr(module.configuration, "__wrapped__", module.configuration)

    @functools.wraps(original)
    def small(*arguments):
        configuration = original(*arguments)
        configuration["zero_optimization"] |= {
            "reduce_bucket_size": 90,  # one weight has 96
            "stage3_param_persistence_threshold": 10,
            "sub_group_size": 60,
        }
        return configuration

    module.configuration = small


def used(engine) -> dict[str, Tensor]:
    """All weights that a forward pass would use now, and buffers, on every rank.

    Works amid a pass too, where some are gathered.
    """
    if isinstance(engine, ShardedEngine):
        weights = {n: w.full_tensor().detach().clone() for n, w in engine.weights.items()}
    else:
        weights = {}
        for name, weight in engine.module.named_parameters():
            zero3 = isinstance(engine, ZeroEngine) and engine.stage == 3
            with deepspeed.zero.GatheredParameters([weight], enabled=zero3):
                weights[name] = weight.detach().clone()
    return weights | {name: b.clone() for name, b in engine.module.named_buffers()}


def clean(engine) -> dict[str, Tensor]:
    """As `used`, once what an exception may have left moved on other ranks is put back."""
    engine.zero_gradients()
    return used(engine)
