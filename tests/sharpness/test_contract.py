"""The rule's contract: a rule of one's own that perturbs a part, or by a part of the batch."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from flatcal_dist.sharpness import SAM, SharpnessAwareStep
from tests.sharpness.engines import EVERYWHERE, everywhere, make_engine
from tests.sharpness.reference import (
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
class OfAThird(SAM):
    ascent_share: ClassVar[float] = 1 / 3


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
        e = [0.1 * a / norm(chosen) for a in chosen]
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
    for rule in (OfBiases(0.1), OfAThird(0.1)):
        engine = make_engine(kind)
        results = train(
            SharpnessAwareStep(engine, rule), rank, world_size, numbers=STEPS, measure=True
        )
        outcome.append((engine.full_weights(), [r.perturbation_norm for r in results]))
    return outcome


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_a_rule_selects_weights_and_a_share_of_the_batch(kind):
    outcomes = everywhere(kind, by_rule)
    expected = [
        by_hand(lambda name: name.endswith("bias"), 1, 1),
        by_hand(lambda name: True, 1 / 3, len(outcomes)),
    ]
    for (weights, lengths), wanted in zip(outcomes[0], expected, strict=True):
        assert far(weights, wanted) < CLOSE
        assert lengths == pytest.approx([0.1] * len(lengths), rel=1e-5)
