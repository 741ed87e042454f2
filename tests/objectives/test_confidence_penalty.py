"""The penalty on confidence against its formula in double precision, and at its ends."""

import math

import pytest
import torch

from flatcal_dist.config import load
from flatcal_dist.objectives import ConfidencePenalty, cross_entropy
from tests.support.literal_objectives import Case, check_formula, plain


def literal(logits, targets, weight=0.1):
    p = logits.double().softmax(1)
    return plain(logits, targets) - weight * -(p * p.log()).sum(1)


TRAINED = [
    Case("confidence_penalty", literal),
    Case("confidence_penalty", literal, {"weight": 0.7}),
]


@pytest.mark.parametrize("case", TRAINED)
def test_losses_and_gradient_are_the_formula(case):
    check_formula(case)


def test_the_entropy_is_a_sum_over_classes_in_nats():
    labels = torch.zeros(2, dtype=torch.long)
    objective = load(None, ["objective.name=confidence_penalty"]).objective.build()
    assert objective == ConfidencePenalty(0.1)
    losses = objective(torch.tensor([[0.0] * 4, [50.0, 0, 0, 0]]), labels)
    assert losses.tolist() == pytest.approx([0.9 * math.log(4), 0.0], abs=1e-6)


def test_weight_0_is_cross_entropy():
    logits, labels = 4 * torch.randn(8, 5), torch.randint(5, (8,))
    plain = cross_entropy(logits, labels, "none")
    assert torch.equal(ConfidencePenalty(0.0)(logits, labels), plain)
    mixed = logits.softmax(1)
    plain = cross_entropy(logits, mixed, "none")
    assert torch.equal(ConfidencePenalty(0.0)(logits, mixed), plain)


def test_a_sure_prediction_has_no_entropy_and_a_finite_slope():
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4]], requires_grad=True)
    labels = torch.tensor([0, 0])
    losses = ConfidencePenalty(1.0)(logits, labels)
    losses.sum().backward()
    # log 2 of cross-entropy, less log 2 of entropy; the slope of the second term is 0 there.
    assert losses.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert torch.allclose(logits.grad, torch.tensor([[0.0, 0, 0], [-0.5, 0.5, 0]]), atol=1e-6)


def test_a_weight_outside_its_bounds_is_refused():
    for weight in (-0.1, 1001.0, float("nan"), "0.1"):
        with pytest.raises(ValueError, match="ConfidencePenalty: weight = "):
            ConfidencePenalty(weight)
