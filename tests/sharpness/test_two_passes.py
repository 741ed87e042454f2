"""What the two passes share beside buffers, what bounds them, and what is refused before them."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from flatcal_dist.sharpness import (
    ASAM,
    CSAM,
    GSAM,
    SAM,
    LookSAM,
    ReplicatedEngine,
    SharpnessAwareStep,
    StepError,
)
from flatcal_dist.sharpness.engines.move import measure
from tests.support.engines import UNLIKE, everywhere, make_engine, saved, used
from tests.support.reference import (
    RULES,
    bits,
    make_batch,
    make_network,
    make_optimizer,
    my_part,
    train,
)

# Random numbers

SOURCES = {
    "torch": lambda own: float(torch.rand(())),
    "python": lambda own: random.random(),
    "numpy": lambda own: np.random.rand(),
    "generator of torch": lambda own: float(torch.rand((), generator=own[0])),
    "generator of Python": lambda own: own[1].random(),
    "generator of NumPy": lambda own: own[2].random(),
    "older generator of NumPy": lambda own: own[3].rand(),
}


class Drawing(nn.Module):
    """Scales by a number that it draws, and keeps its own generators one way or another."""

    def __init__(self, source: str, where: type) -> None:
        super().__init__()
        self.network, self.draw, self.seen = make_network(), SOURCES[source], []
        own = (torch.Generator().manual_seed(0), random.Random(0), np.random.default_rng(0))
        own = (*own, np.random.RandomState(0))
        self.own = dict(enumerate(own)) if where is dict else where(own)
        if where is tuple:  # as attributes
            self.a, self.b, self.c, self.d = own

    def forward(self, x):
        self.seen.append(self.draw(self.own))
        return self.network(x) * (0.5 + self.seen[-1])


@pytest.mark.parametrize("where", [tuple, list, dict])
@pytest.mark.parametrize("source", SOURCES)
def test_random_numbers_of_every_source_are_the_same_in_both_passes(source, where):
    """And go on as after a plain step."""
    draws = []
    for rule in (None, SAM(0.0)):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        network = Drawing(source, where)
        step = SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), rule)
        for number in range(2):
            result = step([make_batch(number), make_batch(number + 1)])
        draws.append(network.seen)
    plain, sharp = draws
    assert len(set(plain)) == 4
    assert sharp == [*plain[:2], *plain[:2], *plain[2:], *plain[2:]]
    assert result.loss == result.perturbed_loss


# Optimizers and networks that do not belong together


def head_only(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network[-1].parameters(), lr=0.1)


def refusals(rank, world_size, kind):
    """What is said of a part of the weights, and of changes after the step was built."""
    said = {}

    def note(what, work):
        with pytest.raises(StepError) as refused:
            work()
        said[what] = str(refused.value)

    note("part", lambda: make_engine(kind, optimizer=head_only))
    frozen = make_network()
    frozen[0].requires_grad_(False)
    engine = make_engine(kind, frozen, optimizer=head_only)
    train(SharpnessAwareStep(engine, SAM(0.1)), rank, world_size, numbers=[0])

    engine = make_engine(kind)
    step = SharpnessAwareStep(engine, SAM(0.1))
    train(step, rank, world_size, numbers=[0])
    engine.inference.eval()(my_part(rank, world_size, 0)[0][0])  # leaves FSDP2's root whole
    engine.inference.train()
    train(step, rank, world_size, numbers=[0])
    before = saved(engine)
    engine.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    note("group", lambda: train(step, rank, world_size, numbers=[1]))
    engine.optimizer.param_groups.pop()
    assert saved(engine) == before
    train(step, rank, world_size, numbers=[1])
    network = engine.module
    network[-1] = nn.Linear(16, 5)
    note("replaced", lambda: train(step, rank, world_size, numbers=[2]))
    return said


@pytest.mark.parametrize("kind", UNLIKE)
def test_one_rule_for_what_the_optimizer_holds(kind):
    for said in everywhere(kind, refusals):
        held = "the optimizer holds 2 of 4 trainable weights, and 0.weight is missing"
        assert held in said["part"]
        assert "requires_grad_(False)" in said["part"]
        assert "parameters of the optimizer were added, removed or replaced" in said["group"]
        assert "parameters of the network were added, removed or replaced" in said["replaced"]


# Samples


def counted(rank, world_size, kind):
    """Gradients of targets that are no tensors; and what is said where nothing can be counted."""
    norms = []
    for wrap in (lambda y: y, lambda y: {"label": y}, lambda y: [y, y], lambda y: (0, y)):
        pick = {dict: lambda y: y["label"], list: lambda y: y[0], tuple: lambda y: y[1]}
        pick = pick.get(type(wrap(torch.zeros(1))), lambda y: y)

        def loss(logits, target, pick=pick):
            return F.cross_entropy(logits, pick(target), reduction="none")

        pairs = [(x, wrap(y)) for x, y in my_part(rank, world_size, 0, 5)]
        step = SharpnessAwareStep(make_engine(kind), SAM(0.1), loss=loss)
        norms.append(step(pairs).gradient_norm)
    engine = make_engine(kind)
    step = SharpnessAwareStep(engine, SAM(0.1), loss=lambda z, y: F.cross_entropy(z, y[0]))
    before = saved(engine)
    said = []
    for samples, pairs in ((25, my_part(rank, world_size, 0)), (None, [([0], [0])])):
        step = SharpnessAwareStep(engine, SAM(0.1))
        with pytest.raises(StepError) as refused:
            step(pairs, samples=samples)
        said.append(str(refused.value))
    same = saved(engine) == before
    train(step, rank, world_size, numbers=[0])
    ends = [bits(used(engine))]
    engine = make_engine(kind)
    train(SharpnessAwareStep(engine, SAM(0.1)), rank, world_size, numbers=[0])
    return norms, said, same, ends == [bits(used(engine))]


@pytest.mark.parametrize("kind", UNLIKE)
def test_samples_are_counted_by_their_losses(kind):
    for norms, said, same, as_if_nothing in everywhere(kind, counted):
        assert norms[1:] == norms[:1] * 3
        assert "24 losses for 25 samples" in said[0]
        assert "give the step samples=" in said[1]
        assert same
        assert as_if_nothing


# Somebody's autocast


def evaluated(rank, world_size, kind):
    """Logits in the block of a step of rate zero; and after a step in it, to logits without it."""
    off = []
    for rate, rule in ((0.0, SAM(0.5)), (0.1, SAM(0.5)), (0.1, None)):
        network = make_network()
        engine = make_engine(kind, network, optimizer=lambda n, r=rate: make_optimizer(n, r))
        step, inputs = SharpnessAwareStep(engine, rule), make_batch(9)[0]
        with torch.autocast("cpu", torch.bfloat16):
            train(step, rank, world_size, numbers=[0])
            with torch.no_grad():
                seen = engine.inference(inputs).float()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            off.append(float((engine.inference(inputs).float() - seen).abs().max()))
    return off


@pytest.mark.parametrize("kind", ["one", "ddp"])
def test_an_evaluation_in_the_block_around_a_step_sees_the_weights(kind):
    for off in everywhere(kind, evaluated):
        assert off == [0, 0, 0]


# Overflow


class Watched(nn.Module):
    """Raises on what is not finite, as distributions and indices do; its gradient may overflow."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.network, self.how = make_network(), how

    def forward(self, x):
        z = self.network(x)
        torch.distributions.Categorical(logits=z, validate_args=True)
        if self.training and self.how != "never":
            z = z + 0 * z.detach()
            z.register_hook(self.spoil)
        return z

    def spoil(self, gradient):
        if self.how == "one":
            gradient = gradient.clone()
            gradient[0, 0] = math.inf
            return gradient
        return gradient * (math.nan if self.how == "nan" else 1e38 * 1e5)


def overflown(rank, world_size, kind):
    outcome = {}
    rules = SAM(0.1), CSAM(0.1, gamma=1.0), ASAM(0.5), LookSAM(0.1, every=2), GSAM(0.1, alpha=0.4)
    for rule in rules:
        for how in ("all", "one", "nan"):
            network = Watched(how if rank == world_size - 1 else "never")
            engine = make_engine(kind, network)
            before = saved(engine)
            [result] = train(SharpnessAwareStep(engine, rule), rank, world_size, numbers=[0])
            outcome[rule.name, how] = result.skipped and saved(engine) == before
    return outcome


@pytest.mark.parametrize("kind", UNLIKE)
def test_no_network_runs_on_weights_that_are_not_finite(kind):
    for outcome in everywhere(kind, overflown):
        assert len(outcome) == 15
        assert [case for case, right in outcome.items() if not right] == []


def overflown_later(rank, world_size, kind):
    outcome = []
    for name in ("wsam", "friendly_sam", "ssam", "le_sam", "stale_sam", "functional_sam"):
        network = Watched("one" if rank == world_size - 1 else "never")
        engine = make_engine(kind, network)
        before = saved(engine)
        [result] = train(SharpnessAwareStep(engine, RULES[name]), rank, world_size, numbers=[0])
        outcome.append(result.skipped and saved(engine) == before)
    return outcome


@pytest.mark.parametrize("kind", UNLIKE)
def test_no_network_does_with_rules_of_2023_and_later(kind):
    for outcome in everywhere(kind, overflown_later):
        assert outcome == [True] * 6


# ASAM by whole names


def test_asam_adapts_weights_of_parametrizations():
    """As the authors' code, which looks for `weight` in the whole name."""
    torch.manual_seed(0)
    network = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)))
    names = [name for name, _ in network.named_parameters()]
    assert sum("original" in name for name in names) == 2
    rule, (inputs, target) = ASAM(0.5), make_batch(0)
    loss = F.cross_entropy(network(inputs), target)
    g = torch.autograd.grad(loss, list(network.parameters()))
    stretch = [
        w.detach().abs() + rule.eta if "weight" in name else torch.ones_like(w)
        for name, w in network.named_parameters()
    ]
    length = torch.cat([(t * x).flatten() for t, x in zip(stretch, g, strict=True)]).norm()
    wanted = [rule.rho * t * t * x / length for t, x in zip(stretch, g, strict=True)]
    start = [w.detach().clone() for w in network.parameters()]
    seen = []
    network.register_forward_pre_hook(
        lambda *_: seen.append([w.detach().clone() for w in network.parameters()])
    )
    SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), rule)([(inputs, target)])
    for w, now, e in zip(start, seen[1], wanted, strict=True):
        assert torch.allclose(now - w, e, atol=1e-6)


# What rounding leaves of a perturbation


def test_what_is_seen_of_a_perturbation_is_measured_along_it():
    """Of weights near 1, whose neighbours in bf16 are 2^-7 and 2^-8 away: nothing but noise."""
    torch.manual_seed(0)
    w = 1 + torch.rand(100_000)
    e = torch.randn(100_000) * 1e-4
    moved = w + e
    e = moved - w
    rounded = measure([moved], [w], [e], [torch.bfloat16])
    seen = moved.bfloat16().float() - w.bfloat16().float()
    assert float(rounded.cosine) == pytest.approx(1, abs=1e-4)
    assert float(rounded.perturbation_norm) == pytest.approx(float(e.norm()), rel=1e-5)
    assert float(rounded.effective_rho) == pytest.approx(float(seen.norm()), rel=1e-5)
    assert float(rounded.seen_along) == pytest.approx(float(seen @ e / e.norm()), rel=1e-4)
    cosine = float(F.cosine_similarity(seen, e, dim=0))
    assert float(rounded.seen_cosine) == pytest.approx(cosine, rel=1e-4)
    assert rounded.effective_rho > 3 * rounded.perturbation_norm, "it looks more than long enough"
    assert rounded.seen_cosine < 0.3, "but leads elsewhere"
    exact = measure([moved], [w], [None], [torch.float32])
    assert float(exact.seen_cosine) == pytest.approx(1, abs=1e-4)
    assert exact.effective_rho == exact.perturbation_norm
    assert float(exact.seen_along) == pytest.approx(float(e.norm()), rel=1e-4)


def test_weights_that_autocast_leaves_in_fp32_are_not_rounded_in_the_measurement():
    """Here they alone are trained, so that nothing is rounded at all."""
    network = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 5))
    network.append(nn.BatchNorm1d(5))
    for layer in (network[0], network[2]):
        layer.requires_grad_(False)
    engine = ReplicatedEngine(network, make_optimizer(network), torch.bfloat16)
    step = SharpnessAwareStep(engine, SAM(1e-5))
    with torch.autocast("cpu", torch.bfloat16):
        result = step([make_batch(0)], measure=True)
    assert result.effective_rho == result.perturbation_norm == pytest.approx(1e-5, rel=0.05)
    assert result.seen_cosine == pytest.approx(1, abs=1e-4)
