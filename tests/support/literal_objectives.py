"""Training with an objective on every engine, and by a plain loop in one process."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flatcal_dist.objectives import Objective, Targets
from flatcal_dist.sharpness import SAM, SharpnessAwareStep
from tests.support.engines import make_engine
from tests.support.reference import SAMPLES, make_batch, make_network, make_optimizer

EPOCHS, BATCHES, RHO = 4, 3, 0.1

# The losses of a batch by the formula: (logits, labels, numbers of the samples) -> [N].
Literal = Callable[[Tensor, Tensor, Tensor], Tensor]


def sorted_batch(number: int) -> tuple[Tensor, Targets]:
    """A batch in which most samples at 2i and 2i + 1 are of one class, and its sample numbers."""
    inputs, labels = make_batch(number)
    order = labels.argsort(stable=True)
    samples = torch.arange(SAMPLES) + number * SAMPLES
    return inputs[order], Targets(labels[order], samples)


def our_parts(number: int, epoch: int, rank: int, ranks: int, micro_batches: int) -> list:
    inputs, targets = sorted_batch(number)
    size = SAMPLES // ranks // micro_batches
    starts = [(rank * micro_batches + i) * size for i in range(micro_batches)]
    targets = replace(targets, epoch=epoch)
    return [(inputs[s : s + size], targets[s : s + size]) for s in starts]


def our_training(
    rank: int, ranks: int, kind: str, objective: Objective, micro_batches: int, sam: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Weights after EPOCHS, and the objective's state."""
    objective.begin(BATCHES * SAMPLES, "cpu")
    step = SharpnessAwareStep(make_engine(kind), SAM(RHO) if sam else None, loss=objective)
    for epoch in range(EPOCHS):
        for number in range(BATCHES):
            assert not step(our_parts(number, epoch, rank, ranks, micro_batches)).skipped
        step.end_epoch()
    return step.engine.full_weights(), step.objective_state()


def literal_training(
    losses: Literal, sam: bool, after: Callable[[Tensor, Tensor, Tensor], None], end: Callable
) -> dict[str, Tensor]:
    """after: told the logits at w, labels and sample numbers of each step. end: of each epoch."""
    network = make_network()
    optimizer = make_optimizer(network)
    for _ in range(EPOCHS):
        for number in range(BATCHES):
            inputs, targets = sorted_batch(number)
            labels, samples = targets.labels, targets.samples

            def gradient(inputs=inputs, labels=labels, samples=samples) -> Tensor:
                optimizer.zero_grad()
                logits = network(inputs)
                losses(logits, labels, samples).mean().backward()
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
            after(first, labels, samples)
        end()
    return network.state_dict()
