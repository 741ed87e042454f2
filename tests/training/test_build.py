"""What is built, and what building must not change."""

import copy

import torch
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.networks.registry import build
from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.sharpness.engines.replicated_start import arrange_buckets
from tests.support.ranks import on_ranks

SHAPE, RANKS = (1, 8, 8), 4  # two ranks add up alike in any order


def test_going_on_adds_up_in_the_order_of_a_run_that_never_stopped():
    assert on_ranks(RANKS, _go_on) == [True] * RANKS


def _go_on(rank, world_size):
    whole = _trainer()
    for number in range(2):
        _take(whole, rank, number)
    before = copy.deepcopy(whole.engine.module.state_dict())
    optimizer = copy.deepcopy(whole.engine.optimizer.state_dict())
    resumed = _trainer()
    resumed.engine.module.load_state_dict(before)
    resumed.engine.optimizer.load_state_dict(optimizer)
    for trainer in (whole, resumed):
        _take(trainer, rank, 2)
    ours, theirs = whole.engine.module.state_dict(), resumed.engine.module.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def _trainer() -> SharpnessAwareStep:
    torch.manual_seed(0)
    network = build("mlp", 10, 1, 8, {"width": 64, "depth": 2}).train()
    model = DistributedDataParallel(network)
    arrange_buckets(model, SHAPE, torch.device("cpu"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    return SharpnessAwareStep(ReplicatedEngine(model, optimizer), SAM(0.05))


def _take(trainer: SharpnessAwareStep, rank: int, number: int) -> None:
    generator = torch.Generator().manual_seed(100 * number + rank)
    images = torch.rand(4, *SHAPE, generator=generator)
    trainer([(images, torch.randint(0, 10, (4,), generator=generator))], samples=4 * RANKS)
