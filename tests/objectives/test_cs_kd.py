"""CS-KD against its formula in one process, and at its ends."""

import pytest
import torch

from flatcal_dist.objectives import CSKD, Targets, cross_entropy
from flatcal_dist.sharpness import ReplicatedEngine, SharpnessAwareStep, StepError
from tests.support.literal_objectives import literal_training, our_training, sorted_batch
from tests.support.ranks import on_ranks
from tests.support.reference import CLOSE, far, make_batch, make_network, make_optimizer

T, WEIGHT = 3.0, 0.7


def literal(logits, labels, samples=None):
    """Pair by pair, with probabilities; the teacher is a constant."""
    losses = []
    for i in range(len(labels)):
        partner = i + 1 if i % 2 == 0 else i - 1
        loss = -logits[i].softmax(0)[labels[i]].log()
        if labels[i] == labels[partner]:
            q = (logits[partner].detach() / T).softmax(0)
            p = (logits[i] / T).softmax(0)
            loss = loss + WEIGHT * T**2 * (q * (q / p).log()).sum()
        losses.append(loss)
    return torch.stack(losses)


def test_losses_and_gradient_are_the_formula():
    torch.manual_seed(0)
    labels = torch.tensor([2, 2, 0, 0, 1, 4, 3, 3])  # one pair is of two classes
    ours = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    loss, expected = CSKD(T, WEIGHT)(ours, labels), literal(theirs, labels)
    assert torch.allclose(loss, expected, rtol=1e-12)
    loss.sum().backward()
    expected.sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    plain = cross_entropy(ours, labels, "none")
    assert torch.equal(loss[4:6], plain[4:6])
    assert (loss > plain).sum() == 6
    assert torch.equal(CSKD(weight=0.0)(ours, labels), plain)


@pytest.mark.parametrize("kind", ["ddp", "zero2", "fsdp2"])
def test_two_ranks_are_the_reference(kind):
    for micro_batches, sam in ((1, False), (2, True), (3, True)):
        expected = literal_training(literal, sam, lambda *_: None, lambda: None)
        ours = on_ranks(2, our_training, kind, CSKD(T, WEIGHT), micro_batches, sam)
        assert far(ours[0][0], expected) < CLOSE, (micro_batches, sam)
        assert ours[0][1] is None
    plain = literal_training(
        lambda logits, labels, _: cross_entropy(logits, labels, "none"),
        True,
        lambda *_: None,
        lambda: None,
    )
    assert far(plain, expected) > 1000 * CLOSE, "and it is not cross-entropy"


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
