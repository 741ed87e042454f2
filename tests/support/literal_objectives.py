"""Training with an objective on every engine, and by a plain loop in one process."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flatcal_dist.config import load
from flatcal_dist.objectives import Objective, Targets
from flatcal_dist.sharpness import SAM, SharpnessAwareStep
from tests.support.engines import make_engine
from tests.support.reference import CLASSES, SAMPLES, make_batch, make_network, make_optimizer

EPOCHS, BATCHES, RHO = 4, 3, 0.1
ALL = BATCHES * SAMPLES
JUMP = 1e-5  # nearer to a jump or a kink than this, a comparison would be one of rounding


class Literal(ABC):
    """An objective by its formula: the losses of a whole batch, and what it learns from it."""

    @abstractmethod
    def losses(self, logits: Tensor, targets: Targets) -> Tensor: ...

    def after(self, logits: Tensor, targets: Targets) -> None:
        """Learn from the logits at w of a step."""
        return None

    def end(self) -> None:
        """Finish an epoch."""
        return None


class Formula(Literal):
    """An objective that learns nothing."""

    def __init__(self, losses: Callable[[Tensor, Targets], Tensor]) -> None:
        self.formula = losses

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        return self.formula(logits, targets)


@dataclass(frozen=True)
class Case:
    """A setting of an objective, and its losses by the formula, which call nothing of the package.

    Args:
        name: The value of `objective.name`.
        literal: A function of logits, targets and the keys that returns losses [N], in double
            precision; or a class of `Literal` that is made of the keys.
        keys: The keys of the objective, which the configuration and the formula get.
    """

    name: str
    literal: Callable[..., Any] = field(repr=False)
    keys: dict[str, float | str] = field(default_factory=dict)

    def objective(self) -> Objective:
        words = [f"objective.{key}={value}" for key, value in self.keys.items()]
        return load(None, [f"objective.name={self.name}", *words]).objective.build()

    def begin(self) -> Literal:
        if isinstance(self.literal, type):
            return self.literal(**self.keys)
        return Formula(partial(self.literal, **self.keys))

    def kinds(self) -> tuple[bool, ...]:
        """Whether labels are soft, for each kind of label that the objective takes."""
        return (False,) if self.objective().hard_labels else (False, True)


def true_class(logits: Tensor, targets: Targets) -> Tensor:
    """The probability of the true class, float64 [N]."""
    return logits.double().softmax(1)[torch.arange(len(logits)), targets.labels]


def shares(targets: Targets, classes: int) -> Tensor:
    """The probability of each class in the targets, float64 [N, K]."""
    labels = targets.labels
    soft = labels.is_floating_point()
    return labels.double() if soft else torch.eye(classes, dtype=torch.float64)[labels]


def plain(logits: Tensor, targets: Targets) -> Tensor:
    """Cross-entropy."""
    return -(shares(targets, logits.shape[1]) * logits.double().log_softmax(1)).sum(1)


def apart(distance: Tensor) -> None:
    """No value is at a jump or a kink, from which these are the distances."""
    assert distance.abs().min() > JUMP, "choose other batches: rounding decides which loss it is"


def soften(targets: Targets, dtype: torch.dtype = torch.float32) -> Targets:
    """Mix the label of each sample with that of another."""
    one_hot = torch.eye(CLASSES, dtype=dtype)[targets.labels]
    return replace(targets, labels=0.7 * one_hot + 0.3 * one_hot.roll(5, 0))


def check_formula(case: Case) -> None:
    """Values and slopes are those of the formula, for each kind of label, in each epoch."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(SAMPLES, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator).sort().values
    for soft in case.kinds():
        for epoch in range(EPOCHS):
            targets = Targets(labels, torch.arange(SAMPLES), epoch)
            targets = soften(targets, torch.float64) if soft else targets
            ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
            losses = case.objective()(ours, targets)
            expected = case.begin().losses(theirs, targets)
            assert losses.shape == (SAMPLES,)
            assert torch.allclose(losses, expected, rtol=1e-10, atol=1e-12)
            losses.sum().backward()
            expected.sum().backward()
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def sorted_batch(number: int, soft: bool = False) -> tuple[Tensor, Targets]:
    """A batch in which most samples at 2i and 2i + 1 are of one class, and its sample numbers."""
    inputs, labels = make_batch(number)
    order = labels.argsort(stable=True)
    samples = torch.arange(SAMPLES) + number * SAMPLES
    targets = Targets(labels[order], samples)
    return inputs[order], soften(targets) if soft else targets


def our_parts(
    number: int, epoch: int, rank: int, ranks: int, micro_batches: int, soft: bool
) -> list[tuple[Tensor, Targets]]:
    inputs, targets = sorted_batch(number, soft)
    size = SAMPLES // ranks // micro_batches
    starts = [(rank * micro_batches + i) * size for i in range(micro_batches)]
    targets = replace(targets, epoch=epoch)
    return [(inputs[s : s + size], targets[s : s + size]) for s in starts]


def our_training(
    rank: int,
    ranks: int,
    engine: Any,
    objective: Objective,
    micro_batches: int,
    sam: bool,
    soft: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Weights after EPOCHS, and the objective's state."""
    objective.begin(ALL, "cpu")
    step = SharpnessAwareStep(engine, SAM(RHO) if sam else None, loss=objective)
    for epoch in range(EPOCHS):
        for number in range(BATCHES):
            assert not step(our_parts(number, epoch, rank, ranks, micro_batches, soft)).skipped
        step.end_epoch()
    weights = {name: tensor.clone() for name, tensor in engine.full_weights().items()}
    return weights, step.objective_state()


def our_trainings(rank: int, ranks: int, kind: str, wanted: list[tuple]) -> list[tuple]:
    """`our_training` of each. One engine is set back to its beginning: ZeRO's is dear to make."""
    engine = make_engine(kind)
    start = copy.deepcopy(engine.local_state())
    outcomes = []
    for each in wanted:
        engine.load_local_state(copy.deepcopy(start))
        outcomes.append(our_training(rank, ranks, engine, *each))
    return outcomes


def literal_training(literal: Literal, sam: bool, soft: bool = False) -> dict[str, Tensor]:
    """Weights after EPOCHS."""
    network = make_network()
    optimizer = make_optimizer(network)
    for epoch in range(EPOCHS):
        for number in range(BATCHES):
            inputs, targets = sorted_batch(number, soft)
            targets = replace(targets, epoch=epoch)

            def gradient(inputs=inputs, targets=targets) -> Tensor:
                optimizer.zero_grad()
                logits = network(inputs)
                literal.losses(logits, targets).mean().backward()
                return logits.detach()

            first = gradient()
            if sam:
                before = [w.detach().clone() for w in network.parameters()]
                length = torch.stack([w.grad.norm() for w in network.parameters()]).norm()
                with torch.no_grad():
                    for w in network.parameters():
                        w += RHO * w.grad / length
                gradient()
                with torch.no_grad():
                    for w, old in zip(network.parameters(), before, strict=True):
                        w.copy_(old)
            optimizer.step()
            literal.after(first, targets)
        literal.end()
    return network.state_dict()
