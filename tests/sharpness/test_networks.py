"""What networks hold: noise, batch norm, frozen and unused parameters; against the reference.

Where ranks have batch statistics and random streams of their own, so have those of the reference.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.nn.functional import all_reduce

from flatcal_dist.sharpness import SAM, SharpnessAwareStep
from tests.support.engines import MOST_ENGINES, OWN, UNLIKE, everywhere, make_engine, used
from tests.support.leaves_out import LeavesOutABlock
from tests.support.ranks import on_ranks
from tests.support.reference import (
    CLASSES,
    CLOSE,
    NEW,
    RULES,
    STEPS,
    bits,
    far,
    make_batch,
    make_network,
    make_optimizer,
    reference,
    train,
)


def trained(rank, world_size, kind, make, rule, optimizer=make_optimizer, **options):
    """Everything in use on this rank after some steps, the weights as saved, what was reported."""
    engine = make_engine(kind, make(), optimizer=optimizer, clip_norm=options.get("clip_norm"))
    training = {k: options.pop(k) for k in ("micro_batches", "numbers", "batch") if k in options}
    step = SharpnessAwareStep(engine, rule, **options)
    torch.manual_seed(1 + rank)
    results = train(step, rank, world_size, **training)
    return used(engine), engine.full_weights(), results


def each(rank, world_size, kind, cases):
    """`trained` by case, in one start of the ranks; a case is its arguments."""
    return [trained(rank, world_size, kind, *arguments, **options) for arguments, options in cases]


# Noise and batch norm


def noisy() -> nn.Module:
    """Dropout, drop-path and batch norm."""
    return make_network(0.3, norm=True)


def cumulative() -> nn.Module:
    """Running statistics are averages over all batches: num_batches_tracked matters."""
    network = make_network(0.3, norm=True)
    network[1].momentum = None
    return network


@pytest.mark.parametrize("kind", UNLIKE)
def test_noise_is_replayed_and_batch_norm_counts_one_clean_pass(kind):
    """Dropout, drop-path and statistics of every rank as the reference replays them."""
    cases = [((make, RULES["csam"]), {"micro_batches": 2}) for make in (noisy, cumulative)]
    if kind in OWN:  # a rank's own pass
        cases.append(((noisy, RULES["csam"]), {"scope": "rank"}))
    outcomes = everywhere(kind, each, cases)
    for number, ((make, rule), options) in enumerate(cases):
        scope, parts = (1, 1) if "scope" in options else (None, 2)
        expected = reference(rule, len(outcomes), scope, parts, network=make)
        assert expected[0]["1.num_batches_tracked"] == parts * STEPS
        for rank, theirs in enumerate(expected):
            own, saved, _ = outcomes[rank][number]
            assert far(own, theirs) < CLOSE, (number, rank)
            assert not saved or far(saved, theirs) < CLOSE, (number, rank)


class NormOverRanks(nn.BatchNorm1d):
    """SyncBatchNorm in a few lines."""

    def forward(self, x):
        with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
            nn.SyncBatchNorm(self.num_features)(x)  # torch's own refuses tensors on a CPU
        ranks = dist.get_world_size()
        mean = all_reduce(x.mean(0)) / ranks
        variance = all_reduce((x - mean).square().mean(0)) / ranks
        n = len(x) * ranks
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


def normed_over_ranks() -> nn.Module:
    network = make_network(norm=True)
    network[1] = NormOverRanks(16)
    return network


@pytest.mark.parametrize("kind", MOST_ENGINES)
def test_with_batch_norm_over_ranks_many_are_one(kind):
    """N x B = 1 x NB with batch norm; torch's SyncBatchNorm wants GPUs, so one of our own."""
    expected = reference(RULES["csam"], network=partial(make_network, norm=True))[0]
    for own, _, _ in on_ranks(2, trained, kind, normed_over_ranks, RULES["csam"]):
        assert far(own, expected) < CLOSE


# Parameters that are frozen, or have no gradient


def plain_sgd(network: nn.Module) -> torch.optim.Optimizer:
    """Without decay: engines differ in whether a weight without a gradient decays."""
    return torch.optim.SGD([w for w in network.parameters() if w.requires_grad], lr=0.1)


@pytest.mark.parametrize("kind", UNLIKE)
def test_frozen_and_unused_parameters(kind):
    """The block is in one gradient of two, in which rules see zeros, and then in a plain one."""
    rules = [RULES[name] for name in ("sam", "csam", "asam", "looksam", "gsam", *NEW[:-2])]
    steps = {"numbers": range(3)}
    outcomes = everywhere(kind, each, [((LeavesOutABlock, r, plain_sgd), steps) for r in rules])
    start = LeavesOutABlock().state_dict()
    for number, rule in enumerate(rules):
        expected = reference(rule, network=LeavesOutABlock, optimizer=plain_sgd, **steps)[0]
        weights = outcomes[0][number][1]
        assert far(weights, expected) < CLOSE, rule
        for name in ("first.weight", "frozen", "head.bias", "spare.weight", "spare.bias"):
            assert torch.equal(weights[name], start[name]), (rule, name)
        assert len({bits(outcome[number][0]) for outcome in outcomes}) == 1, rule


@pytest.mark.parametrize("kind", UNLIKE)
def test_weights_without_a_second_gradient_come_back(kind):
    work = partial(trained, numbers=[0])
    _, saved, _ = everywhere(kind, work, LeavesOutABlock, SAM(0.5), plain_sgd)[0]
    start = LeavesOutABlock().state_dict()
    assert all(torch.equal(saved[n], start[n]) for n in start if n.startswith("blocks.1"))
    assert not torch.equal(saved["blocks.0.weight"], start["blocks.0.weight"])


# Other shapes, shares and optimizers


class Awkward(nn.Module):
    """Tied weights, a parameter of one number, a convolution with its channels last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(1, 4, (2, 3)).to(memory_format=torch.channels_last)
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.b.weight = self.a.weight
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = x.view(-1, 1, 2, 3).to(memory_format=torch.channels_last)
        return self.head(self.b(self.a(self.convolution(x).flatten(1)).tanh()) * self.scale) * 4


def groups_of_awkward(network: nn.Module) -> torch.optim.Optimizer:
    """One of them has a single number, so that other ranks have nothing of it."""
    weights = list(network.parameters())
    few = [w for w in weights if w.dim() == 1 and w is not network.scale]
    many = [w for w in weights if w.dim() > 1]
    groups = [
        {"params": many, "weight_decay": 0.1},
        {"params": few, "lr": 0.01},
        {"params": [network.scale]},
    ]
    return torch.optim.AdamW(groups, lr=0.02)


@pytest.mark.parametrize("kind", UNLIKE)
def test_awkward_networks_and_groups(kind):
    new = ("wsam", "friendly_sam", "ssam", "stale_sam")
    rules = [RULES[name] for name in ("csam", "asam", "looksam", *new)]
    parts = {"micro_batches": 2}
    cases = [((Awkward, rule, groups_of_awkward), parts) for rule in rules]
    for rule, (_, weights, _) in zip(rules, everywhere(kind, each, cases)[0], strict=True):
        expected = reference(rule, network=Awkward, optimizer=groups_of_awkward)[0]
        assert list(weights) == list(expected)
        assert far(weights, expected) < CLOSE, rule


def seven(number):
    """Of two ranks, one has four and one three."""
    return tuple(t[:7] for t in make_batch(number))


@pytest.mark.parametrize("kind", UNLIKE)
def test_uneven_shares_weigh_every_sample_the_same(kind):
    """The mean is over samples: not over ranks, not over micro-batches (of 2, 1, 1 and 1, 1, 1)."""
    work = partial(trained, batch=seven, micro_batches=3)
    outcomes = everywhere(kind, work, make_network, RULES["csam"])
    expected = reference(RULES["csam"], batch=seven)[0]
    assert far(outcomes[0][1], expected) < CLOSE


class Pictures(nn.Module):
    """Convolutions of what the reference's vectors make, weights and activations channels_last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 2)
        self.pointwise = nn.Conv2d(8, 8, 1)  # contiguous in either format, with other strides
        self.head = nn.Linear(8 * 9, CLASSES)
        with torch.no_grad():
            self.head.weight.mul_(12)

    def forward(self, x):
        x = x[:, :, None, None] * torch.linspace(0.5, 1, 16, dtype=x.dtype).view(4, 4)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.pointwise(self.first(x).tanh()).tanh()
        return self.head(self.second(x).tanh().flatten(1))


def channels_last() -> nn.Module:
    network = Pictures().to(memory_format=torch.channels_last)
    assert not network.first.weight.is_contiguous()
    return network


@pytest.mark.parametrize("kind", UNLIKE)
def test_channels_last_changes_where_numbers_lie_and_not_what_they_are(kind):
    expected = reference(RULES["csam"], network=Pictures)[0]
    for own, full, _ in everywhere(kind, trained, channels_last, RULES["csam"]):
        assert far({name: own[name] for name in expected}, expected) < CLOSE
        assert not full or far(full, expected) < CLOSE


def timm_optimizer(network: nn.Module, name: str) -> torch.optim.Optimizer:
    return create_optimizer_v2(network.parameters(), opt=name, lr=1e-2, weight_decay=0.05)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_optimizers_that_look_at_whole_tensors_see_them_whole(kind):
    """As LAMB at their norms. ZeRO, which has partitions alone, refuses them."""
    optimizers = [partial(timm_optimizer, name=name) for name in ("adamw", "lamb", "adafactor")]
    cases = [((make_network, SAM(0.1), optimizer), {}) for optimizer in optimizers]
    for optimizer, (_, weights, _) in zip(
        optimizers, on_ranks(2, each, kind, cases)[0], strict=True
    ):
        assert far(weights, reference(SAM(0.1), optimizer=optimizer)[0]) < CLOSE, optimizer


# Clipping


@pytest.mark.parametrize("kind", UNLIKE)
def test_only_the_final_gradient_is_clipped(kind):
    """LookSAM changes gradients by hand: what clips must have seen it."""
    rules = [RULES[name] for name in ("csam", "looksam", "wsam", "friendly_sam", "ssam")]
    outcomes = everywhere(kind, each, [((make_network, r), {"clip_norm": 0.05}) for r in rules])
    for number, rule in enumerate(rules):
        expected = reference(rule, clip_norm=0.05)[0]
        assert far(expected, reference(rule)[0]) > 1000 * CLOSE, "it must matter"
        assert far(outcomes[0][number][1], expected) < CLOSE, rule
        for outcome in outcomes:
            assert outcome[number][2][0].gradient_norm > 0.1, "reported before clipping"


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp2"])
def test_clipping_to_infinity_changes_no_bit(kind):
    """DeepSpeed clips by itself, and takes no infinity."""
    bounds = ({"clip_norm": None}, {"clip_norm": float("inf")})
    for free, unbounded in everywhere(kind, each, [((make_network, SAM(0.1)), b) for b in bounds]):
        assert bits(free[0]) == bits(unbounded[0])
