"""The objectives against their formulas, in float64 and in the tails."""

import math

import pytest
import torch

from flatcal_dist.objectives import cross_entropy, csam_loss


def logits_of(p: float, dtype=torch.float64) -> torch.Tensor:
    """Two-class logits whose softmax gives p to class 0."""
    return torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=dtype)


ZERO = torch.zeros(1, dtype=torch.long)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.49, 0.51, 0.9, 0.999999])
def test_value_and_gradient_are_the_formula(p, gamma):
    logits = logits_of(p).requires_grad_()
    loss = csam_loss(logits, ZERO, gamma)
    loss.backward()
    if p <= 0.5:
        value, slope = -math.log(p), -(1 - p)
    else:
        weight = (1 + p) ** -gamma
        value = -weight * math.log(p)
        # Cross-entropy's by the true logit, times the factor of the weight's own part.
        slope = -(1 - p) * weight * (1 + gamma * p * -math.log(p) / (1 + p))
    assert math.isclose(loss.item(), value, rel_tol=1e-9)
    assert math.isclose(float(logits.grad[0, 0]), slope, rel_tol=1e-6)


def test_bound_of_the_binary_entropy():
    """-(1+p)^-gamma log p >= -log p - (gamma/2) H(p) on (1/2, 1) (Tan et al., ICLR 2026)."""
    for gamma in (0.0, 0.5, 1.0, 2.0):
        for p in torch.linspace(0.501, 0.999, 200).tolist():
            entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
            loss = float(csam_loss(logits_of(p), ZERO, gamma))
            assert loss >= -math.log(p) - gamma / 2 * entropy - 1e-12


@pytest.mark.parametrize("margin", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_logits_stay_finite(margin):
    logits = torch.tensor([[margin, 0.0, 0.0]], requires_grad=True)
    loss = csam_loss(logits, ZERO, 2.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_gamma_zero_is_cross_entropy_and_reductions_agree():
    logits, target = torch.randn(7, 5), torch.randint(5, (7,))
    each = csam_loss(logits, target, 1.0, reduction="none")
    assert each.shape == (7,)
    assert torch.equal(each.mean(), csam_loss(logits, target, 1.0))
    assert torch.equal(each.sum(), csam_loss(logits, target, 1.0, reduction="sum"))
    plain = cross_entropy(logits, target, reduction="none")
    assert torch.equal(plain, csam_loss(logits, target, 0.0, reduction="none"))


def test_low_precision_logits_are_computed_in_float32():
    logits, target = torch.randn(7, 5), torch.randint(5, (7,))
    half = logits.bfloat16()
    assert csam_loss(half, target, 1.0).dtype == torch.float32
    assert torch.equal(csam_loss(half, target, 1.0), csam_loss(half.float(), target, 1.0))
    assert csam_loss(logits.double(), target, 1.0).dtype == torch.float64


def test_bad_input_is_refused():
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 2\], not 3"):
        csam_loss(logits, target, 3)
    with pytest.raises(ValueError, match="hard labels only"):
        csam_loss(logits, torch.rand(3, 4), 1.0)
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none'"):
        csam_loss(logits, target, 1.0, reduction="total")
