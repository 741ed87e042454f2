"""The sample-dependent focal loss against its formula in double precision, and at its ends."""

import pytest
import torch

from flatcal_dist.config import load
from flatcal_dist.objectives import FLSD, Focal, cross_entropy
from tests.support.literal_objectives import Case, apart, check_formula, true_class


def literal(
    logits, targets, low=0.2, high=0.5, gamma_low=5.0, gamma_middle=3.0, gamma_high=3.0
):  # fmt: skip
    """Sample by sample; the choice of gamma is a constant."""
    losses = []
    for p in true_class(logits, targets):
        apart(torch.stack([p - low, p - high]))
        gamma = gamma_low if p < low else gamma_middle if p < high else gamma_high
        losses.append(-((1 - p) ** gamma) * p.log())
    return torch.stack(losses)


TRAINED = [
    Case("flsd", literal),
    Case("flsd", literal, {"gamma_high": 2.0}),  # FLSD-52
    Case("flsd", literal, {"low": 0.3, "high": 0.9, "gamma_low": 1.0, "gamma_middle": 0.5}),
]


@pytest.mark.parametrize("case", TRAINED)
def test_losses_and_gradient_are_the_formula(case):
    check_formula(case)


def test_a_bound_belongs_to_the_upper_part():
    """As `p < bound` in the authors' code."""
    p = torch.tensor([0.0, 0.1999, 0.2, 0.4999, 0.5, 1.0])
    assert FLSD().gammas(p).tolist() == [5, 5, 3, 3, 3, 3]
    assert FLSD(gamma_high=2.0).gammas(p).tolist() == [5, 5, 3, 3, 2, 2]
    assert FLSD(low=0.0, high=0.0, gamma_high=7.0).gammas(p).tolist() == [7] * 6
    assert FLSD(gamma_high=2.0).gammas(p.double()).dtype == torch.float64


def test_one_exponent_is_the_focal_loss_and_0_is_cross_entropy():
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(64, 5), torch.randint(5, (64,))
    for gamma in (0.0, 0.5, 3.0):
        losses = FLSD(gamma_low=gamma, gamma_middle=gamma, gamma_high=gamma)(logits, labels)
        assert torch.allclose(losses, Focal(gamma)(logits, labels), rtol=1e-6, atol=1e-30)
        if gamma == 0:
            assert torch.equal(losses, cross_entropy(logits, labels, reduction="none"))


def test_its_slope_is_finite_where_the_network_is_sure():
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    losses = FLSD(gamma_low=0.5, gamma_high=0.5)(logits, torch.tensor([0, 0]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


def test_what_it_cannot_use_is_refused():
    with pytest.raises(ValueError, match="FLSD is defined for hard labels only"):
        FLSD()(torch.zeros(2, 3), torch.full((2, 3), 1 / 3))
    for key in ("low", "high", "gamma_low", "gamma_middle", "gamma_high"):
        for value in (-0.1, 101.0, float("nan"), "1"):
            with pytest.raises(ValueError, match=f"FLSD: {key} = "):
                FLSD(**{key: value})
    assert load(None, ["objective.name=flsd"]).objective.build() == FLSD()
