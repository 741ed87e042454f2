"""The gradients of a step, and where they are summed over ranks.

The all-reduce happens in one place: inside the engine's backward pass of a step's last micro-batch
(`Engine.accumulation(reduce=True)`). The exception is an ascent gradient that the engine cannot
reduce by itself, which `Scope.sum_` sums after autograd has given it. The ascent gradient of a unit
(all micro-batches of a step, or one of them with `per_micro_batch`) comes from here:

    scope                       engines            source                      summed over
    global                      all                backward pass, reduced      all ranks
    the groups FSDP2 shards     FSDP2              backward pass, reduced      each group
      over
    rank                        DDP, one process   backward pass, not reduced  nothing
    all others, and             DDP, one process,  autograd, so that the       the scope, by
      per_micro_batch             ZeRO-1, ZeRO-2     engine's gradients stay     Scope.sum_
    a rule without an ascent    all                zeros, which the rule       nothing
      (Momentum-SAM)                                 fills

The descent gradient is always the engine's backward pass, reduced over all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatcal_dist.objectives import Objective
from flatcal_dist.sharpness.engines.base import Engine
from flatcal_dist.sharpness.passes.forward import Pass
from flatcal_dist.sharpness.passes.whole_batch import WholeBatch
from flatcal_dist.sharpness.result import Sums
from flatcal_dist.sharpness.rules import Shards
from flatcal_dist.sharpness.scope import Scope

MicroBatches = Sequence[Any]  # pairs (inputs, target), or what the user's `forward` takes


class Ascent(NamedTuple):
    """The ascent gradient of a unit.

    `in_place` says whether it lies where the descent gradient will lie. `sums` is what the pass at
    w saw.
    """

    shards: Shards
    in_place: bool
    sums: Sums


@dataclass(frozen=True)
class GradientPath:
    """How an engine gets the two gradients of a step in one scope."""

    engine: Engine
    scope: Scope
    per_micro_batch: bool
    objective: Objective
    batch_of: WholeBatch

    def weight(self, losses: float | Tensor, share: float) -> float | Tensor:
        """Return what the samples that perturb together weigh in the whole batch.

        Called by all ranks.

        Args:
            losses: The number of losses on this rank.
            share: The factor of each loss, for a mean over all ranks.
        """
        if self.scope.everyone and not self.per_micro_batch:
            return 1.0
        together = torch.as_tensor(losses, dtype=torch.float64, device=self.engine.device).clone()
        self.scope.sum_([together])
        return (together * (share / self.scope.ranks)).float()

    def ascent(self, unit: MicroBatches, forward: Pass, share: float) -> Ascent:
        """Return the gradient at w that perturbs.

        Args:
            unit: The micro-batches that share one perturbation.
            forward: The forward pass of a micro-batch.
            share: The factor of each loss, for a mean over all ranks.
        """
        # The engine's reduction overlaps with the backward pass. It serves some scopes only, and
        # only while no descent gradient is being accumulated.
        engine = self.engine
        overlapped = engine.reduces(self.scope) and not self.per_micro_batch
        alone = self.scope.ranks == 1 and not self.per_micro_batch and engine.leaves_own()
        if not overlapped and not alone:
            return self._beside(unit, forward, share / self.scope.ranks)
        sums = self.accumulate(unit, forward, share, reduce=overlapped)
        shards = engine.shards(self.scope)
        shards.own = not overlapped  # nothing was reduced: no engine counts on this memory
        return Ascent(shards, True, sums)

    def zeros(self) -> Shards:
        """Return zeros in place of an ascent gradient, for a rule that has none."""
        weights = self.engine.masters()
        zeros = [torch.zeros_like(weight) for weight in weights.values()]
        return Shards(list(weights), list(weights.values()), zeros, total=self.engine.total)

    def accumulate(
        self, unit: MicroBatches, forward: Pass, share: float, reduce: bool = True
    ) -> Sums:
        """Add the gradient of share * (sum of losses) to the engine's gradients.

        Args:
            unit: The micro-batches.
            forward: The forward pass of a micro-batch.
            share: The factor of each loss.
            reduce: Whether the backward pass of the last micro-batch sums over ranks.
        """
        # Inside somebody's outer autocast block the low-precision copies of the weights would
        # outlive the perturbation: pass two would silently see the weights of pass one.
        torch.clear_autocast_cache()
        engine, sums = self.engine, Sums(self.engine.device)
        unit = self.batch_of.ahead(self.objective, unit, engine.model, engine.device)
        for number, batch in enumerate(unit, start=1):
            with engine.accumulation(reduce and number == len(unit)):
                evaluated = forward(engine.model, batch)
                engine.backward(evaluated.total * share)
            sums.add(evaluated)
        return sums

    def _beside(self, unit: MicroBatches, forward: Pass, share: float) -> Ascent:
        """Return a gradient from autograd itself, summed over the ranks in scope.

        No engine sees it, and what an engine accumulates stays.
        """
        torch.clear_autocast_cache()
        engine, sums = self.engine, Sums(self.engine.device)
        unit = self.batch_of.ahead(self.objective, unit, engine.module, engine.device)
        shards = engine.whole_weights()
        gradients: list[Tensor | None] = [None] * len(shards.weights)
        for batch in unit:
            with engine.accumulation(reduce=False):  # DDP may be within
                evaluated = forward(engine.module, batch)
            scaled = evaluated.total * share * engine.loss_scale
            new = list(torch.autograd.grad(scaled, shards.weights, allow_unused=True))
            for i in reversed(range(len(new))):
                # autograd may give one tensor for several parameters: copy
                gradient, held = new.pop(), gradients[i]
                if gradient is not None and held is None:
                    gradients[i] = torch.empty_like(shards.weights[i]).copy_(gradient)
                elif gradient is not None and held is not None:
                    held.add_(gradient)
            sums.add(evaluated)
        shards.gradients = [
            torch.zeros_like(w) if g is None else g
            for w, g in zip(shards.weights, gradients, strict=True)
        ]
        self.scope.sum_(shards.gradients)
        return Ascent(shards, False, sums)
