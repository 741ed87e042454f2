"""Friendly SAM beside the matrix: its neutral value, and what it remembers."""

import torch

from flatcal_dist.sharpness import SAM, FriendlySAM, SharpnessAwareStep
from tests.support.engines import make_engine
from tests.support.reference import bits, make_batch, make_network, train


def test_sigma_zero_is_sam():
    ends = []
    for rule in (SAM(0.1), FriendlySAM(0.1, sigma=0.0)):
        engine = make_engine("one")
        train(SharpnessAwareStep(engine, rule), 0, 1)
        ends.append(bits(engine.full_weights()))
    assert ends[0] == ends[1]


def test_it_remembers_the_ascent_gradients_and_only_of_steps_that_perturb():
    network = make_network()
    step = SharpnessAwareStep(make_engine("one", network), FriendlySAM(0.1, decay=0.6, every=2))
    average = None
    for number in range(4):
        inputs, target = make_batch(number)
        loss = torch.nn.functional.cross_entropy(network(inputs), target)
        g = dict(
            zip(
                dict(network.named_parameters()),
                torch.autograd.grad(loss, list(network.parameters())),
                strict=True,
            )
        )
        if number == 0:
            average = g
        elif number == 2:
            average = {name: 0.6 * m + 0.4 * g[name] for name, m in average.items()}
        train(step, 0, 1, numbers=[number])
        assert step.memory.keys() == average.keys()
        for name, m in average.items():
            assert torch.allclose(step.memory[name], m, atol=1e-6)


def test_a_skipped_step_is_not_remembered():
    network = make_network()
    step = SharpnessAwareStep(make_engine("one", network), FriendlySAM(0.1))
    train(step, 0, 1, numbers=[0])
    before = bits(step.memory)
    spoiled = [(x * float("nan"), y) for x, y in [make_batch(1)]]
    assert step(spoiled).skipped
    assert bits(step.memory) == before
