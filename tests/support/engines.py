"""One network on every engine, and what all of its weights are at a moment."""

import functools
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness import ReplicatedEngine
from flatcal_dist.sharpness.engines.fsdp2.engine import ShardedEngine
from flatcal_dist.sharpness.engines.fsdp2.start import shard
from flatcal_dist.sharpness.engines.zero import start as zero_start
from flatcal_dist.sharpness.engines.zero.engine import ZeroEngine, start_zero
from tests.support.leaves_out import LeavesOutABlock
from tests.support.ranks import on_ranks
from tests.support.reference import make_network, make_optimizer

CPU = torch.device("cpu")
ZERO = ("zero1", "zero2", "zero3")
ENGINES = ("ddp", *ZERO, "fsdp2")
EVERYWHERE = ("one", *ENGINES)
# ZeRO-2 differs from ZeRO-1 in when micro-batches are reduced: where that is of no account, one of
# the two is enough from day to day.
SPARED = {"zero2": pytest.mark.exhaustive}
MOST = [pytest.param(kind, marks=SPARED.get(kind, ())) for kind in EVERYWHERE]
MOST_ENGINES, MOST_ZERO = MOST[1:], MOST[2:5]
# Where each engine does the same by code of its own, those that are least alike are enough from day
# to day: the reducer of DDP, gathered weights, sharded tensors.
APART = ("ddp", "zero3", "fsdp2")
UNLIKE = [
    pytest.param(kind, marks=() if kind in APART else pytest.mark.exhaustive) for kind in EVERYWHERE
]
OWN = ("one", "ddp", "zero1", "zero2")  # ranks have weights of their own to perturb


def everywhere(kind: str, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(rank, world_size, kind, *arguments)` on one process, or on two ranks."""
    return on_ranks(1 if kind == "one" else 2, work, kind, *arguments)


def make_engine(
    kind: str,
    network: nn.Module | None = None,
    precision: torch.dtype = torch.float32,
    optimizer=make_optimizer,
    clip_norm: float | None = None,
    ranks_per_group: int | None = None,
):
    """kind: one of EVERYWHERE.

    The settings for large networks are made small, so that parameters are cut, padded, partitioned
    in groups and reduced in several buckets by ZeRO, and FSDP2 has a block beside the root.
    """
    network = make_network() if network is None else network
    if kind == "one":
        return ReplicatedEngine(network, optimizer(network), precision)
    if kind == "ddp":
        some = isinstance(network, LeavesOutABlock)
        model = DistributedDataParallel(
            network, broadcast_buffers=False, find_unused_parameters=some
        )
        return ReplicatedEngine(model, optimizer(network), precision)
    if kind == "fsdp2":
        model = shard(network, CPU, precision, ranks_per_group, smallest_block=100)
        return ShardedEngine(model, optimizer(model), precision)
    os.environ.setdefault("LOCAL_RANK", "0")
    _make_small(zero_start)
    built = optimizer(network)
    engine = ZeroEngine(start_zero(network, built, int(kind[-1]), precision, clip_norm))
    _clear_padding(engine)
    return engine


def _clear_padding(engine: ZeroEngine) -> None:
    """Stage 3 pads with what was in memory, and saves it: no two runs would save the same."""
    kept = [part.master.clone() for part in engine.layout.parts]
    with torch.no_grad():
        for master in engine.layout.masters:
            master.zero_()
        for part, master in zip(engine.layout.parts, kept, strict=True):
            part.master.copy_(master)


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


def settled(engine) -> dict[str, Tensor]:
    """As `used`, when what an exception left moved on other ranks of ZeRO is put back."""
    engine.zero_gradients()
    return used(engine)


def tensors_of(state: Any) -> Iterator[Tensor]:
    """All tensors in plain containers, in order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from tensors_of(part)


def saved(engine) -> bytes:
    """The bits of all that a checkpoint would hold of this rank."""
    tensors = [*tensors_of(engine.local_state()), *tensors_of(engine.full_weights())]
    return b"".join(
        t.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors
    )
