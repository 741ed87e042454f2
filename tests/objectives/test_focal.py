"""The focal loss against its formula in double precision, and at its ends."""

import pytest
import torch

from flatcal_dist.config import load
from flatcal_dist.objectives import Focal, Targets, cross_entropy
from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep
from tests.support.literal_objectives import Case, check_formula, true_class
from tests.support.reference import make_batch, make_network, make_optimizer


def literal(logits, targets, gamma, plain_epochs=0):
    p = true_class(logits, targets)
    return -((1 - p) ** (gamma if targets.epoch >= plain_epochs else 0.0)) * p.log()


TRAINED = [
    Case("focal", literal, {"gamma": 3.0}),
    Case("focal", literal, {"gamma": 2.0, "plain_epochs": 2}),
]


@pytest.mark.parametrize("case", [*TRAINED, Case("focal", literal, {"gamma": 0.5})])
def test_losses_and_gradient_are_the_formula(case):
    check_formula(case)


def test_it_is_cross_entropy_at_gamma_zero_and_in_plain_epochs():
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(64, 5), torch.randint(5, (64,))
    plain = cross_entropy(logits, labels, reduction="none")
    assert torch.equal(Focal(0.0)(logits, labels), plain)
    objective = Focal(2.0, plain_epochs=9)  # as the code of FMFP, whose first epoch is 1
    for epoch in range(12):
        expected = plain if epoch + 1 < 10 else Focal(2.0)(logits, labels)
        assert torch.equal(objective(logits, Targets(labels, epoch=epoch)), expected)


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


def test_what_it_cannot_use_is_refused():
    with pytest.raises(ValueError, match="Focal is defined for hard labels only"):
        Focal()(torch.zeros(2, 3), torch.full((2, 3), 1 / 3))
    with pytest.raises(ValueError, match=r"plain_epochs depends on the epoch: give it Targets\("):
        Focal(plain_epochs=1)(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="Focal: plain_epochs = -1"):
        Focal(plain_epochs=-1)
    assert load(None, ["objective.name=focal"]).objective.build() == Focal(3.0, 0)
