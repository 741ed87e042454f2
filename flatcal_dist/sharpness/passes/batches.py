"""How many samples the batch of a step has, and batches that no step can take."""

from typing import Any

from flatcal_dist.objectives.base import Objective
from flatcal_dist.sharpness.engines.base import Engine
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.gradients import MicroBatches
from flatcal_dist.sharpness.passes.forward import size_of


def global_size(
    engine: Engine,
    objective: Objective,
    micro_batches: MicroBatches,
    samples: float | None,
    own_forward: bool,
) -> float:
    """Return the size of the global batch. Without `samples` it takes one small reduction.

    Args:
        engine: The engine, which knows the other ranks.
        objective: The objective, which may compare pairs of samples.
        micro_batches: This rank's micro-batches.
        samples: The size that the user gave, or None.
        own_forward: Whether the user gave a `forward` function, so that batches have any form.

    Raises:
        StepError: The batch cannot be taken. Where ranks differ, it is raised on all of them.
    """
    count, even = len(micro_batches), True
    fit = own_forward or all(_is_pair(batch) for batch in micro_batches)
    sizes = [size_of(batch, not own_forward) for batch in micro_batches] if fit else []
    counted = samples is not None or None not in sizes
    odd = objective.pairs != "none" and any(size and size % 2 for size in sizes)
    if samples is None:
        mine = sum(size or 0 for size in sizes)
        found = [mine, count, count**2, not fit, not counted, odd]
        total = engine.sum([float(number) for number in found])
        samples, even = round(total[0]), engine.world_size * total[2] == total[1] ** 2
        fit, counted, odd = not total[3], not total[4], total[5] > 0
    if problem := _problem(objective, count, samples, fit, counted, even, odd):
        raise StepError(problem)
    return samples


def _problem(
    objective: Objective,
    count: int,
    samples: float,
    fit: bool,
    counted: bool,
    even: bool,
    odd: bool,
) -> str | None:
    """Return why a batch cannot be taken, or None.

    Args:
        objective: The objective.
        count: The number of micro-batches.
        samples: The size of the global batch.
        fit: Whether batches have a form that the step knows.
        counted: Whether their samples can be counted.
        even: Whether all ranks have as many micro-batches.
        odd: Whether some micro-batch holds half a pair.
    """
    problem = None
    if not fit:
        problem = (
            "a step takes a list of (inputs, target) pairs, one per micro-batch; for batches of "
            "another form give it forward=, a function of (model, batch) that returns losses"
        )
    elif not counted:
        problem = (
            "neither target nor inputs are a tensor with one row a sample: give the step "
            "samples=, the number of samples over all ranks and micro-batches"
        )
    elif not even:
        problem = (
            f"ranks have different numbers of micro-batches, here {count}: their collectives would "
            "wait for one another. Give each rank as many; their sizes may differ, down to none"
        )
    elif odd:
        problem = (
            f"{type(objective).__name__} compares the samples at places 2i and 2i + 1: give every "
            "micro-batch an even number of samples"
        )
    elif objective.whole_batch and count > 1 and not objective.accumulates:
        problem = (
            f"{type(objective).__name__} compares all samples of a step, and this one has {count} "
            "micro-batches: give it one, or allow one more forward pass for each pass, "
            "accumulation='second_pass'"
        )
    elif samples <= 0 or not count:
        problem = f"nothing to learn from: {count} micro-batches, {samples} samples"
    return problem


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2
