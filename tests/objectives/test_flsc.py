"""The focal loss by epoch against its formula in double precision, and at its ends."""

import pytest
import torch

from flatcal_dist.config import load
from flatcal_dist.objectives import FLSc, Focal, Targets, cross_entropy
from tests.support.literal_objectives import Case, check_formula, true_class


def literal(logits, targets, second_from, third_from, gamma_second=3.0, gamma_third=1.0):
    gammas = [5.0] * second_from + [gamma_second] * (third_from - second_from)
    gamma = gammas[targets.epoch] if targets.epoch < third_from else gamma_third
    p = true_class(logits, targets)
    return -((1 - p) ** gamma) * p.log()


TRAINED = [
    Case("flsc", literal, {"second_from": 1, "third_from": 3}),
    Case("flsc", literal, {"second_from": 0, "third_from": 2, "gamma_third": 0.5}),
]


@pytest.mark.parametrize("case", TRAINED)
def test_losses_and_gradient_are_the_formula(case):
    check_formula(case)


def test_the_default_is_the_schedule_of_the_authors():
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(8, 5), torch.randint(5, (8,))
    assert load(None, ["objective.name=flsc", "train.epochs=350"]).objective.build() == FLSc()
    for epoch, gamma in {0: 5, 99: 5, 100: 3, 249: 3, 250: 1, 349: 1}.items():
        losses = FLSc()(logits, Targets(labels, epoch=epoch))
        assert torch.equal(losses, Focal(float(gamma))(logits, labels))


def test_it_is_cross_entropy_where_the_exponent_is_0():
    logits, labels = 4 * torch.randn(8, 5), torch.randint(5, (8,))
    objective = FLSc(gamma_first=0.0, second_from=2)
    plain = cross_entropy(logits, labels, reduction="none")
    assert torch.equal(objective(logits, Targets(labels, epoch=1)), plain)
    assert not torch.equal(objective(logits, Targets(labels, epoch=2)), plain)


def test_its_slope_is_finite_where_the_network_is_sure():
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    losses = FLSc(gamma_first=0.5)(logits, Targets(torch.tensor([0, 0])))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


def test_what_it_cannot_use_is_refused():
    with pytest.raises(ValueError, match=r"FLSc depends on the epoch: give it Targets\(labels, ep"):
        FLSc()(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="FLSc is defined for hard labels only"):
        FLSc()(torch.zeros(2, 3), Targets(torch.full((2, 3), 1 / 3)))
    for key, value in {"gamma_first": -1.0, "gamma_third": 101.0, "second_from": -1}.items():
        with pytest.raises(ValueError, match=f"FLSc: {key} = "):
            FLSc(**{key: value})
