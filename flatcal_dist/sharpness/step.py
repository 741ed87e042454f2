"""The sharpness-aware step: the choreography of one optimizer step, the same on every engine.

    gradient at w  ->  w + e  ->  gradient at w + e  ->  back to w, bit for bit  ->  optimizer

It is a controller and not an optimizer: it owns the whole step, so that it decides when gradients
are reduced, what a non-finite value means for all ranks, and that nothing outlives a perturbation.

Gradients are reduced over ranks in one place: inside the backward pass of a step's last
micro-batch, by the engine (`Engine.accumulation`). The ascent gradient of a scope that the engine
cannot reduce by itself is the one exception (`_own_gradient`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatcal_dist.objectives.base import Objective, State
from flatcal_dist.sharpness import learning
from flatcal_dist.sharpness.engines.base import Engine
from flatcal_dist.sharpness.engines.move import Measured
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.forward import Forward, Pass, of_user, on_a_share, pair, size_of
from flatcal_dist.sharpness.networks import FrozenWeights, Parameters
from flatcal_dist.sharpness.replay import SameFunctionTwice, no_weights_in_autocast
from flatcal_dist.sharpness.result import Seen, StepResult, Sums
from flatcal_dist.sharpness.rules import Context, Loss, Memory, Rule, Shards
from flatcal_dist.sharpness.scope import Scope

MicroBatches = Sequence[Any]  # pairs (inputs, target), or what the user's `forward` takes


class SharpnessAwareStep:
    """One optimizer step on the micro-batches of one rank.

    `rho` and `taken` (steps so far) may be set between steps; `memory` is what the rule keeps, or
    None. To go on after a restart, save `engine.local_state()` and `state_dict()` of every rank.

    Args:
        engine: The network and its optimizer, on one of the engines.
        rule: One of `flatcal_dist.sharpness.rules`, or None for plain training.
        loss: The objective of the ascent gradient, or a function (logits [N, K], labels) -> losses
            [N]; by default cross-entropy. The rule derives that of the descent from it. CSAM has
            its own and takes none. An objective with a history wants `Objective.begin` before the
            first step, and `end_epoch` of the step after each epoch.
        scope: Whose gradient perturbs. "global": that of all ranks, so that N ranks with batch B
            are one rank with batch N * B; "rank": each rank's own (m-sharpness, Foret et al. 2021,
            section 4.1); "node"; or a number of ranks.
        per_micro_batch: Perturb for each micro-batch by itself, a smaller m again.
        clip_norm: Of the descent gradient.

    Raises:
        StepError: Rule, scope and engine cannot do this together; the alternatives are named.
    """

    def __init__(
        self,
        engine: Engine,
        rule: Rule | None,
        *,
        loss: Loss | None = None,
        scope: str | int = "global",
        per_micro_batch: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise StepError(f"clip_norm must be positive, or None for no clipping; got {clip_norm}")
        self.engine = engine
        self.rule = rule
        self.rho = rule.rho if rule else 0.0
        self.scope = Scope.of(scope, engine.world_size)
        self.per_micro_batch = per_micro_batch
        self.clip_norm = clip_norm
        self.loss: Objective = learning.objective_of(loss, rule)
        self.taken = 0
        self.memory: Memory | None = None
        self.built_with = Parameters(engine)
        self.frozen = FrozenWeights(engine.module)
        self.descent_loss: Loss = self.loss
        if rule:
            if rule.combines and (per_micro_batch or not self.scope.everyone):
                raise StepError(
                    f"{type(rule).__name__} compares the two gradients of a step, so both must be "
                    "of all ranks: use scope 'global' without per_micro_batch, or SAM"
                )
            engine.check(rule, self.scope, per_micro_batch)
            self.descent_loss = rule.descent_loss(self.loss)

    def __call__(
        self,
        micro_batches: MicroBatches,
        *,
        forward: Forward | None = None,
        samples: float | None = None,
        stop: bool = False,
        measure: bool = False,
        votes: Sequence[float] = (),
    ) -> StepResult:
        """Take the step on this rank's micro-batches, as many on every rank.

        Args:
            micro_batches: Pairs (inputs, target), or what `forward` takes. A target is labels, or
                `Targets`.
            forward: A function of (model, batch) that returns losses and whatever else is wanted
                back, in a form of `flatcal_dist.sharpness.forward`. It has to call the model that
                it is given. By default the step calls the network and its own objective.
            samples: The number of losses (or the sum of their weights) in a pass over all ranks
                and micro-batches. One more small reduction finds it when it is not given, from the
                first tensor of each batch, and checks that ranks have as many micro-batches.
            stop: This rank wishes to end; the result tells all ranks.
            measure: Whether to fill in also what StepResult has only then.
            votes: Numbers of this rank, as many on each, of which all learn the sums.

        Raises:
            StepError: The batch cannot be taken; nothing has changed then.
        """
        engine, rule = self.engine, self.rule
        samples = self._checked(micro_batches, samples, forward)
        share = engine.world_size / samples  # engines average over ranks: summed losses times this
        perturbs = rule is not None and rule.perturbs_at(self.taken)
        ascends = perturbs and rule.ascent_share > 0
        passes = self._passes(forward)
        seen = Seen(engine.device)
        units: Sequence[MicroBatches] = [micro_batches]
        if perturbs and self.per_micro_batch:
            units = [[batch] for batch in micro_batches]

        with (
            no_weights_in_autocast(),
            SameFunctionTwice(engine.module, engine.device) as replay,
            engine.broadcasting() as changed,
        ):
            if changed:
                replay.start_from_here()
            engine.zero_gradients()
            for unit in units:
                if perturbs:
                    last = unit is units[-1]
                    self._perturbed_gradient(unit, share, passes, replay, seen, measure, last)
                else:
                    seen.add_only(self._pass(unit, passes[0], share))
            if rule and rule.combines:
                with torch.no_grad():
                    seen.memory = rule.combine_(engine.shards(), self._context(seen.ascent))
                seen.ascent = None
            norm = engine.gradient_norm()
            total = self._agree(seen, norm, stop, votes)
            if not math.isclose(total["losses"], samples, rel_tol=1e-6):
                engine.zero_gradients()
                raise StepError(
                    f"the passes gave {total['losses']:.6g} losses for {samples:.6g} samples: give "
                    "the step samples=, the number of losses over all ranks and micro-batches"
                )
            skipped = total["skip"] > 0
            if skipped:
                replay.undo()
                engine.skip()
            else:
                self.memory = seen.memory or self.memory
                engine.update(norm, self.clip_norm)
            self.taken += 1
        if not skipped:
            learning.learn(self.loss, micro_batches, seen.outputs)
        over = engine.world_size * len(units)
        measured = {name: total[name] / over for name in Measured._fields if perturbs and measure}
        return StepResult(
            loss=total["loss"] / samples,
            perturbed_loss=total["perturbed_loss"] / samples if ascends else None,
            ascent_gradient_norm=total["ascent_norm"] / over if ascends else None,
            gradient_norm=total["norm"] / engine.world_size,
            skipped=skipped,
            stop=total["stop"] > 0,
            loss_scale=engine.loss_scale,
            votes=tuple(total[f"vote {number}"] for number in range(len(votes))),
            outputs=seen.outputs,
            **measured,
        )

    def end_epoch(self) -> None:
        """Tell the objective that an epoch is over. Called by all ranks."""
        self.loss.epoch_end(self.engine.over_ranks)

    def objective_state(self) -> State | None:
        """What the objective keeps, the same on every rank. Called by all ranks."""
        return self.loss.state(self.engine.over_ranks)

    def state_dict(self) -> dict[str, Any]:
        """What the step itself keeps; tensors and plain containers. Called by all ranks."""
        objective = self.objective_state()
        return {"taken": self.taken, "memory": self.memory, "objective": objective}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        learning.load_state(self.loss, state.get("objective"))
        self.taken, memory = state["taken"], state["memory"]
        self.memory = memory and {n: t.to(self.engine.device) for n, t in memory.items()}

    def _checked(
        self, micro_batches: MicroBatches, samples: float | None, forward: Forward | None
    ) -> float:
        """The size of the global batch. Raises StepError, where ranks differ on all of them."""
        count, even = len(micro_batches), True
        pairs = all(isinstance(m, tuple | list) and len(m) == 2 for m in micro_batches)
        fit = pairs or forward is not None
        sizes = [size_of(m, forward is None) for m in micro_batches] if fit else []
        counted = samples is not None or None not in sizes
        odd = self.loss.pairs != "none" and any(size and size % 2 for size in sizes)
        if samples is None:
            mine = sum(size or 0 for size in sizes)
            found = [mine, count, count**2, not fit, not counted, odd]
            total = self.engine.sum([float(number) for number in found])
            samples, even = round(total[0]), self.engine.world_size * total[2] == total[1] ** 2
            fit, counted, odd = not total[3], not total[4], total[5] > 0
        if not fit:
            raise StepError(
                "a step takes a list of (inputs, target) pairs, one per micro-batch; for batches "
                "of another form give it forward=, a function of (model, batch) that returns losses"
            )
        if not counted:
            raise StepError(
                "neither target nor inputs are a tensor with one row a sample: give the step "
                "samples=, the number of samples over all ranks and micro-batches"
            )
        if not even:
            raise StepError(
                "ranks have different numbers of micro-batches, here "
                f"{count}: their collectives would wait for one another. Give each as many; their "
                "sizes may differ, down to none"
            )
        if odd:
            raise StepError(
                f"{type(self.loss).__name__} compares the samples at places 2i and 2i + 1: give "
                "every micro-batch an even number of samples"
            )
        if samples <= 0 or not micro_batches:
            raise StepError(f"nothing to learn from: {count} micro-batches, {samples} samples")
        if not 0 <= self.rho < math.inf:
            raise StepError(f"rho must be finite and not negative, and was set to {self.rho}")
        self.built_with.refuse_changed()
        return samples

    def _passes(self, forward: Forward | None) -> tuple[Pass, Pass]:
        """How a micro-batch is evaluated at w and at w + e; the second also by the first's loss."""
        rule, scales = self.rule, self.engine.scales_losses
        if forward is None:
            ascent, descent = self.loss, self.descent_loss
            return pair(ascent, ascent, scales), pair(descent, ascent, scales)
        if rule and rule.own_loss:
            raise StepError(
                f"{type(rule).__name__} computes the losses itself, from logits and labels: give "
                "the step pairs (inputs, target) without forward=, or use SAM"
            )
        if rule and 0 < rule.ascent_share < 1:
            raise StepError(
                f"{type(rule).__name__} cuts each micro-batch for the ascent gradient, and cannot "
                "cut what forward= takes: give the step pairs (inputs, target)"
            )
        learning.refuse_without_targets(self.loss)
        return (of_user(forward, self.engine.world_size > 1),) * 2

    def _perturbed_gradient(
        self,
        unit: MicroBatches,
        share: float,
        passes: tuple[Pass, Pass],
        replay: SameFunctionTwice,
        seen: Seen,
        measure: bool,
        last: bool,
    ) -> None:
        """The gradient at w + e, added to those of earlier units of this step."""
        engine, rule = self.engine, self.rule
        replay.begin()
        shards, in_place = self._ascent(unit, share, passes[0], seen)
        moving = shards.selected(rule.selects)
        norm = self._gradient_to_perturbation_(shards, moving, seen)
        if rule.ascent_share:
            replay.rewind()
        with engine.moved(moving) as displacement:
            shards.gradients.clear()
            if in_place:
                engine.zero_gradients()
            sums = self._pass(unit, passes[1], share, last)
            if rule.ascent_share:
                seen.add_second(sums)
            else:
                seen.add_only(sums)
            if measure:
                seen.add_measured(displacement())
        if rule.ascent_share:
            replay.forward()
        seen.ascent_norm = seen.ascent_norm + norm / shards.loss_scale

    def _context(self, ascent: Memory | None = None) -> Context:
        return Context(self.rho, self.memory, self.engine.total, ascent)

    @torch.no_grad()
    def _gradient_to_perturbation_(self, shards: Shards, moving: Shards, seen: Seen) -> Tensor:
        """e in place of the gradients of what moves; the norm that they had.

        A function of its own: no name of the step holds a gradient during the second pass.
        """
        if self.rule.keeps_ascent:
            seen.ascent = {name: g.clone() for name, g in shards.by_name()}
        norm = self.rule.perturb_(moving, self._context())
        # After an overflow the step will be skipped. Until all ranks agree on that no network is to
        # run on weights of NaN: it may check its values, or use them as indices.
        overflow = ~norm.isfinite()
        for e in moving.gradients:
            e.masked_fill_(overflow, 0.0)
        return norm

    def _ascent(
        self, unit: MicroBatches, share: float, forward: Pass, seen: Seen
    ) -> tuple[Shards, bool]:
        """The ascent gradient of this unit; and whether it lies where the descent's is to lie.

        scope                     engine           comes from                      summed over
        "global"                  all              the engine's backward pass      all ranks
        groups FSDP2 shards over  FSDP2            the engine's backward pass      each group
        "rank"                    DDP              the engine's, not reduced       nothing
        all others, and           DDP, ZeRO-1, -2  autograd itself, so that what   the scope, by us
          per_micro_batch                          the engine holds stays
        no ascent (Momentum-SAM)  all              zeros, for the rule to fill     nothing
        """
        engine, rule = self.engine, self.rule
        if not rule.ascent_share:
            weights = engine.masters()
            zeros = [torch.zeros_like(w) for w in weights.values()]
            return Shards(list(weights), list(weights.values()), zeros), False
        if rule.ascent_share < 1:
            forward = on_a_share(forward, rule.ascent_share, self.loss.pairs != "none")
        # The engine's own reduction overlaps with the backward pass; it can do it for some scopes
        # only, and only while no descent gradient is being accumulated.
        overlapped = engine.reduces(self.scope) and not self.per_micro_batch
        alone = self.scope.ranks == 1 and not self.per_micro_batch and engine.leaves_own()
        with self.frozen.watched():
            if overlapped or alone:
                seen.add_first(self._pass(unit, forward, share, overlapped))
                shards = engine.shards()
                shards.own = not overlapped  # nothing was reduced: no engine counts on this memory
            else:
                shards, sums = self._own_gradient(unit, forward, share / self.scope.ranks)
                seen.add_first(sums)
        return shards, overlapped or alone

    def _pass(self, unit: MicroBatches, forward: Pass, share: float, reduce: bool = True) -> Sums:
        """Accumulate the gradient of share * (sum of losses); the last micro-batch reduces it."""
        # Inside somebody's outer autocast block the low-precision copies of the weights would
        # outlive the perturbation: pass two would silently see the weights of pass one.
        torch.clear_autocast_cache()
        engine, sums = self.engine, Sums(self.engine.device)
        for number, batch in enumerate(unit, start=1):
            with engine.accumulation(reduce and number == len(unit)):
                evaluated = forward(engine.model, batch)
                engine.backward(evaluated.total * share)
            sums.add(evaluated)
        return sums

    def _own_gradient(self, unit: MicroBatches, forward: Pass, share: float) -> tuple[Shards, Sums]:
        """As `_pass`, with the gradient left on this rank, then summed over the ranks in scope.

        It comes from autograd itself: no engine sees it, and what an engine accumulates stays.
        """
        torch.clear_autocast_cache()
        engine, sums = self.engine, Sums(self.engine.device)
        shards = engine.whole_weights()
        gradients: list[Tensor | None] = [None] * len(shards.weights)
        for batch in unit:
            with engine.accumulation(reduce=False):  # DDP may be within
                evaluated = forward(engine.module, batch)
            scaled = evaluated.total * share * engine.loss_scale
            new = list(torch.autograd.grad(scaled, shards.weights, allow_unused=True))
            for i in reversed(range(len(new))):
                gradient = new.pop()  # autograd may give one tensor for several parameters: copy
                if gradient is not None and gradients[i] is None:
                    gradients[i] = torch.empty_like(shards.weights[i]).copy_(gradient)
                elif gradient is not None:
                    gradients[i].add_(gradient)
            sums.add(evaluated)
        shards.gradients = [
            torch.zeros_like(w) if g is None else g
            for w, g in zip(shards.weights, gradients, strict=True)
        ]
        self.scope.sum_(shards.gradients)
        return shards, sums

    def _agree(
        self, seen: Seen, norm: Tensor, stop: bool, votes: Sequence[float]
    ) -> dict[str, float]:
        """Sums over ranks, by name, in one reduction. skip: of ranks with a value not finite."""
        mine = seen.figures() | {"norm": norm.double()}
        skip = 1 - torch.stack(list(mine.values())).isfinite().all().double()
        mine |= {"skip": skip, "stop": float(stop), "losses": seen.losses}
        mine |= {f"vote {number}": vote for number, vote in enumerate(votes)}
        return dict(zip(mine, self.engine.sum(list(mine.values())), strict=True))
