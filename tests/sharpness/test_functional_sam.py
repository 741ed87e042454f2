"""Functional SAM beside the matrix: plain at rho 0, and a product with the Jacobian."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatcal_dist.objectives import Focal
from flatcal_dist.sharpness import FunctionalSAM, SharpnessAwareStep, StepError
from tests.support.engines import make_engine
from tests.support.reference import (
    CLOSE,
    far,
    make_batch,
    make_network,
    make_optimizer,
    perturbation,
    train,
)


def test_rho_zero_is_plain_training():
    ends = []
    for rule in (None, FunctionalSAM(0.0)):
        engine = make_engine("one")
        train(SharpnessAwareStep(engine, rule), 0, 1)
        ends.append(engine.full_weights())
    assert far(*ends) < CLOSE


def test_the_gradient_is_a_product_of_the_jacobian_at_w_e_and_the_slopes_at_w():
    network, (inputs, target) = make_network(), make_batch(0)
    moved = copy.deepcopy(network)
    weights, names = list(network.parameters()), dict(network.named_parameters())
    loss = F.cross_entropy(network(inputs), target)
    g = torch.autograd.grad(loss, weights)
    es = perturbation(FunctionalSAM(0.3), names, weights, g)
    with torch.no_grad():
        for w, e in zip(moved.parameters(), es, strict=True):
            w += e

    def logits_of(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(moved, dict(zip(names, values, strict=True)), (inputs,))

    jacobians = torch.autograd.functional.jacobian(logits_of, tuple(moved.parameters()))
    slopes = (F.softmax(network(inputs), 1) - F.one_hot(target, 5)).detach() / len(target)
    wanted = [
        (slopes[..., *(None,) * w.dim()] * j).sum((0, 1))
        for w, j in zip(weights, jacobians, strict=True)
    ]

    ours = make_network()
    engine = make_engine("one", ours, optimizer=lambda n: torch.optim.SGD(n.parameters(), lr=1.0))
    SharpnessAwareStep(engine, FunctionalSAM(0.3))([(inputs, target)])
    for start, end, x in zip(weights, ours.parameters(), wanted, strict=True):
        assert torch.allclose(start - end, x, atol=1e-5)


def test_it_follows_the_objective_and_reports_it():
    """With focal loss; what is reported at w + e is the objective, not slopes times logits."""
    network = make_network()
    step = SharpnessAwareStep(make_engine("one", network), FunctionalSAM(0.3), loss=Focal())
    inputs, target = make_batch(0)
    before = Focal()(network(inputs), target).mean().item()
    result = step([(inputs, target)])
    assert result.loss == pytest.approx(before, rel=1e-5)
    assert result.perturbed_loss > result.loss


def test_it_refuses_losses_that_the_user_computes():
    step = SharpnessAwareStep(make_engine("one"), FunctionalSAM(0.1))
    with pytest.raises(StepError, match="FunctionalSAM computes the losses itself"):
        step([make_batch(0)], forward=lambda model, batch: model(batch[0]).sum(1))


class Half(nn.Module):
    """A network that gives logits in a lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.network = make_network()

    def forward(self, x):
        return self.network(x).bfloat16()


def test_slopes_of_logits_in_low_precision_are_taken_in_float32():
    network = Half()
    step = SharpnessAwareStep(
        make_engine("one", network, optimizer=make_optimizer), FunctionalSAM(0.0)
    )
    plain = Half()
    other = SharpnessAwareStep(make_engine("one", plain, optimizer=make_optimizer), None)
    for one in (step, other):
        train(one, 0, 1, numbers=[0])
    assert far(network.state_dict(), plain.state_dict()) < 1e-3
