"""Label smoothing in both forms against its formula in double precision, and at its ends."""

import pytest
import torch
import torch.nn.functional as F

from flatcal_dist.config import load
from flatcal_dist.objectives import LabelSmoothing, cross_entropy
from tests.support.literal_objectives import Case, check_formula, shares


def literal(logits, targets, smoothing, spread="all"):
    """Class by class: what each class gets of what the target gives to each class."""
    classes = logits.shape[1]
    t, q = shares(targets, classes), torch.zeros(logits.shape, dtype=torch.float64)
    for k in range(classes):
        for true in range(classes):  # the smoothed target of a sample of this class
            if spread == "all":
                smoothed = smoothing / classes + (1 - smoothing if k == true else 0)
            else:
                smoothed = 1 - smoothing if k == true else smoothing / (classes - 1)
            q[:, k] += t[:, true] * smoothed
    return -(q * logits.double().log_softmax(1)).sum(1)


TRAINED = [
    Case("label_smoothing", literal, {"smoothing": 0.1}),
    Case("label_smoothing", literal, {"smoothing": 0.3, "spread": "others"}),
]
OTHERS = LabelSmoothing(0.3, "others")


@pytest.mark.parametrize("case", TRAINED)
def test_losses_and_gradient_are_the_formula(case):
    check_formula(case)


def test_the_default_is_that_of_torch():
    logits, labels = 4 * torch.randn(8, 5), torch.randint(5, (8,))
    objective = load(None, ["objective.name=label_smoothing"]).objective.build()
    assert objective == LabelSmoothing(0.1, "all")
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    assert torch.equal(objective(logits, labels), expected)


def test_the_loss_of_a_mixed_sample_is_the_mix_of_losses():
    logits, labels = 4 * torch.randn(8, 5).double(), torch.arange(8) % 5
    one_hot = torch.eye(5).double()[labels]
    mixed = OTHERS(logits, 0.6 * one_hot + 0.4 * one_hot.roll(1, 0))
    parts = 0.6 * OTHERS(logits, labels) + 0.4 * OTHERS(logits, labels.roll(1))
    assert torch.allclose(mixed, parts, rtol=1e-12)


def test_smoothing_0_is_cross_entropy_with_any_number_of_classes():
    for classes in (1, 2, 5):
        logits, labels = torch.randn(8, classes), torch.randint(classes, (8,))
        plain = cross_entropy(logits, labels, reduction="none")
        for spread in ("all", "others"):
            assert torch.equal(LabelSmoothing(0.0, spread)(logits, labels), plain)


def test_the_most_that_can_be_spread_over_others_gives_all_classes_the_same():
    for classes in range(2, 50):
        logits, labels = torch.randn(4, classes), torch.zeros(4, dtype=torch.long)
        losses = LabelSmoothing((classes - 1) / classes, "others")(logits, labels)
        assert torch.allclose(losses, -logits.log_softmax(1).mean(1))


def test_what_it_cannot_use_is_refused():
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"needs two classes or more, and the logits have one"):
        OTHERS(torch.zeros(2, 1), labels)
    with pytest.raises(ValueError, match=r"smoothing = 0\.6: .*2 classes it must be at most 0\.5"):
        LabelSmoothing(0.6, "others")(torch.zeros(2, 2), labels)
    for smoothing in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="LabelSmoothing: smoothing = "):
            LabelSmoothing(smoothing)
    with pytest.raises(ValueError, match="LabelSmoothing: spread = 'most'"):
        LabelSmoothing(spread="most")
