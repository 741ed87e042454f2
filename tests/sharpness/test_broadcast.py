"""DistributedDataParallel as torch makes it by default, which broadcasts buffers by itself."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep
from tests.support import zoo
from tests.support.ranks import on_ranks
from tests.support.reference import SAMPLES, make_optimizer, my_part, same

NAMES = ("renorm", "rebound", "batch norm, plain average", "starts as None")
SCOPES = (("global", False), ("rank", False), ("global", True), ("rank", True))
STEPS = range(3)


def plain(rank, world_size, name, parts):
    """Torch's own loop; everything that the network then holds, and the next random number."""
    network = zoo.make(name)
    model, optimizer = DistributedDataParallel(network), make_optimizer(network)
    torch.manual_seed(1 + rank)
    for number in STEPS:
        pairs = my_part(rank, world_size, number, parts, zoo.batches(name))
        optimizer.zero_grad()
        for place, (x, y) in enumerate(pairs, start=1):
            with nullcontext() if place == len(pairs) else model.no_sync():
                losses = F.cross_entropy(model(x), y, reduction="none")
                (losses.sum() * (world_size / SAMPLES)).backward()
        optimizer.step()
    return network.state_dict() | {"random": torch.rand(1)}


def stepped(rank, world_size, name, parts, scope, each):
    """As `plain`, by two passes of which the second is not moved."""
    network = zoo.make(name)
    model = DistributedDataParallel(network)
    engine = ReplicatedEngine(model, make_optimizer(network))
    step = SharpnessAwareStep(engine, SAM(0.0), scope=scope, per_micro_batch=each)
    torch.manual_seed(1 + rank)
    for number in STEPS:
        step(my_part(rank, world_size, number, parts, zoo.batches(name)))
    assert model.broadcast_buffers, "as the user made it"
    return network.state_dict() | {"random": torch.rand(1)}


def compared(rank, world_size):
    differ = []
    for name in NAMES:
        for parts in (1, 2):
            expected = plain(rank, world_size, name, parts)
            for scope, each in SCOPES:
                if not same(stepped(rank, world_size, name, parts, scope, each), expected):
                    differ.append((name, parts, scope, each))
    return differ


def test_rho_zero_is_the_plain_loop_of_ddp_in_every_scope():
    """A perturbation of a rank's own is not reduced, and DDP broadcasts after what is."""
    assert on_ranks(2, compared) == [[], []]


def skipped(rank, world_size, scope):
    network = zoo.make("renorm")
    engine = ReplicatedEngine(DistributedDataParallel(network), make_optimizer(network))
    step = SharpnessAwareStep(engine, SAM(0.1), scope=scope)
    step(my_part(rank, world_size, 0, 1))
    before = {n: t.clone() for n, t in network.state_dict().items()}
    inputs, target = my_part(rank, world_size, 1, 1)[0]
    if rank == 1:
        inputs[0, 0] = math.nan
    assert step([(inputs, target)]).skipped
    return same(network.state_dict(), before), before["1.mean"]


@pytest.mark.parametrize("scope", ["global", "rank"])
def test_a_skipped_step_leaves_each_rank_its_buffers(scope):
    (ours, mine), (theirs, other) = on_ranks(2, skipped, scope)
    assert ours
    assert theirs
    assert not torch.equal(mine, other), "it would show nothing"
