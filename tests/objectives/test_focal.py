"""The focal loss against its formula in double precision, and at its ends."""

import pytest
import torch

from flatcal_dist.objectives import Focal, cross_entropy
from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep
from tests.support.reference import make_batch, make_network, make_optimizer


def test_it_is_its_formula_and_cross_entropy_at_gamma_zero():
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(64, 5), torch.randint(5, (64,))
    p = logits.double().softmax(1)[torch.arange(64), labels]
    for gamma in (0.5, 2.0, 3.0):
        expected = -((1 - p) ** gamma) * p.log()
        assert torch.allclose(Focal(gamma)(logits, labels).double(), expected, atol=1e-6)
    plain = cross_entropy(logits, labels, reduction="none")
    assert torch.equal(Focal(0.0)(logits, labels), plain)


def test_its_slope_is_finite_where_the_network_is_sure():
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    losses = Focal(0.5)(logits, torch.tensor([0, 0]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


def test_it_trains_with_sam():
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network, lr=0.05))
    step = SharpnessAwareStep(engine, SAM(0.05), loss=Focal(2.0))
    losses = [step([make_batch(0)]).loss for _ in range(20)]
    assert losses[-1] < losses[0] / 2


def test_probabilities_are_refused():
    with pytest.raises(ValueError, match="Focal is defined for hard labels only"):
        Focal()(torch.zeros(2, 3), torch.full((2, 3), 1 / 3))
