"""What only FSDP2 has: sharding over groups of ranks that perturb by themselves."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatcal_dist.sharpness import SharpnessAwareStep
from flatcal_dist.sharpness.scope import Scope
from tests.sharpness.test_refusals import message
from tests.support.engines import make_engine, used
from tests.support.ranks import on_ranks
from tests.support.reference import (
    CLOSE,
    RULES,
    STEPS,
    bits,
    far,
    make_network,
    my_part,
    reference,
    train,
)


def groups(rank, world_size):
    """Sharded over 2 and 2: perturbed by groups, or for all; both step by step."""
    outcome = {}
    for rule in ("csam", "asam"):
        for scope in (2, "global"):
            engine = make_engine("fsdp2", ranks_per_group=2)
            step = SharpnessAwareStep(engine, RULES[rule], scope=scope, clip_norm=1.0)
            seen, results = [], []
            for number in range(STEPS):
                results += train(step, rank, world_size, 2, [number], measure=True)
                seen.append(bits(used(engine)))
            outcome[rule, scope] = used(engine), seen, results
    rank_scope = message(lambda: SharpnessAwareStep(engine, RULES["sam"], scope="rank"))
    return outcome, both_scopes(rank, world_size), rank_scope, bad_group(rank, world_size)


def both_scopes(rank, world_size):
    """Whether one engine steps in two scopes in turn as two engines do, one after the other."""
    one = make_engine("fsdp2", ranks_per_group=2)
    in_groups, for_all = (SharpnessAwareStep(one, RULES["sam"], scope=s) for s in (2, "global"))
    train(in_groups, rank, world_size, numbers=[0])
    first = make_engine("fsdp2", ranks_per_group=2)
    train(SharpnessAwareStep(first, RULES["sam"], scope=2), rank, world_size, numbers=[0])
    second = make_engine("fsdp2", ranks_per_group=2)
    second.load_local_state(first.local_state())
    train(SharpnessAwareStep(second, RULES["sam"]), rank, world_size, numbers=[1])
    train(for_all, rank, world_size, numbers=[1])
    return bits(used(one)) == bits(used(second))


def bad_group(rank, world_size):
    """A value that is not finite in one group stops the other as well."""
    engine = make_engine("fsdp2", ranks_per_group=2)
    before = bits(used(engine))
    engine.module[-1].register_forward_hook(
        lambda module, args, output: output * math.inf if rank == 3 else output
    )
    step = SharpnessAwareStep(engine, RULES["sam"], scope=2)
    skipped = train(step, rank, world_size, numbers=[0])[0].skipped
    return skipped, bits(used(engine)) == before


def test_groups_perturb_by_themselves_and_stay_replicas():
    outcomes = on_ranks(4, groups)
    for case, (_, seen, results) in outcomes[0][0].items():
        rule, scope = case
        ranks = 2 if scope == 2 else 1
        expected = reference(RULES[rule], ranks, 1, clip_norm=1.0)[0]
        if scope == 2:
            assert far(expected, reference(RULES[rule], clip_norm=1.0)[0]) > 100 * CLOSE
        for outcome, *_ in outcomes:
            weights, theirs, reported = outcome[case]
            assert far(weights, expected) < CLOSE, case
            assert theirs == seen, "replicas must hold the same bits"
            assert reported == results, "ranks must report the same"
        if rule == "csam":
            assert results[0].effective_rho == pytest.approx(0.1, rel=1e-4)
    for _, as_two_engines, rank_scope, stopped in outcomes:
        assert as_two_engines
        assert "2 ranks gather their weights" in rank_scope
        assert stopped == (True, True)


# Norm layers beside low-precision weights


class PlainNorm(nn.Module):
    """Batch norm as a user writes it: known by its buffers only, computes in its weight's type."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.register_buffer("running_mean", torch.zeros(16))
        self.register_buffer("running_var", torch.ones(16))

    def forward(self, x):
        x = x.to(self.weight.dtype)
        variance, mean = torch.var_mean(x, 0, correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(variance, 0.1)
        return (x - mean) * (variance + 1e-5).rsqrt() * self.weight + self.bias


class Image(nn.Module):
    """16 features as an image of 4 by 4, for what is within."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.view(-1, 4, 2, 2)).flatten(1)


class Recomputed(nn.Module):
    """Within gradient checkpointing."""

    def __init__(self, layer: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


class Twice(nn.Module):
    """One layer, run twice in a pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class OneOfTwo(nn.Module):
    """Of two norms that share a weight, every second forward pass runs one only."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(16), nn.BatchNorm1d(16)])
        self.norms[1].weight, self.calls = self.norms[0].weight, 0

    def forward(self, x):
        self.calls += 1
        x = self.norms[0](x)
        return self.norms[1](x) if self.calls % 2 else x


NORMS = {
    "batch": partial(nn.BatchNorm1d, 16),
    "average": partial(nn.BatchNorm1d, 16, momentum=None),
    "user's": PlainNorm,
    "timm's": lambda: Image(BatchNormAct2d(4)),
    "instance": lambda: Image(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "frozen": lambda: nn.BatchNorm1d(16).requires_grad_(False),
    "in a block": lambda: nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)),
    "checkpoint": lambda: Recomputed(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)), False),
    "reentrant": lambda: Recomputed(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)), True),
    "twice": lambda: Twice(nn.BatchNorm1d(16)),
    "tied": lambda: OneOfTwo(),
}


def with_norm(name: str) -> nn.Module:
    network = make_network()
    network[1] = NORMS[name]()
    return network


def low_precision(rank, world_size, names):
    """What a norm's weight and statistics are in the passes; all in use after some steps."""
    outcome = {}
    for name in names:
        network, seen = with_norm(name), set()
        norms = [m for m in network.modules() if hasattr(m, "running_mean")]
        for norm in norms:
            norm.register_forward_hook(
                lambda m, *_, s=seen: s.update({m.weight.dtype, m.running_mean.dtype})
            )
        linear = network[0]
        linear.register_forward_hook(lambda m, *_, s=seen: s.add(("linear", m.weight.dtype)))
        engine = make_engine("fsdp2", network, torch.bfloat16)
        results = train(SharpnessAwareStep(engine, RULES["sam"]), rank, world_size)
        outcome[name] = seen, used(engine), [r.skipped for r in results]
    return outcome


@pytest.mark.parametrize("names", [list(NORMS)[:5], list(NORMS)[5:]], ids=["kinds", "places"])
def test_norms_with_statistics_stay_in_fp32_beside_bf16(names):
    """bf16 has 8 bits: after these steps weights are off by a percent, statistics by less."""
    outcomes = on_ranks(2, low_precision, names)
    for name in names:
        seen, weights, skipped = outcomes[0][name]
        assert seen == {torch.float32, ("linear", torch.bfloat16)}, name
        assert not any(skipped), name
        # Plain autograd knows checkpoints of the other kind only; they compute the same.
        plain = partial(with_norm, {"reentrant": "checkpoint"}.get(name, name))
        expected = reference(RULES["sam"], 2, network=plain)[0]
        assert far(weights, {n: expected[n] for n in weights}) < 0.03, name
        statistics = [n for n in expected if "running" in n]
        assert statistics
        for own in statistics:
            assert torch.allclose(weights[own], expected[own], rtol=0.02, atol=0.02), (name, own)
        shared = {n for n in weights if "running" not in n and "tracked" not in n}
        assert all(torch.equal(weights[n], outcomes[1][name][1][n]) for n in shared), name


# Gradients that nothing public reaches


def leftovers(rank, world_size):
    """Whether a backward pass that was never reduced is gone: by precision, and way to end."""
    outcome, everyone = {}, Scope.of("global", world_size)
    for precision in (torch.float32, torch.bfloat16):
        pairs = my_part(rank, world_size, 0, 2)
        engine = make_engine("fsdp2", precision=precision)
        gradients = []
        for way in ("nothing before", "between passes", "amid a pass"):
            if way != "nothing before":
                backward(engine, pairs[0], reduce=False)
            if way == "amid a pass":
                with pytest.raises(ZeroDivisionError), engine.accumulation(False):
                    _ = engine.model(pairs[1][0]), 1 / 0
            engine.zero_gradients()
            backward(engine, pairs[1], reduce=True)
            gradients.append(bits(dict(enumerate(engine.shards(everyone).gradients))))
            engine.zero_gradients()
        outcome[precision] = [g == gradients[0] for g in gradients]
    return outcome


def backward(engine, pairs, reduce: bool) -> None:
    inputs, target = pairs
    with engine.accumulation(reduce):
        engine.backward(F.cross_entropy(engine.model(inputs), target))


def test_no_gradients_means_none_within_fsdp2_either():
    for outcome in on_ranks(2, leftovers):
        assert outcome == dict.fromkeys([torch.float32, torch.bfloat16], [True] * 3)
