"""CS-KD against its formula in one process, and at its ends."""

import pytest
import torch

from flatcal_dist.objectives import CSKD, Targets, cross_entropy
from flatcal_dist.sharpness import ReplicatedEngine, SharpnessAwareStep, StepError
from tests.support.literal_objectives import Case, check_formula, sorted_batch
from tests.support.reference import make_batch, make_network, make_optimizer

T, WEIGHT = 3.0, 0.7


def literal(logits, targets, temperature, weight):
    """Pair by pair, with probabilities; the teacher is a constant."""
    logits, labels, losses = logits.double(), targets.labels, []
    for i in range(len(labels)):
        partner = i + 1 if i % 2 == 0 else i - 1
        loss = -logits[i].softmax(0)[labels[i]].log()
        if labels[i] == labels[partner]:
            q = (logits[partner].detach() / temperature).softmax(0)
            p = (logits[i] / temperature).softmax(0)
            loss = loss + weight * temperature**2 * (q * (q / p).log()).sum()
        losses.append(loss)
    return torch.stack(losses)


TRAINED = [Case("cs_kd", literal, {"temperature": T, "weight": WEIGHT})]


def test_losses_and_gradient_are_the_formula():
    check_formula(TRAINED[0])
    labels = torch.tensor([2, 2, 0, 0, 1, 4, 3, 3])  # one pair is of two classes
    logits = torch.randn(8, 5, dtype=torch.float64)
    loss, plain = CSKD(T, WEIGHT)(logits, labels), cross_entropy(logits, labels, "none")
    assert torch.equal(loss[4:6], plain[4:6])
    assert (loss > plain).sum() == 6
    assert torch.equal(CSKD(weight=0.0)(logits, labels), plain)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    losses = CSKD(1.0)(logits, torch.tensor([0, 0]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()
    half = CSKD()(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([1, 1]))
    assert half.dtype == torch.float32
    assert CSKD()(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_what_it_cannot_use_is_refused():
    for temperature in (0.0, -1.0, float("inf"), float("nan"), "4"):
        with pytest.raises(ValueError, match="CSKD: temperature = "):
            CSKD(temperature)
    with pytest.raises(ValueError, match=r"CSKD: weight = -0\.1"):
        CSKD(weight=-0.1)
    with pytest.raises(ValueError, match="CSKD is defined for hard labels only"):
        CSKD()(torch.zeros(2, 3), torch.full((2, 3), 1 / 3))
    with pytest.raises(ValueError, match="got 3: give every micro-batch an even number"):
        CSKD()(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))
    network = make_network()
    step = SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), None, loss=CSKD())
    before = [w.clone() for w in network.parameters()]
    inputs, labels = make_batch(0)
    with pytest.raises(StepError, match="CSKD compares the samples at places 2i"):
        step([(inputs[:7], labels[:7]), (inputs[7:12], labels[7:12])])
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    inputs, targets = sorted_batch(0)
    assert isinstance(targets, Targets)
    assert not step([(inputs, targets)]).skipped
