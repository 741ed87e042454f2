"""The contract of objectives: targets, plain functions, whole outputs, what is asked for."""

from collections import namedtuple
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatcal_dist.objectives import (
    CRL,
    CrossEntropy,
    Focal,
    LabelSmoothing,
    Objective,
    Targets,
    csam_loss,
)
from flatcal_dist.sharpness import CSAM, SAM, ReplicatedEngine, SharpnessAwareStep, StepError
from flatcal_dist.sharpness.passes.forward import on_a_share, pair
from flatcal_dist.sharpness.passes.whole_batch import WholeBatch
from tests.support.engines import make_engine
from tests.support.ranks import on_ranks
from tests.support.readme import example_class
from tests.support.reference import CLOSE, far, make_batch, make_network, make_optimizer

LABELS, SAMPLES = torch.arange(6) % 3, torch.arange(6) + 10


def test_targets_are_cut_and_moved_with_their_numbers():
    targets = Targets(LABELS, SAMPLES, epoch=4)
    assert len(targets) == 6
    part = targets[2:5]
    assert (part.labels.tolist(), part.samples.tolist(), part.epoch) == ([2, 0, 1], [12, 13, 14], 4)
    moved = targets.to("meta")
    assert moved.labels.is_meta
    assert moved.samples.is_meta
    assert moved.epoch == 4
    soft = Targets(F.one_hot(LABELS).float())[:2].to("cpu")
    assert soft.samples is None
    assert soft.labels.shape == (2, 3)
    assert len(Targets(LABELS[:0], SAMPLES[:0])) == 0


@pytest.mark.parametrize("samples", [SAMPLES[:5], SAMPLES.int(), SAMPLES[:, None], SAMPLES.float()])
def test_numbers_of_other_samples_are_refused(samples):
    with pytest.raises(ValueError, match=r"must be int64 of shape \[6\], a number for each label"):
        Targets(LABELS, samples)


@pytest.mark.parametrize("rule", [None, SAM(0.1), CSAM(0.1)], ids=["none", "sam", "csam"])
def test_targets_are_the_same_as_labels(rule):
    losses = [None] if rule and rule.own_loss else [None, Focal(2.0), LabelSmoothing(0.1), plain]
    for loss in losses:
        weights = []
        for wrap in (lambda labels: labels, lambda labels: Targets(labels, torch.arange(24), 3)):
            network = make_network()
            engine = ReplicatedEngine(network, make_optimizer(network))
            step = SharpnessAwareStep(engine, rule, loss=loss)
            for number in range(3):
                inputs, labels = make_batch(number)
                step([(inputs, wrap(labels))])
            weights.append(engine.full_weights())
        assert far(*weights) == 0


def plain(logits, labels):
    """A user's function, which knows labels only."""
    return F.cross_entropy(logits, labels, reduction="none")


def test_functions_of_ours_take_targets():
    logits = torch.randn(6, 3)
    targets = Targets(LABELS, SAMPLES)
    assert torch.equal(csam_loss(logits, targets, 1.0), csam_loss(logits, LABELS, 1.0))
    with pytest.raises(ValueError, match="hard labels only"):
        csam_loss(logits, Targets(logits.softmax(1)), 1.0)
    with pytest.raises(ValueError, match="Focal is defined for hard labels only"):
        Focal()(logits, Targets(logits.softmax(1)))


Features = namedtuple("Features", "logits, features")


class WithFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = make_network()

    def forward(self, inputs):
        features = self.network[:-1](inputs)
        return Features(self.network[-1](features), features)


class Shrinking(Objective):
    """Cross-entropy and the squared length of the features; it remembers what it was shown."""

    whole_output: ClassVar[bool] = True
    keeps_history: ClassVar[bool] = True

    def losses(self, output, targets):
        plain = F.cross_entropy(output.logits, targets.labels, reduction="none")
        return plain + 0.01 * output.features.square().sum(1)

    def after_step(self, targets, outputs):
        self.seen = [(len(one), type(output)) for one, output in zip(targets, outputs, strict=True)]
        assert not any(tensor.requires_grad for output in outputs for tensor in output)


def shrunk(rank, world_size, kind):
    step = SharpnessAwareStep(make_engine(kind, WithFeatures()), SAM(0.1), loss=Shrinking())
    for number in range(3):
        inputs, labels = (tensor.tensor_split(world_size)[rank] for tensor in make_batch(number))
        samples = torch.arange(len(labels))
        targets = Targets(labels, samples)
        assert not step([(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]).skipped
    rest = 24 // world_size - 4
    assert step.loss.seen == [(4, Features), (rest, Features)]
    return step.engine.full_weights()


@pytest.mark.parametrize("kind", ["ddp", "zero2", "fsdp2"])
def test_an_objective_may_see_all_that_the_network_returns(kind):
    expected = shrunk(0, 1, "one")
    assert far(on_ranks(2, shrunk, kind)[0], expected) < CLOSE


def test_an_objective_that_forward_would_replace_is_refused():
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network))
    step = SharpnessAwareStep(engine, SAM(0.1), loss=Focal())
    with pytest.raises(StepError, match=r"Focal would not be used: compute it within forward"):
        step([make_batch(0)], forward=lambda model, batch: model(batch[0]).sum(1))


@pytest.mark.parametrize(
    ("rule", "loss", "told"),
    [
        (SAM, None, r"rule is <class .*SAM'>: expected a rule such as SAM\(rho=0.05\)"),
        ("sam", None, "rule is 'sam'"),
        (SAM(0.1), "focal", r"loss is 'focal': expected an objective such as Focal\(\)"),
        (SAM(0.1), Focal, "loss is <class"),
    ],
)
def test_what_is_no_rule_and_no_objective_is_refused(rule, loss, told):
    network = make_network()
    with pytest.raises(StepError, match=told):
        SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), rule, loss=loss)


def test_a_share_of_a_micro_batch_keeps_pairs_whole():
    objective = CRL()
    objective.begin(24, "cpu")
    inputs, labels = make_batch(0)
    batch = inputs, Targets(labels, torch.arange(24))
    sizes = {}
    for share in (1e-9, 0.01, 0.1, 0.25, 0.3, 0.5, 0.9, 0.99):
        for even in (True, False):
            forward = pair(
                objective if even else CrossEntropy(), CrossEntropy(), False, WholeBatch(1)
            )
            evaluated = on_a_share(forward, share, even)(make_network(), batch)
            assert evaluated.losses == pytest.approx(24), "weighed as if they were all"
            sizes[share, even] = len(evaluated.output)
    assert [sizes[s, True] for s in (0.01, 0.1, 0.25, 0.3, 0.5, 0.9, 0.99)] == [
        2, 4, 6, 8, 12, 22, 24,
    ]  # fmt: skip
    assert sizes[0.1, False] == 3
    assert (sizes[1e-9, False], sizes[1e-9, True]) == (1, 2), "a perturbation needs an image"


def test_the_objective_of_the_readme():
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    losses = example_class("objectives", "Clipped")(most=2.0)(logits, torch.tensor([0, 0]))
    assert losses.tolist() == pytest.approx([1.2e-4, 2.0], rel=0.1)
