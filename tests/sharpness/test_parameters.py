"""Kinds of parameters and of DDP: right against the reference, or refused with name and remedy."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness import ReplicatedEngine, SharpnessAwareStep
from tests.sharpness.test_refusals import NOTHING, message
from tests.support.engines import UNLIKE, everywhere, make_engine, used
from tests.support.ranks import on_ranks
from tests.support.reference import (
    CLOSE,
    RULES,
    far,
    make_network,
    make_optimizer,
    reference,
    train,
)

# Weights that several modules share


class Tied(nn.Module):
    """Blocks that share weights: neighbours, far ones, a layer used twice, and a weight alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)) for _ in range(4)
        )
        self.blocks[1] = self.blocks[0]
        self.blocks[3][0].weight = self.blocks[2][2].weight = nn.Parameter(torch.randn(6, 6) / 4)
        self.blocks[2][0] = nn.Linear(6, 6)
        self.blocks[3][2] = nn.Linear(6, 6)
        self.blocks[3][0].bias = nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(6, 6)
        self.head.weight = self.blocks[3][2].weight
        self.last = make_network()

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.last(self.head(x))


def tied(rank, world_size, kind, rule):
    engine = make_engine(kind, Tied())
    train(SharpnessAwareStep(engine, rule), rank, world_size, 2)
    return used(engine), engine.full_weights()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_tied_weights_in_different_blocks(kind):
    """FSDP2 gathers the sharers together, and others in blocks of their own."""
    expected = reference(RULES["csam"], micro_batches=2, network=Tied)[0]
    (own, saved), *others = on_ranks(2, tied, kind, RULES["csam"])
    assert far(saved, expected) < CLOSE, "under each of their names"
    for theirs, _ in others:
        assert all(torch.equal(own[name], theirs[name]) for name in own)


# DDP that takes the graph for granted

STATIC = {
    "accumulation": (2, {}),
    "scope rank": (1, {"scope": "rank"}),
    "both": (2, {"scope": "rank"}),
    "each micro-batch": (2, {"per_micro_batch": True}),
}


def static(rank, world_size):
    outcome = {}
    for name, (micro_batches, options) in STATIC.items():
        network = make_network()
        model = DistributedDataParallel(network, broadcast_buffers=False, static_graph=True)
        engine = ReplicatedEngine(model, make_optimizer(network))
        step = SharpnessAwareStep(engine, RULES["csam"], **options)
        train(step, rank, world_size, micro_batches)
        outcome[name] = engine.full_weights()
    return outcome


def test_ddp_with_a_static_graph():
    """It cannot leave a gradient unreduced: micro-batches are reduced one by one."""
    for outcome in on_ranks(2, static):
        for name, (micro_batches, options) in STATIC.items():
            scope = {"scope": 1} if "scope" in options else {}
            each = {"per_micro_batch": True} if "per_micro_batch" in options else {}
            expected = reference(RULES["csam"], 2, None, micro_batches, **each)[0]
            if scope:
                expected = reference(RULES["csam"], 2, 1, micro_batches)[0]
            assert far(outcome[name], expected) < CLOSE, name


# Parameters of unusual kinds


class With(nn.Module):
    """A network with something before it."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.network = first, make_network()

    def forward(self, x):
        return self.network(self.first(x))


class Table(nn.Module):
    """Adds a row of a table, by the sign of the first input."""

    def __init__(self, sparse: bool, function: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(4, 6, sparse=sparse and not function)
        self.function, self.sparse = function, sparse

    def forward(self, x):
        rows = (x[:, 0] > 0).long()
        if self.function:
            return x + F.embedding(rows, self.table.weight, sparse=self.sparse)
        return x + self.table(rows)


class Number(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full(shape, 1.5))

    def forward(self, x):
        return x * self.scale if self.scale.numel() else x + self.scale.sum()


class Shortened(nn.Embedding):
    """Rows that are looked up become shorter in memory."""

    def forward(self, x):
        return x + super().forward((x[:, 0] > 0).long())


KINDS = {
    "dense": partial(Table, sparse=False),
    "sparse": partial(Table, sparse=True),
    "sparse function": partial(Table, sparse=True, function=True),
    "max_norm": lambda: Shortened(4, 6, max_norm=0.5),
    "lazy": partial(nn.LazyLinear, 6),
    "lazy norm": nn.LazyBatchNorm1d,
    "lazy, called": lambda: called(nn.LazyLinear(6)),
    "number": partial(Number, ()),
    "one": partial(Number, (1,)),
    "empty": partial(Number, (0, 6)),
}


def called(layer: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    layer(torch.zeros(1, 6))
    return layer


def network_with(kind_of: str) -> nn.Module:
    return With(KINDS[kind_of]())


def kinds(rank, world_size, kind, names):
    """By kind of parameter: what was refused, and the weights otherwise."""
    outcome = {}

    def run(name):
        engine = make_engine(kind, network_with(name))
        train(SharpnessAwareStep(engine, RULES["csam"]), rank, world_size, numbers=range(2))
        outcome[name] = engine.full_weights()

    for name in names:
        said = message(partial(run, name))
        outcome[name] = said if said != NOTHING else outcome[name]
    return outcome


REFUSED = {
    "sparse": "the layer first.table has sparse gradients",
    "sparse function": "is sparse, which has no perturbation: call the function",
    "max_norm": "the layer first has max_norm=0.5, and so changes its weights",
    "lazy": "first.weight has no shape yet",
    "lazy norm": "first.weight has no shape yet",
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_parameter_of_an_unusual_kind_is_trained_or_refused_by_name(kind):
    outcomes = everywhere(kind, kinds, list(KINDS))
    refused = dict(REFUSED)
    if kind == "one":
        refused["sparse function"] = "the gradient of first.table.weight is sparse"
    elif kind == "ddp":  # by itself, before our engine sees the network
        refused |= dict.fromkeys(["lazy", "lazy norm"], "Run a dummy forward pass")
    else:
        cannot = f"{'FSDP2' if kind == 'fsdp2' else 'DeepSpeed'} cannot hold parameters without"
        refused["number"] = f"{cannot} a dimension, such as first.scale"
        refused["empty"] = f"{cannot} values, such as first.scale of shape [0, 6]"
    for name in KINDS:
        outcome = outcomes[0][name]
        if name in refused:
            assert all(refused[name] in theirs[name] for theirs in outcomes), outcome
        else:
            expected = reference(
                RULES["csam"], network=partial(network_with, name), numbers=range(2)
            )[0]
            assert not isinstance(outcome, str), (name, outcome)
            assert {n: w.shape for n, w in outcome.items()} == {
                n: w.shape for n, w in expected.items()
            }
            values = [{n: w for n, w in x.items() if w.numel()} for x in (outcome, expected)]
            assert far(*values) < CLOSE, name


# Weights that the forward pass changes


class MomentumEncoder(nn.Module):
    """Follows another layer, as MoCo's and BYOL's do in their forward passes; equal at first."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.mean, self.by_name = nn.Linear(6, 6), nn.Linear(6, 6), by_name
        self.mean.load_state_dict(self.layer.state_dict())
        self.mean.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for own, mean in zip(self.layer.parameters(), self.mean.parameters(), strict=True):
                if self.by_name:
                    mean.data = 0.9 * mean.data + 0.1 * own.data
                else:
                    mean.data.mul_(0.9).add_(own.data, alpha=0.1)
        return self.layer(x) + self.mean(x)


def changing(rank, world_size, kind):
    outcome = []
    for by_name, options in ((True, {}), (False, {}), (False, {"per_micro_batch": True})):
        engine = make_engine(kind, With(MomentumEncoder(by_name)))
        if kind == "zero2":
            options = {}
        step = SharpnessAwareStep(engine, RULES["csam"], **options)
        outcome.append(message(lambda step=step: train(step, rank, world_size, numbers=range(2))))
    return outcome


@pytest.mark.parametrize("kind", ["one", "ddp", "zero2"])
def test_frozen_weights_that_a_forward_pass_changes_are_refused(kind):
    """Both passes would change them, and the second see others."""
    for outcome in everywhere(kind, changing):
        for said in outcome:
            assert "forward pass changes the frozen weight first.mean.weight" in said
