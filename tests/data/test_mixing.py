import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import mixup_target

from flatcal_dist.data import Mixing
from flatcal_dist.objectives import cross_entropy

KINDS = {
    "mixup": Mixing(5, mixup=0.4),
    "cutmix": Mixing(5, cutmix=1.0),
    "both": Mixing(5, mixup=0.8, cutmix=1.0, probability=0.7),
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, 10, 14, generator=generator)
    labels = torch.randint(5, (24,), generator=generator)
    samples = torch.randperm(1000, generator=generator)[:24]
    return images, labels, samples


@pytest.mark.parametrize("mixing", KINDS.values(), ids=KINDS)
def test_pixels_and_targets_as_a_plain_loop_has_them(batch, mixing):
    images, labels, samples = batch
    mixed, target = mixing(images, labels, samples, seed=1, epoch=2)
    boxes, shares = mixing.draw(samples[::2].tolist(), 1, 2, 10, 14)
    for place in range(24):
        partner = place + 1 if place % 2 == 0 else place - 1
        top, bottom, left, right = boxes[:, place // 2].tolist()
        share = float(shares[place // 2])
        own, other = images[place], images[partner]
        if bottom > top:
            expected = own.clone()
            expected[:, top:bottom, left:right] = other[:, top:bottom, left:right]
            assert share == pytest.approx(1 - (bottom - top) * (right - left) / 140)
            assert torch.equal(mixed[place], expected)
        else:
            assert torch.allclose(mixed[place], share * own + (1 - share) * other, atol=1e-6)
        row = np.zeros(5)
        row[labels[place]] += share
        row[labels[partner]] += 1 - share
        assert np.allclose(target[place].numpy(), row, atol=1e-6)


def test_what_is_drawn_follows_beta_and_the_probability():
    """20,000 pairs: Kolmogorov-Smirnov against the distribution asked for."""
    firsts = list(range(20_000))
    _, shares = KINDS["mixup"].draw(firsts, 0, 0, 224, 224)
    assert stats.kstest(shares.numpy(), stats.beta(0.4, 0.4).cdf).pvalue > 0.001
    boxes, shares = KINDS["both"].draw(firsts, 0, 0, 224, 224)
    cut = (boxes[1] > boxes[0]) & (boxes[3] > boxes[2])
    assert float((shares < 1).double().mean()) == pytest.approx(0.7, abs=0.02)
    assert float(cut.double().mean()) == pytest.approx(0.35, abs=0.02)
    only_mixup = shares[(shares < 1) & ~cut]
    assert stats.kstest(only_mixup.numpy(), stats.beta(0.8, 0.8).cdf).pvalue > 0.001
    assert bool((boxes[:2] >= 0).all() and (boxes[:2] <= 224).all())
    # alpha 1: sides s = sqrt(v), v uniform, around uniform centres, cut off at the borders. The
    # mean area is E (s - s^2/4)^2 = 1/2 - 1/5 + 1/48; its standard error is 0.002.
    boxes, shares = KINDS["cutmix"].draw(firsts, 0, 0, 224, 224)
    assert float(1 - shares.mean()) == pytest.approx(0.3208, abs=0.01)
    assert float((boxes[1] == 224).double().mean()) > 0.1


@pytest.mark.parametrize("mixing", KINDS.values(), ids=KINDS)
def test_cutting_the_batch_changes_nothing(batch, mixing):
    """Ranks and micro-batches of even size mix as one; epochs, seeds and samples differ."""
    images, labels, samples = batch
    whole = mixing(images, labels, samples, 1, 2)
    parts = [
        mixing(*part, 1, 2)
        for part in zip(*(tensor.split([2, 8, 14]) for tensor in batch), strict=True)
    ]
    for number in range(2):
        assert torch.equal(torch.cat([part[number] for part in parts]), whole[number])
    for other in (
        mixing(*batch, 1, 3),
        mixing(*batch, 2, 2),
        mixing(images, labels, samples + 1, 1, 2),
    ):
        assert not torch.equal(other[0], whole[0])


def test_an_odd_batch_is_refused(batch):
    with pytest.raises(ValueError, match="even number of images, got 23"):
        KINDS["mixup"](*(tensor[:23] for tensor in batch), 0, 0)


def test_the_process_stream_is_left_alone(batch):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    KINDS["both"](*batch, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_soft_targets_and_label_smoothing_combine_as_in_timm():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (6,), generator=generator)
    theirs = mixup_target(
        labels, 5, lam=0.3, smoothing=0.1
    ).double()  # partners: the batch reversed
    soft = 0.3 * torch.eye(5).double()[labels] + 0.7 * torch.eye(5).double()[labels.flip(0)]
    expected = -(theirs * logits.log_softmax(-1)).sum(-1)
    ours = cross_entropy(logits, soft, reduction="none", label_smoothing=0.1)
    assert torch.allclose(ours, expected, atol=1e-7)  # timm's targets are float32
