"""The rule's contract: a rule of one's own that perturbs a part, or by a part of the batch."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from flatcal_dist.sharpness import SAM, MomentumSAM, ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.training.figures import sharpness_figures
from tests.support.engines import UNLIKE, everywhere, make_engine
from tests.support.readme import example_class
from tests.support.reference import (
    CLOSE,
    far,
    make_batch,
    make_network,
    make_optimizer,
    my_part,
    norm,
    train,
)

STEPS = range(3)


@dataclass(frozen=True)
class OfBiases(SAM):
    def selects(self, name):
        return name.endswith("bias")


@dataclass(frozen=True)
class OfOne(SAM):
    """Some ranks of ZeRO hold nothing of it."""

    def selects(self, name):
        return name == "0.bias"


@dataclass(frozen=True)
class OfNothing(SAM):
    def selects(self, name):
        return False


def by_hand(selects, share, ranks):
    """One process: e is of the selected weights, by the first samples of each rank's part."""
    network = make_network()
    optimizer = make_optimizer(network)
    names = [name for name, _ in network.named_parameters()]
    weights = list(network.parameters())
    for number in STEPS:
        inputs, target = make_batch(number)
        parts = [my_part(rank, ranks, number)[0] for rank in range(ranks)]
        heads = [(x[: int(len(x) * share)], y[: int(len(x) * share)]) for x, y in parts]
        x, y = (torch.cat(values) for values in zip(*heads, strict=True))
        g = torch.autograd.grad(F.cross_entropy(network(x), y), weights)
        chosen = [
            a if selects(name) else torch.zeros_like(a) for name, a in zip(names, g, strict=True)
        ]
        e = [0.1 * a / (norm(chosen) or 1.0) for a in chosen]
        before = [w.detach().clone() for w in weights]
        with torch.no_grad():
            torch._foreach_add_(weights, e)
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), target).backward()
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
        optimizer.step()
    return network.state_dict()


def by_rule(rank, world_size, kind):
    outcome = []
    for rule in (OfBiases(0.1), OfOne(0.1), OfNothing(0.1), SAM(0.1, share=1 / 3)):
        engine = make_engine(kind)
        results = train(
            SharpnessAwareStep(engine, rule), rank, world_size, numbers=STEPS, measure=True
        )
        lengths = [result.perturbation_norm for result in results]
        outcome.append((engine.full_weights(), lengths, results[0].loss))
    return outcome


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_rule_selects_weights_and_a_share_of_the_batch(kind):
    outcomes = everywhere(kind, by_rule)
    expected = [
        by_hand(lambda name: name.endswith("bias"), 1, 1),
        by_hand(lambda name: name == "0.bias", 1, 1),
        by_hand(lambda name: False, 1, 1),
        by_hand(lambda name: True, 1 / 3, len(outcomes)),
    ]
    lengths_wanted = (0.1, 0.1, 0.0, 0.1)
    for (weights, lengths, _), wanted, length in zip(
        outcomes[0], expected, lengths_wanted, strict=True
    ):
        assert far(weights, wanted) < CLOSE
        assert lengths == pytest.approx([length] * len(lengths), rel=1e-5)
    heads = [my_part(rank, len(outcomes), 0)[0] for rank in range(len(outcomes))]
    x, y = (torch.cat([t[: len(t) // 3] for t in part]) for part in zip(*heads, strict=True))
    loss = F.cross_entropy(make_network()(x), y).item()
    assert outcomes[0][-1][2] == pytest.approx(loss, rel=1e-6), "the mean over the share"


def test_a_rule_without_an_ascent_pass_has_no_sharpness_to_report():
    """It has no loss at w: a difference of 0 would be wrong."""
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network))
    step = SharpnessAwareStep(engine, MomentumSAM(0.5))
    first, second = train(step, 0, 1, numbers=range(2), measure=True)
    assert first.perturbation_norm == 0, "there is no momentum yet"
    assert second.perturbation_norm == pytest.approx(0.5, rel=1e-5)
    assert second.perturbed_loss is None
    assert second.ascent_gradient_norm is None
    figures = sharpness_figures(second, 0.5)
    assert figures["optim/effective_rho"] == pytest.approx(0.5, rel=1e-5)
    assert not any(name.startswith("train/") for name in figures)


def test_the_rule_of_the_readme():
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network))
    rule = example_class("sharpness", "BiasSAM")(rho=0.05, factor=2.0)
    train(SharpnessAwareStep(engine, rule), 0, 1, numbers=STEPS)
    assert far(network.state_dict(), by_hand(lambda name: name.endswith("bias"), 1, 1)) < CLOSE
