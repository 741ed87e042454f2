"""CRL against its formula and the authors' bookkeeping in one process, and at its ends."""

import copy

import pytest
import torch

from flatcal_dist.objectives import CRL, Targets, cross_entropy
from flatcal_dist.sharpness import SAM, MomentumSAM, ReplicatedEngine, SharpnessAwareStep, StepError
from tests.support.literal_objectives import (
    ALL,
    BATCHES,
    EPOCHS,
    Case,
    Literal,
    literal_training,
    our_trainings,
    sorted_batch,
)
from tests.support.ranks import on_ranks
from tests.support.reference import CLOSE, far, make_network, make_optimizer

WEIGHT = 0.8


class Pairwise(Literal):
    """The history as a list of Python numbers, and the loss pair by pair."""

    def __init__(self, weight) -> None:
        self.weight, self.n, self.new, self.epochs = weight, [0] * ALL, [0] * ALL, 0
        self.compared = 0

    def history(self, sample):
        least, most = min(self.n), max(self.epochs, 1)
        return 1.0 if least == most else (self.n[sample] - least) / (most - least)

    def losses(self, logits, targets):
        p = logits.double().softmax(1)
        labels, samples, losses = targets.labels, targets.samples, []
        for i in range(len(labels)):
            j = i + 1 if i % 2 == 0 else i - 1
            h_i, h_j = (self.history(int(samples[k])) for k in (i, j))
            sign = (h_i > h_j) - (h_i < h_j)
            rank = abs(h_i - h_j) - sign * (p[i].max() - p[j].max())
            rank = rank.clamp(min=0) if sign else 0.0
            self.compared += sign != 0
            losses.append(-p[i, labels[i]].log() + self.weight * rank)
        return torch.stack(losses)

    def after(self, logits, targets):
        labels, samples = targets.labels, targets.samples.tolist()
        for row, label, sample in zip(logits, labels, samples, strict=True):
            self.new[sample] += int(row.argmax() == label)

    def end(self):
        self.n = [a + b for a, b in zip(self.n, self.new, strict=True)]
        self.new = [0] * ALL
        self.epochs += 1


TRAINED = [Case("crl", Pairwise, {"weight": WEIGHT})]


@pytest.mark.parametrize("kind", ["ddp", "zero2", "fsdp2"])
def test_every_rank_has_the_history_of_the_reference(kind):
    literal = Pairwise(WEIGHT)
    expected = literal_training(literal, sam=True)
    ours = on_ranks(2, our_trainings, kind, [(CRL(WEIGHT), 2, True)])
    assert far(ours[0][0][0], expected) < CLOSE
    for [(_, state)] in ours:
        assert state["correct"].tolist() == literal.n
        assert int(state["epochs"]) == EPOCHS
        assert not state["agreed"].any()
    assert len(set(literal.n)) > 2, "samples differ"
    assert literal.compared > ALL


def test_the_gradient_goes_to_both_sides():
    objective = CRL(WEIGHT)
    objective.begin(2, "cpu")
    objective.correct += torch.tensor([3, 1], dtype=torch.int32)
    objective.epochs, objective.least, objective.most = 4, 1, 4
    logits = torch.tensor([[0.2, 0.1, 0.0], [2.0, 0.1, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    losses = objective(logits, Targets(labels, torch.arange(2)))
    c = logits.softmax(1).amax(1)
    expected = 2 * WEIGHT * (2 / 3 - (c[0] - c[1])) + cross_entropy(logits, labels, "sum")
    assert torch.allclose(losses.sum(), expected)
    (ours,) = torch.autograd.grad(losses.sum(), logits)
    (theirs,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(ours, theirs, atol=1e-6)


def make_step(rule=None, objective=None):
    objective = objective or CRL()
    objective.begin(ALL, "cpu")
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network))
    return SharpnessAwareStep(engine, rule, loss=objective)


def test_a_skipped_step_is_not_learned_from_and_the_pass_at_w_is_once():
    for rule in (None, SAM(0.1), SAM(5.0), SAM(0.1, every=2)):
        step = make_step(rule)
        inputs, targets = sorted_batch(0)
        broken = inputs.clone()
        broken[3, 2] = float("nan")
        assert step([(broken, targets)]).skipped
        assert not step.loss.own.any()
        with torch.no_grad():
            right = step.engine.module(inputs).argmax(1) == targets.labels
        assert not step([(inputs, targets)]).skipped
        assert torch.equal(step.loss.own[targets.samples], right.int())
        assert step.loss.own.sum() == right.sum() > 0


def test_all_right_in_all_epochs_compares_nothing():
    objective = CRL()
    objective.begin(4, "cpu")
    logits = torch.eye(4)
    targets = Targets(torch.arange(4), torch.tensor([2, 0, 3, 1]))
    for _ in range(3):
        assert torch.equal(
            objective(logits, targets), cross_entropy(logits, targets.labels, "none")
        )
        objective.after_step([targets], [logits])
        objective.after_step([targets[:2]], [logits[:2]])  # two samples a second time
        objective.epoch_end(lambda tensor: tensor)
    assert objective.correct.tolist() == [3] * 4
    assert objective.correctness(targets.samples).tolist() == [1.0] * 4


def test_it_goes_on_from_its_state_bit_for_bit():
    """In the middle of an epoch, through the step's own state."""

    def steps(step, numbers):
        return [step([sorted_batch(n % BATCHES)], measure=True) for n in numbers]

    step = make_step(SAM(0.1))
    steps(step, range(BATCHES))
    step.end_epoch()
    steps(step, range(2))
    other = make_step(SAM(0.1))
    steps(other, [0])  # what it has seen before is forgotten
    other.engine.load_local_state(copy.deepcopy(step.engine.local_state()))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    for one in (step, other):
        steps(one, range(2, BATCHES))
        one.end_epoch()
    assert steps(step, range(4)) == steps(other, range(4))
    assert torch.equal(step.loss.correct, other.loss.correct)


def test_what_it_cannot_use_is_refused():
    with pytest.raises(ValueError, match=r"CRL: weight = -1\.0"):
        CRL(-1.0)
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="has to know which samples it sees"):
        CRL()(torch.zeros(2, 3), labels)
    with pytest.raises(ValueError, match=r"call begin\(samples="):
        CRL()(torch.zeros(2, 3), Targets(labels, torch.arange(2)))
    objective = CRL()
    objective.begin(5, "cpu")
    with pytest.raises(ValueError, match=r"told of 5 samples.*the numbers 4 to 5"):
        objective(torch.zeros(2, 3), Targets(labels, torch.tensor([4, 5])))
    with pytest.raises(StepError, match="MomentumSAM makes no such pass"):
        make_step(MomentumSAM(0.1))
    with pytest.raises(StepError, match="with forward= the step sees no targets"):
        make_step()([sorted_batch(0)], forward=lambda model, batch: model(batch[0]).sum(1))
    with pytest.raises(ValueError, match="it has no history of CRL"):
        make_step().load_state_dict({"taken": 1, "memory": None})
    state = make_step().objective_state()
    with pytest.raises(ValueError, match="the history is of 72 samples, the training data has 5"):
        objective.load(state)
    with pytest.raises(ValueError, match="no history of CRL"):
        objective.load({"other": torch.zeros(5)})
