"""The ascent gradient of a share of the batch, where images come in pairs."""

import copy

import pytest
import torch
import torch.nn.functional as F

from flatcal_dist.objectives import CSKD, Targets
from flatcal_dist.sharpness import SAM, SharpnessAwareStep, StepError
from tests.support.engines import make_engine
from tests.support.reference import CLOSE, far, make_batch, make_network, make_optimizer, norm

HEADS = {10: 4, 14: 6}  # 0.3 of the images, and an even number of them


def paired(number):
    """The two micro-batches of a step, with images of one class side by side."""
    inputs, labels = make_batch(number)
    order = labels.argsort(stable=True)
    return list(zip(inputs[order].split([10, 14]), labels[order].split([10, 14]), strict=True))


def cs_kd(logits, labels):
    partner = torch.arange(len(labels)) ^ 1
    p, q = (F.log_softmax(z / 4, 1) for z in (logits, logits.detach()[partner]))
    apart = (q.exp() * (q - p)).sum(1) * (labels == labels[partner])
    return F.cross_entropy(logits, labels, reduction="none") + 16 * apart


def test_pairs_are_never_cut():
    ours, theirs = make_network(), make_network()
    step = SharpnessAwareStep(
        make_engine("one", ours), SAM(0.1, share=0.3), loss=CSKD(temperature=4.0, weight=1.0)
    )
    optimizer, weights = make_optimizer(theirs), list(theirs.parameters())
    sizes = []
    ours.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for number in range(3):
        batches = paired(number)
        step([(x, Targets(y)) for x, y in batches])
        total = sum(
            cs_kd(theirs(x[: HEADS[len(x)]]), y[: HEADS[len(x)]]).mean() * len(x) / 24
            for x, y in batches
        )
        g = torch.autograd.grad(total, weights)
        before = copy.deepcopy(theirs.state_dict())
        with torch.no_grad():
            torch._foreach_add_(weights, [0.1 * a / norm(g) for a in g])
        optimizer.zero_grad()
        sum(cs_kd(theirs(x), y).sum() / 24 for x, y in batches).backward()
        theirs.load_state_dict(before)
        optimizer.step()
    assert sizes[:4] == [4, 6, 10, 14]
    assert far(ours.state_dict(), theirs.state_dict()) < CLOSE


def test_batches_that_cannot_be_cut_are_refused():
    step = SharpnessAwareStep(make_engine("one"), SAM(0.1, share=0.5))
    inputs, target = make_batch(0)
    with pytest.raises(StepError, match="cannot cut what forward= takes"):
        step([(inputs, target)], forward=lambda model, batch: model(batch[0]).sum(1))
    with pytest.raises(StepError, match="tensors with one row a sample"):
        step([(inputs, {"label": target})], samples=24)
    result = step([(inputs[:1], target[:1])])
    assert not result.skipped, "of one sample the share is this sample"
