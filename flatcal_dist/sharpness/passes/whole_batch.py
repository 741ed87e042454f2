"""The facts of all samples of a step, for objectives whose loss of a sample depends on all others.

MMCE compares the confidences of all pairs of samples in the batch. So a rank has to know those of
the other ranks, and a micro-batch those of the other micro-batches. Facts have no graph: each rank
differentiates through its own samples, and the sum over ranks and micro-batches is the gradient of
the whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flatcal_dist.objectives import Objective, Targets
from flatcal_dist.objectives.targets import Batch, as_targets
from flatcal_dist.sharpness.passes.outputs import logits_of
from flatcal_dist.sharpness.passes.replay import SameFunctionTwice

Calls = Callable[[nn.Module, Any], Any]


class WholeBatch:
    """Finds the facts of all samples of a step, where the objective needs them.

    Args:
        ranks: The number of ranks that share a batch.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def known(self, objective: Objective, output: Any, target: Any) -> Any:
        """Return a target that holds the facts of the whole batch. Called by all ranks.

        The micro-batch is the only one of the step, unless `ahead` has set its facts before.
        """
        if not objective.whole_batch:
            return target
        target = as_targets(target)
        if target.batch is not None:
            return target
        own = _facts(objective, output, target)
        return replace(target, batch=Batch(*self._gathered(own)))

    @torch.no_grad()
    def ahead(
        self,
        objective: Objective,
        unit: Sequence[Any],
        model: nn.Module,
        device: torch.device,
    ) -> Sequence[Any]:
        """Return the micro-batches with targets that hold the facts of the whole batch.

        It takes one forward pass more over all of them, and leaves buffers and random numbers as
        they were. One micro-batch needs no such pass. Called by all ranks.

        Args:
            objective: The objective.
            unit: The pairs (inputs, target) of this rank, as many on each rank.
            model: What a forward pass calls.
            device: Where the network computes.
        """
        if not objective.whole_batch or len(unit) == 1:
            return unit
        with SameFunctionTwice(model, device) as replay:
            replay.begin()
            own = [_facts(objective, model(inputs), as_targets(target)) for inputs, target in unit]
            replay.forget()
        facts, first = self._gathered(torch.cat(own))
        known = []
        for (inputs, target), part in zip(unit, own, strict=True):
            known.append((inputs, replace(as_targets(target), batch=Batch(facts, first))))
            first += len(part)
        return known

    def _gathered(self, own: Tensor) -> tuple[Tensor, int]:
        """Return the rows of all ranks, and the place of this rank's first row."""
        if self.ranks == 1:
            return own, 0
        count = torch.tensor([len(own)], device=own.device)
        counts = [torch.zeros_like(count) for _ in range(self.ranks)]
        dist.all_gather(counts, count)
        sizes = [int(n) for n in counts]
        padded = own.new_zeros(max(sizes), own.shape[1])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        rows = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return rows, sum(sizes[: dist.get_rank()])


def _facts(objective: Objective, output: Any, target: Targets) -> Tensor:
    if not objective.whole_output:
        output = logits_of(output)
    if target.mixed is not None:
        output = output[0::2]
    return objective.facts(output, target).detach()
