"""What rules and the step promise besides the formulas, which test_exactness compares."""

import copy

import pytest
import torch
from torch import nn

from flatcal_dist.sharpness import (
    ASAM,
    CSAM,
    GSAM,
    SAM,
    LookSAM,
    MomentumSAM,
    ReplicatedEngine,
    SharpnessAwareStep,
)
from tests.support.engines import UNLIKE, everywhere, make_engine, used
from tests.support.reference import (
    NEW,
    RULES,
    bits,
    make_batch,
    make_network,
    make_optimizer,
    my_part,
    norm,
    perturbation,
    train,
)


def one_step(rule, network, **options):
    engine = ReplicatedEngine(network, make_optimizer(network))
    return SharpnessAwareStep(engine, rule)([make_batch(0)], **options)


def gradient(network: nn.Module) -> list[torch.Tensor]:
    inputs, target = make_batch(0)
    loss = nn.functional.cross_entropy(network(inputs), target)
    return list(torch.autograd.grad(loss, list(network.parameters())))


def test_asam_does_not_see_the_scale_of_a_layer():
    """Two layers scaled by 4 and 1/4 compute the same function, and e moves it alike (eta 0)."""
    plain = nn.Sequential(nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False))
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        scaled[0].weight.mul_(4)
        scaled[2].weight.mul_(0.25)
    outputs = []
    for network in (plain, scaled):
        seen = []
        network.register_forward_hook(lambda m, a, output, seen=seen: seen.append(output.detach()))
        one_step(ASAM(0.5, eta=0.0), network)
        outputs.append(seen[1])
    assert torch.allclose(*outputs, atol=1e-5)


# Steps that perturb, and steps that do not


def in_turn(rank, world_size, kind):
    """Forward passes by step; and SAM and plain steps in turn, by two steps on one engine."""
    counts = {}
    for rule in (SAM(0.1, every=3), LookSAM(0.1, every=3)):
        engine = make_engine(kind)
        step, passes = SharpnessAwareStep(engine, rule), []
        engine.module.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        counts[type(rule).__name__] = []
        for number in range(7):
            before = len(passes)
            [result] = train(step, rank, world_size, numbers=[number])
            assert (result.perturbed_loss is not None) == (number % 3 == 0)
            counts[type(rule).__name__].append(len(passes) - before)
        if isinstance(rule, SAM) and not rule.combines:
            ours = bits(used(engine))
    engine = make_engine(kind)
    sharp, plain = SharpnessAwareStep(engine, SAM(0.1)), SharpnessAwareStep(engine, None)
    for number in range(7):
        train(plain if number % 3 else sharp, rank, world_size, numbers=[number])
    return counts, ours == bits(used(engine))


@pytest.mark.parametrize("kind", UNLIKE)
def test_periodic_rules_have_a_second_pass_in_every_third_step_only(kind):
    for counts, same in everywhere(kind, in_turn):
        assert counts == {"SAM": [2, 1, 1, 2, 1, 1, 2], "LookSAM": [2, 1, 1, 2, 1, 1, 2]}
        assert same


def test_rho_may_change_between_steps():
    ours, theirs = make_network(), make_network()
    step = SharpnessAwareStep(ReplicatedEngine(ours, make_optimizer(ours)), SAM(0.1))
    step([make_batch(0)], rho=0.3)
    one_step(SAM(0.3), theirs)
    assert bits(ours.state_dict()) == bits(theirs.state_dict())


def test_the_number_of_a_step_decides_whether_a_periodic_rule_perturbs():
    network = make_network()
    step = SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), SAM(0.1, every=3))
    perturbed = [step([make_batch(0)], at=at).perturbed_loss is not None for at in (4, 3, 7, 6)]
    assert perturbed == [False, True, False, True]
    assert step.taken == 7, "a step without a number comes after the last one"
    assert step([make_batch(0)]).perturbed_loss is None


# What a step reports


def test_sharpness_is_of_one_objective_also_for_csam():
    """perturbed_loss is cross-entropy at w + e, though CSAM descends its own loss there."""
    results = [one_step(rule, make_network()) for rule in (SAM(0.2), CSAM(0.2))]
    assert results[0].perturbed_loss == results[1].perturbed_loss > results[0].loss
    assert results[0].gradient_norm != results[1].gradient_norm


def measured(rank, world_size, kind):
    step = SharpnessAwareStep(make_engine(kind), RULES["asam"])
    return step(my_part(rank, world_size, 0, 2), measure=True)


@pytest.mark.parametrize("kind", UNLIKE)
def test_what_is_measured_is_of_the_two_gradients_of_all_ranks(kind):
    network, moved = make_network(), make_network()
    g = gradient(network)
    names = [n for n, _ in network.named_parameters()]
    e = perturbation(RULES["asam"], names, list(network.parameters()), g)
    with torch.no_grad():
        for w, d in zip(moved.parameters(), e, strict=True):
            w += d
    inputs, target = make_batch(0)
    losses = [nn.functional.cross_entropy(n(inputs), target).item() for n in (network, moved)]
    g_s = gradient(moved)
    cosine = sum(float((a * b).sum()) for a, b in zip(e, g_s, strict=True)) / norm(e) / norm(g_s)
    for result in everywhere(kind, measured):
        assert [result.loss, result.perturbed_loss] == pytest.approx(losses, rel=1e-5)
        assert result.cosine == pytest.approx(cosine, abs=1e-5)
        assert result.effective_rho == pytest.approx(norm(e), rel=1e-5)
        assert result.gradient_norm == pytest.approx(norm(g_s), rel=1e-5)
    assert 0 < cosine < 0.9999


# Gradients of zero


def without_gradient(rank, world_size, kind):
    """A loss that does not depend on the weights; CSAM has one of its own."""
    outcome = []
    rules = (None, SAM(0.1), ASAM(0.5), LookSAM(0.1, every=2), GSAM(0.1), MomentumSAM(1.0))
    new = (RULES[name] for name in NEW if name not in ("sam_norms", "sam_share"))
    for rule in (*rules, *new):
        engine = make_engine(kind, optimizer=lambda n: torch.optim.SGD(n.parameters(), lr=0.1))
        before = bits(used(engine))
        step = SharpnessAwareStep(engine, rule, loss=lambda logits, target: 0 * logits.sum(1))
        results = [step(my_part(rank, world_size, number)) for number in range(2)]
        good = all(not r.skipped and r.gradient_norm == 0 and r.loss == 0 for r in results)
        outcome.append((good, before == bits(used(engine))))
    return outcome


@pytest.mark.parametrize("kind", UNLIKE)
def test_zero_gradients_do_not_divide_by_zero(kind):
    for outcome in everywhere(kind, without_gradient):
        assert outcome == [(True, True)] * (4 + len(NEW))
