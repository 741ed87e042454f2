"""RegMixup: clean and mixed images in one pass, against its two means written out."""

import pytest
import torch

from flatcal_dist.config import ConfigError, load
from flatcal_dist.objectives import CRL, CrossEntropy, Focal, Targets
from flatcal_dist.objectives.targets import Mixed
from flatcal_dist.sharpness import SAM, FunctionalSAM, ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.sharpness.passes.forward import on_a_share, pair
from flatcal_dist.sharpness.passes.whole_batch import WholeBatch
from tests.support.reference import CLOSE, far, make_batch, make_network, make_optimizer

WEIGHT = 0.7


def mixed_batch(number: int, epoch: int = 0) -> tuple[torch.Tensor, Targets]:
    """Clean and mixed rows in turn, from the mixing that recipes use."""
    inputs, labels = make_batch(number)
    words = ["mixing.name=regmixup", f"mixing.weight={WEIGHT}", "mixing.alpha=1"]
    mixing = load(None, words).mixing.mixing(5)
    samples = torch.arange(24) + 24 * number
    images = inputs.view(24, 1, 2, 3)
    rows, targets = mixing.targets(images, Targets(labels, samples, epoch), samples, seed=3)
    return rows.view(48, 6), targets


def two_means(network, loss, rows, targets) -> torch.Tensor:
    """The mean of the clean images' loss, and WEIGHT times the mixed images' cross-entropy."""
    clean, mixed = network(rows[0::2]), network(rows[1::2])
    soft = -(targets.mixed.labels * mixed.log_softmax(1)).sum(1).mean()
    return loss(clean, targets.labels).mean() + WEIGHT * soft


def test_clean_images_come_unchanged_and_mixed_ones_beside_them():
    inputs, labels = make_batch(0)
    rows, targets = mixed_batch(0)
    assert torch.equal(rows[0::2], inputs)
    assert torch.equal(targets.labels, labels)
    assert targets.mixed.labels.shape == (24, 5)
    assert torch.allclose(targets.mixed.labels.sum(1), torch.ones(24))
    share = targets.mixed.labels.gather(1, labels[:, None])[:, 0]
    other = torch.arange(24) ^ 1
    apart = labels != labels[other]
    expected = share[:, None] * inputs + (1 - share[:, None]) * inputs[other]
    assert apart.any()
    assert torch.allclose(rows[1::2][apart], expected[apart], atol=1e-6)


@pytest.mark.parametrize("objective", [CrossEntropy(), Focal(2.0)])
@pytest.mark.parametrize("rule", [None, SAM(0.1), FunctionalSAM(0.1)])
def test_steps_follow_the_two_means(objective, rule):
    ours, theirs = make_network(), make_network()
    step = SharpnessAwareStep(
        ReplicatedEngine(ours, make_optimizer(ours)), rule, loss=objective, clip_norm=None
    )
    optimizer, weights = make_optimizer(theirs), list(theirs.parameters())
    for number in range(3):
        rows, targets = mixed_batch(number)
        result = step([(rows, targets)])
        loss = two_means(theirs, objective, rows, targets)
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        g = torch.autograd.grad(loss, weights)
        if rule is not None:
            e = [0.1 * t / torch.stack([x.norm() for x in g]).norm() for t in g]
            logits = theirs(rows).detach().requires_grad_()
            before = [w.detach().clone() for w in weights]
            with torch.no_grad():
                torch._foreach_add_(weights, e)
            if isinstance(rule, FunctionalSAM):
                clean = two_means(lambda part, z=logits: part, objective, logits, targets)
                (slope,) = torch.autograd.grad(clean, logits)
                g = torch.autograd.grad((slope * theirs(rows)).sum(), weights)
            else:
                g = torch.autograd.grad(two_means(theirs, objective, rows, targets), weights)
            with torch.no_grad():
                torch._foreach_copy_(weights, before)
        for w, t in zip(weights, g, strict=True):
            w.grad = t
        optimizer.step()
    assert far(ours.state_dict(), theirs.state_dict()) < CLOSE


def test_a_history_learns_from_the_clean_images():
    network = make_network()
    objective = CRL()
    objective.begin(24, "cpu")
    step = SharpnessAwareStep(
        ReplicatedEngine(network, make_optimizer(network)), None, loss=objective
    )
    rows, targets = mixed_batch(0)
    right = (make_network()(rows[0::2]).argmax(1) == targets.labels).int()
    step([(rows, targets)])
    assert torch.equal(objective.own, right)


def test_a_share_keeps_a_clean_image_and_its_mixed_one_together():
    rows, targets = mixed_batch(0)
    seen = []
    network = make_network()
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    plain = pair(CrossEntropy(), CrossEntropy(), False, WholeBatch(1))
    on_a_share(plain, 0.25, even=False)(network, (rows, targets))
    assert torch.equal(seen[0], rows[:12])


def test_part_and_device_of_targets_keep_the_mixed_ones():
    targets = Targets(torch.arange(4), None, 2, Mixed(torch.eye(4), 0.5))
    part = targets[1:3].to("cpu")
    assert torch.equal(part.mixed.labels, torch.eye(4)[1:3])
    assert (part.mixed.weight, part.epoch) == (0.5, 2)


def test_csam_is_refused_and_hard_label_objectives_are_not():
    with pytest.raises(ConfigError, match="csam is defined for hard labels only"):
        load(None, ["mixing.name=regmixup", "sharpness.rule=csam"])
    with pytest.raises(ConfigError, match="puts images of one class side by side"):
        load(None, ["mixing.name=regmixup", "objective.name=cs_kd"])
    for objective in ("focal", "crl", "mmce"):
        load(None, ["mixing.name=regmixup", f"objective.name={objective}"])
        with pytest.raises(ConfigError, match="mixing makes soft ones"):
            load(None, ["mixing.name=mixup", f"objective.name={objective}"])
