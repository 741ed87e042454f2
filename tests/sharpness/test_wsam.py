"""WSAM beside the matrix: its neutral values, its second descent, and what is not finite in it."""

import math

import pytest
import torch
from torch import nn

from flatcal_dist.sharpness import SAM, WSAM, SharpnessAwareStep
from tests.support.engines import UNLIKE, everywhere, make_engine, saved, used
from tests.support.reference import CLOSE, bits, far, make_network, reference, train


def ends(rule, **options) -> dict[str, torch.Tensor]:
    engine = make_engine("one")
    train(SharpnessAwareStep(engine, rule, **options), 0, 1)
    return engine.full_weights()


def test_gamma_of_a_half_is_sam_and_of_zero_is_plain():
    assert far(ends(WSAM(0.1, gamma=0.5, decouple=False)), ends(SAM(0.1))) < CLOSE
    plain = bits(ends(None))
    for decouple in (False, True):
        assert bits(ends(WSAM(0.1, gamma=0.0, decouple=decouple))) == plain


def test_decoupled_and_not_are_one_step_of_sgd_without_momentum():
    """And apart from then on, because the momentum of one of them holds the sharpness."""
    rules = [WSAM(0.1, gamma=0.8, decouple=decouple) for decouple in (False, True)]

    def sgd(momentum):
        return lambda network: torch.optim.SGD(network.parameters(), 0.1, momentum=momentum)

    for momentum, same in ((0.0, True), (0.9, False)):
        two = []
        for rule in rules:
            engine = make_engine("one", optimizer=sgd(momentum))
            train(SharpnessAwareStep(engine, rule), 0, 1)
            two.append(engine.full_weights())
        assert (far(*two) < CLOSE) == same


def groups(network: nn.Module) -> torch.optim.Optimizer:
    """Three learning rates. A large eps: AdamW would make much of the rounding of small numbers."""
    named = dict(network.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [named["0.weight"], named["0.bias"]], "lr": 0.01},
            {"params": [named["5.bias"]], "lr": 0.2},
            {"params": [named["5.weight"]]},
        ],
        lr=0.03,
        eps=1e-3,
    )


class SpoiledSecond(nn.Module):
    """The gradient of the second pass is infinite in one place on the last rank. Losses are not."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.network, self.last, self.calls = make_network(), last, 0

    def forward(self, x):
        self.calls += 1
        output = self.network(x)
        if self.last and self.calls % 2 == 0:
            output = output + 0 * output.detach()
            output.register_hook(lambda g: g.masked_fill(torch.eye(*g.shape) > 0, math.inf))
        return output


def trained(rank, world_size, kind):
    """By group of learning rates; and whether a bad second gradient leaves everything."""
    engine = make_engine(kind, optimizer=groups)
    train(SharpnessAwareStep(engine, WSAM(0.1, gamma=0.8)), rank, world_size, 2)
    weights = engine.full_weights()
    engine = make_engine(kind, SpoiledSecond(rank == world_size - 1))
    before = saved(engine), bits(used(engine))
    [result] = train(SharpnessAwareStep(engine, WSAM(0.1)), rank, world_size, numbers=[0])
    return weights, result.skipped, before == (saved(engine), bits(used(engine)))


@pytest.mark.parametrize("kind", UNLIKE)
def test_each_weight_descends_by_its_own_learning_rate_and_only_if_all_is_finite(kind):
    """The gradient of the optimizer is that of the first pass, and finite in either case."""
    outcomes = everywhere(kind, trained)
    expected = reference(WSAM(0.1, gamma=0.8), optimizer=groups)[0]
    assert far(outcomes[0][0], expected) < CLOSE
    assert [outcome[1:] for outcome in outcomes] == [(True, True)] * len(outcomes)
