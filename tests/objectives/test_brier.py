"""The Brier score as a loss against its formula in double precision, and at its ends."""

import pytest
import torch

from flatcal_dist.config import load
from flatcal_dist.objectives import Brier
from tests.support.literal_objectives import Case, check_formula, shares


def literal(logits, targets):
    """Sum over classes, class by class."""
    p, q = logits.double().exp(), shares(targets, logits.shape[1])
    p = p / p.sum(1, keepdim=True)
    return sum((q[:, k] - p[:, k]) ** 2 for k in range(p.shape[1]))


TRAINED = [Case("brier", literal)]


def test_losses_and_gradient_are_the_formula():
    check_formula(TRAINED[0])


def test_it_lies_between_0_and_2():
    objective = load(None, ["objective.name=brier"]).objective.build()
    logits = torch.tensor([[1e4, 0.0, 0.0]] * 2 + [[0.0] * 3], requires_grad=True)
    losses = objective(logits, torch.tensor([0, 1, 0]))
    assert losses.tolist() == pytest.approx([0.0, 2.0, 2 / 3])
    losses.sum().backward()
    assert not logits.grad[:2].any()


def test_classes_are_the_same_as_their_probabilities():
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    assert torch.equal(Brier()(logits, labels), Brier()(logits, torch.eye(5)[labels]))


@pytest.mark.parametrize(
    "target",
    [torch.full((4, 1), 1.0), torch.full((4,), 1.0), torch.zeros(4, 5).long(), torch.rand(4, 6)],
)
def test_targets_of_another_shape_are_refused(target):
    with pytest.raises(ValueError, match=r"Brier: targets must be class indices \[N\], or prob"):
        Brier()(torch.zeros(4, 5), target)
