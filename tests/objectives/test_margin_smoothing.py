"""Margin-based label smoothing against its formula in double precision, and at its ends."""

import pytest
import torch

from flatcal_dist.config import load
from flatcal_dist.objectives import MarginSmoothing, cross_entropy
from tests.support.literal_objectives import Case, apart, check_formula, plain


def literal(logits, targets, margin=10.0, weight=0.1):
    """Class by class, and the mean over classes."""
    losses = []
    for z, loss in zip(logits.double(), plain(logits, targets), strict=True):
        beyond = max(z) - z - margin
        apart(beyond)
        losses.append(loss + weight / len(z) * beyond[beyond > 0].sum())
    return torch.stack(losses)


TRAINED = [
    Case("margin_smoothing", literal, {"margin": 3.0, "weight": 0.5}),
    Case("margin_smoothing", literal, {"margin": 1.0}),
]


@pytest.mark.parametrize("case", [*TRAINED, Case("margin_smoothing", literal)])
def test_losses_and_gradient_are_the_formula(case):
    check_formula(case)


def test_logits_within_the_margin_and_weight_0_are_cross_entropy():
    logits, labels = torch.rand(8, 5), torch.randint(5, (8,))
    objective = load(None, ["objective.name=margin_smoothing"]).objective.build()
    assert objective == MarginSmoothing(10.0, 0.1)
    assert torch.equal(objective(10 * logits, labels), cross_entropy(10 * logits, labels, "none"))
    wide = 100 * logits
    plain = cross_entropy(wide, labels, "none")
    assert torch.equal(MarginSmoothing(weight=0.0)(wide, labels), plain)
    assert not torch.equal(objective(wide, labels), plain)


def test_the_penalty_and_its_slope_by_hand():
    logits = torch.tensor([[20.0, 9.0, -5.0, 15.0], [1e4, -1e4, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    extra = MarginSmoothing(10.0, 1.0)(logits, labels) - cross_entropy(logits, labels, "none")
    extra.sum().backward()
    assert extra.tolist() == [(1 + 15) / 4, (19990 + 2 * 9990) / 4]
    assert logits.grad.tolist() == [[0.5, -0.25, -0.25, 0.0], [0.75, -0.25, -0.25, -0.25]]


def test_what_is_outside_its_bounds_is_refused():
    for key in ("margin", "weight"):
        for value in (-0.1, 1e7, float("nan"), "1"):
            with pytest.raises(ValueError, match=f"MarginSmoothing: {key} = "):
                MarginSmoothing(**{key: value})
