"""The norm of the logits against its formula in double precision, and at its ends."""

import pytest
import torch

from flatcal_dist.config import load
from flatcal_dist.objectives import LpNorm, cross_entropy
from tests.support.literal_objectives import Case, apart, check_formula, plain


def literal(logits, targets, p=1.0, weight=0.01):
    z = logits.double()
    apart(z)
    return plain(logits, targets) + weight * (z.abs() ** p).sum(1) ** (1 / p)


TRAINED = [
    Case("lp_norm", literal),
    Case("lp_norm", literal, {"p": 2.0, "weight": 0.1}),
]
OTHERS = [Case("lp_norm", literal, {"p": p}) for p in (1.5, 3.0, 20.0)]


@pytest.mark.parametrize("case", [*TRAINED, *OTHERS])
def test_losses_and_gradient_are_the_formula(case):
    check_formula(case)


def test_the_default_is_the_sum_of_absolute_logits():
    logits, labels = 4 * torch.randn(8, 5), torch.randint(5, (8,))
    objective = load(None, ["objective.name=lp_norm"]).objective.build()
    assert objective == LpNorm(1.0, 0.01)
    expected = cross_entropy(logits, labels, "none") + 0.01 * logits.abs().sum(1)
    assert torch.allclose(objective(logits, labels), expected)


def test_weight_0_is_cross_entropy():
    logits, labels = 4 * torch.randn(8, 5), torch.randint(5, (8,))
    plain = cross_entropy(logits, labels, "none")
    for p in (1.0, 2.0, 100.0):
        assert torch.equal(LpNorm(p, 0.0)(logits, labels), plain)


@pytest.mark.parametrize("p", [1.0, 1.001, 1.5, 2.0, 3.0, 100.0])
def test_the_slope_is_finite_at_zero_and_far_from_it(p):
    rows = [[0.0] * 3, [0.0, 1.0, 0.0], [1e4, -1e4, 0.0], [1e4] * 3, [1e-30, 0.0, -1e-38]]
    logits = torch.tensor([*rows, [1e-45, 0.0, 0.0]], requires_grad=True)
    labels = torch.zeros(6, dtype=torch.long)
    extra = LpNorm(p, 1.0)(logits, labels) - cross_entropy(logits, labels, "none")
    extra.sum().backward()
    assert extra.isfinite().all()
    assert logits.grad.isfinite().all()
    assert (logits.grad.abs() <= 1 + 1e-5).all()
    assert not logits.grad[0].any()
    assert torch.allclose(logits.grad[1], torch.tensor([0.0, 1.0, 0.0]))


def test_a_norm_that_is_no_norm_is_refused():
    for p in (0.5, 0.0, -1.0, 101.0, float("inf"), "1"):
        with pytest.raises(ValueError, match="LpNorm: p = "):
            LpNorm(p)
    with pytest.raises(ValueError, match=r"LpNorm: weight = -0\.1"):
        LpNorm(weight=-0.1)
