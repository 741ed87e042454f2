"""What a perturbation holds beside a plain step: one copy of the weights, in every scope."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness import ASAM, CSAM, SAM, ReplicatedEngine, SharpnessAwareStep
from tests.support.ranks import on_ranks

WIDTH = 50_000
COPY = 4 * (6 * WIDTH + WIDTH + WIDTH * 5 + 5)  # bytes of the weights
# Beside it: two states of the random generator, 5 kB each, and a few scalars.
SLACK = 16_384
CASES = [
    (SAM(0.1), "global"),
    (ASAM(0.5), "global"),
    (SAM(0.1), "rank"),
    (CSAM(0.1), "rank"),
    (ASAM(0.5), "rank"),
]


def test_extra_memory_is_one_copy_in_both_passes():
    for measured in on_ranks(2, _largest):
        plain, *sharp = measured
        for (rule, scope), most in zip(CASES, sharp, strict=True):
            assert 0 < most - plain <= COPY + SLACK, (rule, scope, (most - plain) / COPY)


def _largest(rank: int, world_size: int) -> list[int]:
    """Most bytes of tensors alive, at both ends of each pass: plain, then each case."""
    most = []
    for rule, scope in ((None, "global"), *CASES):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, WIDTH), nn.GELU(), nn.Linear(WIDTH, 5))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        model = DistributedDataParallel(network, gradient_as_bucket_view=True)
        step = SharpnessAwareStep(ReplicatedEngine(model, optimizer), rule, scope=scope)
        batch = torch.randn(4, 6), torch.randint(5, (4,))
        for _ in range(2):  # DDP arranges its buckets, momentum is there
            step([batch])
        seen: list[int] = []
        network.register_forward_pre_hook(lambda *_, seen=seen: seen.append(_bytes_alive()))
        # The first layer's weight gets its gradient last: all others are there.
        network[0].weight.register_hook(lambda _, seen=seen: seen.append(_bytes_alive()))
        step([batch])
        most.append(max(seen))
        del network, model, step, optimizer, seen
        gc.collect()
    return most


def _bytes_alive() -> int:
    held = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    held += [t.grad for t in held if isinstance(t, nn.Parameter) and t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())


@pytest.mark.parametrize("scope", ["global", "rank"])
def test_a_gradient_that_two_parameters_share_is_moved_once_each(scope):
    """Autograd may hand out one tensor as the gradient of both terms of a sum."""
    for together in on_ranks(2, _shared_gradient, scope):
        assert together < 1e-6


def _shared_gradient(rank: int, world_size: int, scope: str) -> float:
    """The largest difference of what per_micro_batch and the whole step make of one micro-batch."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.ones(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.a + self.b)

    ends = []
    for each in (False, True):
        torch.manual_seed(rank)
        network = Sum()
        model = DistributedDataParallel(network)
        engine = ReplicatedEngine(model, torch.optim.SGD(network.parameters(), lr=1.0))
        step = SharpnessAwareStep(engine, SAM(0.5), scope=scope, per_micro_batch=each)
        step([(torch.randn(4, 5), torch.randint(5, (4,)))])
        ends.append(torch.cat([w.detach() for w in network.parameters()]))
    return float((ends[0] - ends[1]).abs().max())
